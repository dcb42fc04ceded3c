"use strict";
// Steps through nights, cuts pictures to one class, chooses the axis of the trends. The page is whole without it.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

all("[data-needs-script]").forEach((part) => { part.hidden = false; });

function cut(figure, label) {
  const box = JSON.parse(figure.dataset.boxes)[label];
  const [width, height] = figure.dataset.size.split(" ").map(Number);
  const [left, top, w, h] = box || [0, 0, 1, 1];
  const view = figure.querySelector(".window"), image = figure.querySelector("img");
  view.style.aspectRatio = `${w * width} / ${h * height}`;
  view.style.maxWidth = box && w * width < 200 ? "12rem" : "";
  image.style.width = `${100 / w}%`;
  image.style.maxWidth = "none";
  image.style.transform = `translate(${-100 * left}%, ${-100 * top}%)`;
}

const classes = document.getElementById("class");
if (classes) {
  classes.addEventListener("change", () => all("[data-frame]").forEach((figure) => cut(figure, classes.value)));
}

for (const viewer of all("[data-viewer]")) {
  const frames = all("[data-frame]", viewer), slider = viewer.querySelector("[type=range]");
  if (!slider) continue;
  const together = viewer.querySelector("[type=checkbox]"), buttons = all("[data-step]", viewer);
  const show = () => {
    const at = Number(slider.value);
    frames.forEach((frame, i) => { frame.hidden = !together.checked && i !== at; });
    slider.setAttribute("aria-valuetext", frames[at].querySelector("figcaption").textContent);
    buttons.forEach((button) => {
      button.disabled = together.checked || !frames[at + Number(button.dataset.step)];
    });
    slider.disabled = together.checked;
  };
  const step = (by) => { slider.value = Number(slider.value) + by; show(); };
  slider.addEventListener("input", show);
  together.addEventListener("change", show);
  buttons.forEach((button) => button.addEventListener("click", () => step(Number(button.dataset.step))));
  document.addEventListener("keydown", (event) => {
    const by = { ",": -1, ".": 1 }[event.key];
    if (by && !event.ctrlKey && !event.metaKey && !event.altKey && !together.checked) step(by);
  });
  show();
}

const axes = all("[name=axis]");
const choose = () => {
  const chosen = axes.find((axis) => axis.checked).value;
  all("[data-axis]").forEach((part) => { part.hidden = part.dataset.axis !== chosen; });
};
axes.forEach((axis) => axis.addEventListener("change", choose));
if (axes.length) choose();
