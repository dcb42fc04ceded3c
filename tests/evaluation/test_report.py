"""The report page: self-contained, escaped, honest about what can be compared, whole with little to show."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_support import NAME, metric, pictures, record

from evaluation.compare import find_regressions
from evaluation.labels import metric_label
from evaluation.records import Record
from evaluation.report import Curve, ReportData, format_seconds, format_time, format_value, render_report
from evaluation.trends import series_names
from evaluation.viewer import gather_pictures

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Visible text, attributes and nesting of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def full(**changes):
    records = changes.pop("records", [record(100, 193.0), record(200, 84.03)])
    grids, layouts = pictures(200)
    records = [Record(r.path, {**r.content, "grids": dict.fromkeys(grids, "x"), "layouts": layouts}) for r in records]
    values = dict(
        title="Demo",
        created_at="2026-03-07",
        summary={"Step": "600"},
        config_yaml="run: {seed: 0}",
        records=records,
        links={each.id: f"records/{each.id}.json" for each in records},
        curves=[
            Curve("First stage", "images seen", range(1, 1001), np.geomspace(9, 0.01, 1000), "loss"),
            Curve("Second stage", "step", [1, 2], [5, 4]),
        ],
        pictures=gather_pictures(records, read=lambda path: grids["samples"], link=lambda record: None),
        wall_seconds={"train": 61.0, "sample": 4.0},
    )
    return ReportData(**{**values, **changes})


def test_the_page_needs_nothing_from_outside():
    html = render_report(full())
    page = Page(html)
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(link.startswith("data:") or link.startswith("records/") for link in links)
    (policy,) = [meta["content"] for meta in page.all("meta") if "default-src" in meta.get("content", "")]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and policy.endswith(f"script-src 'sha256-{digest}'")


def test_the_three_distances_are_named_and_carry_errors():
    page = Page(render_report(full()))
    assert NAME in page.text
    for text in ("Held-out real images (floor)", "21.30 ± 0.55", "58.9 ± 1.8", "84.0 ± 3.3", "70.0"):
        assert text in page.text
    assert "FID" not in page.text


def test_values_measured_with_the_fid_network_are_found_too():
    names = ["fid_holdout", "rfid", "gfid"]
    metrics = {name: metric(5.0 + i, 0.1, 9) for i, name in enumerate(names)}
    page = Page(render_report(full(records=[record(700, 1.0, metrics=metrics, distance="FID")])))
    assert "5.00 ± 0.10" in page.text and "7.00 ± 0.10" in page.text


def test_of_two_distances_the_one_that_is_named_stands_on_top():
    metrics = {"gfid": metric(777.0, 0.1, 9), "gfd": metric(5.0, 0.1, 9)}
    for distance, value in (("FID (inception-v3@299)", "777.00 ± 0.10"), (NAME, "5.00 ± 0.10")):
        html = render_report(full(records=[record(700, 1.0, metrics=metrics, distance=distance)]))
        table = html[html.index("How close to real images") :].split("</table>")[0]
        assert distance in table and value in table.replace("\N{NO-BREAK SPACE}", " ")


def test_only_records_measured_alike_share_a_chart():
    records = [
        record(100, 193.0),
        record(200, 500.0, num_samples=64),
        record(300, 90.0, distance="Fréchet distance (other)"),
        record(400, 84.0),
    ]
    page = Page(render_report(full(records=records)))
    text = " ".join(page.text.split())
    assert f"{NAME}, 512 images. Error bars" in text
    assert "Measured otherwise: Fréchet distance (other), 512 images (1 record)" in text
    assert f"Measured otherwise: {NAME}, 64 images (1 record)" in text
    assert "500.0 ± 3.3" in page.text, "still in the table of all records"


def test_every_metric_has_a_chart_over_steps_and_one_over_nights():
    page = Page(render_report(full()))
    titles = {svg.get("aria-label", "") for svg in page.all("svg")}
    for label in ("Distance of samples", "Distance of held-out images", "Share of codebook used", "Validation NLL, nats per code"):
        assert {f"{label} over steps, 1 series", f"{label} over nights, 1 series"} <= titles


def test_series_are_named_by_what_tells_them_apart():
    guided = {"cfg_scale": 4.0, "top_k": None}
    html = render_report(full(records=[record(100, 90.0), record(100, 80.0, sampling=guided), record(200, 70.0)]))
    assert "cfg_scale 4.0</text>" in html and "cfg_scale 2.0</text>" in html and "runs/a</text>" not in html
    html = render_report(full(records=[record(100, 90.0), record(100, 80.0, run="/runs/b")]))
    assert "runs/a</text>" in html and "runs/b</text>" in html and "cfg_scale 2.0</text>" not in html


def test_regressions_stand_before_everything_else():
    records = [record(100, 60.0), record(200, 90.0)]
    page = Page(render_report(full(records=records, regressions=find_regressions(records, 3.0))))
    text = " ".join(page.text.split())
    assert "Distance of samples of runs/a: 90.0 ± 3.3 at step 200, after 60.0 ± 3.3 at step 100 (6.4 standard errors)" in text
    assert text.index("Worse than before") < text.index("How close to real images")
    assert "Worse than before" not in Page(render_report(full())).text


def test_records_link_to_their_files_newest_first():
    data = full()
    links = [a["href"] for a in Page(render_report(data)).all("a")]
    assert links == [f"records/{each.id}.json" for each in reversed(data.records)]


def test_pictures_are_embedded_with_alternative_text_and_cut_by_class():
    data = full()
    page = Page(render_report(data))
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        "Samples: Step 100, 2026-03-01",
        "Samples: Step 200, 2026-03-02",
        "Newest record: Held-out real images",
        "Newest record: The same images after the tokenizer",
    ]
    assert base64.b64decode(images[0]["src"].removeprefix("data:image/png;base64,")) == pictures(200)[0]["samples"]
    boxes = [json.loads(figure["data-boxes"]) for figure in page.all("figure") if "data-boxes" in figure]
    assert all(set(each) == {"0", "1", "2"} for each in boxes)
    assert [option["value"] for option in page.all("option")] == ["", "0", "1", "2"]


def test_everything_is_escaped():
    hostile = "<script>alert(1)</script>"
    records = [record(100, 1.0, distance=hostile, class_names=[hostile], run=f'/runs/"{hostile}')]
    data = full(
        title=hostile,
        created_at=hostile,
        summary={hostile: hostile},
        config_yaml=hostile,
        records=records,
        links={records[0].id: '"><script>'},
        curves=[Curve(hostile, hostile, [1, 2], [1, 2], hostile)],
        wall_seconds={hostile: 1.0},
    )
    page = Page(render_report(data))
    assert len(page.all("script")) == 1
    assert page.text.count(hostile) >= 8


def test_an_empty_history_says_so():
    page = Page(render_report(ReportData(title="Empty", created_at="now")))
    assert "No distance has been measured yet." in page.text
    assert [tag for tag, _ in page.tags if tag in ("table", "svg", "img")] == []


def test_one_record_and_missing_errors_still_make_a_page():
    one = record(100, 84.0, metrics={"gfd": metric(84.0, None, 8)})
    page = Page(render_report(full(records=[one], curves=[Curve("c", "x", [], [])])))
    assert "One record so far." in page.text and "nothing logged" in page.text


def test_long_curves_say_that_they_are_averaged():
    page = Page(render_report(full()))
    assert "each point the mean of 5 logged values" in page.text and "logarithmic scale" in page.text


def test_headings_are_in_order_and_targets_exist():
    html = render_report(full())
    page = Page(html)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert len(ids) == len([1 for _, attributes in page.tags if "id" in attributes])
    assert {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes} <= ids


@pytest.mark.parametrize(
    "value,error,text",
    [
        (12.345, 0.123, "12.35 ± 0.12"),
        (84.03, 3.3, "84.0 ± 3.3"),
        (123456.7, 210.0, "123,457 ± 210"),
        (3.127, 0.0, "3.127"),
        (0.98441, None, "0.9844"),
        (12345.6, None, "12,346"),
        (float("nan"), None, "nan"),
    ],
)
def test_numbers_are_written_to_the_digits_they_have(value, error, text):
    assert format_value(value, error).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    "seconds,text", [(8.14, "8.1 s"), (125, "2 min 05 s"), (59.99, "60.0 s"), (3725, "1 h 02 min")]
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_times_are_shown_in_utc():
    assert format_time("2026-03-07T03:14:15.123+01:00") == "2026-03-07 02:14 UTC"
    assert format_time("last night") == "last night"


@pytest.mark.parametrize(
    "name, label",
    [
        ("gfd", "Distance of samples"),
        ("rfid", "FID of reconstructions"),
        ("fd_holdout", "Distance of held-out images"),
        ("gkd_dinov2_vitb14", "Kernel distance of samples (dinov2_vitb14)"),
        ("psnr", "PSNR of reconstructions, dB"),
        ("recall_reconstructions", "Recall reconstructions"),
    ],
)
def test_metrics_are_named_in_words(name, label):
    assert metric_label(name) == label


def test_series_are_told_apart_by_run_then_sampling_then_seed():
    def series(cfg_scale=2.0, **changes):
        return [record(100, 90.0, sampling={"seed": 0, "cfg_scale": cfg_scale}, **changes)]

    assert series_names([series(), series(run="/runs/b")]) == ["runs/a", "runs/b"]
    assert series_names([series(), series(cfg_scale=3.0)]) == ["cfg_scale 2.0", "cfg_scale 3.0"]
    assert series_names([series(), series(seed=1), series(run="/runs/b")]) == ["runs/a, seed 0", "runs/a, seed 1", "runs/b"]
