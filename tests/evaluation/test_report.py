"""The report page: self-contained, escaped, honest about what can be compared, whole with little to show."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from evaluation.report import Curve, Grid, ReportData, format_seconds, format_time, format_value, render_report
from pipeline.grids import grid_png

NAME = "Fréchet distance (efficientnet-lite0@96)"
VOID = {"meta", "link", "img", "br", "hr"}


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
        if "style" not in self.open:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def record(step, gfd, num_samples=512, distance=NAME, **extra):
    metrics = {
        "fd_holdout": {"value": 21.3, "standard_error": 0.55, "num_samples": num_samples},
        "rfd": {"value": 58.9, "standard_error": 1.8, "num_samples": num_samples},
        "gfd": {"value": gfd, "standard_error": 3.3, "num_samples": num_samples, "bias_corrected": gfd - 14},
        "codebook_usage": {"value": 0.98, "standard_error": None, "num_samples": num_samples},
    }
    return {
        "step": step,
        "created_at": f"2026-03-0{step // 100} 02:14 UTC",
        "metrics": metrics,
        "distance": distance,
        **extra,
    }


def full(**changes):
    png = grid_png(np.zeros((4, 32, 32, 3), np.uint8))
    values = dict(
        title="Demo",
        created_at="2026-03-07",
        summary={"Step": "600"},
        config_yaml="run: {seed: 0}",
        records=[record(100, 193.0, path="records/a.json"), record(200, 84.03, path="records/b.json")],
        curves=[
            Curve("First stage", "images seen", range(1, 1001), np.geomspace(9, 0.01, 1000), "loss"),
            Curve("Second stage", "step", [1, 2], [5, 4]),
        ],
        grids=[Grid("Samples", png, "four black squares")],
        wall_seconds={"train": 61.0, "sample": 4.0},
    )
    return ReportData(**{**values, **changes})


def test_the_page_needs_nothing_from_outside():
    page = Page(render_report(full()))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(link.startswith("data:") or link.startswith("records/") for link in links)
    assert not page.all("script")
    policy = next(
        meta["content"] for meta in page.all("meta") if "content" in meta and "default-src" in meta["content"]
    )
    assert "default-src 'none'" in policy


def test_the_three_distances_are_named_and_carry_errors():
    page = Page(render_report(full()))
    assert NAME in page.text
    for text in ("Held-out real images (floor)", "21.30 ± 0.55", "58.9 ± 1.8", "84.0 ± 3.3", "70.0"):
        assert text in page.text
    assert "FID" not in page.text


def test_values_measured_with_the_fid_network_are_found_too():
    metrics = {
        name: {"value": 5.0 + i, "standard_error": 0.1, "num_samples": 9}
        for i, name in enumerate(["fid_holdout", "rfid", "gfid"])
    }
    page = Page(render_report(full(records=[{"step": 7, "created_at": "now", "metrics": metrics, "distance": "FID"}])))
    assert "5.00 ± 0.10" in page.text and "7.00 ± 0.10" in page.text


def test_only_records_measured_alike_share_a_line():
    records = [
        record(100, 193.0),
        record(200, 500.0, num_samples=64),
        record(300, 90.0, distance="Fréchet distance (other)"),
        record(400, 84.0),
    ]
    page = Page(render_report(full(records=records)))
    assert "measured with another extractor or number of images: 2 of 4 records" in " ".join(page.text.split())
    assert any("2 records" in svg.get("aria-label", "") for svg in page.all("svg"))
    assert "500.0 ± 3.3" in page.text, "still in the table of all records"


def test_records_link_to_their_files_newest_first():
    page = Page(render_report(full()))
    assert [a["href"] for a in page.all("a")] == ["records/b.json", "records/a.json"]


def test_pictures_are_embedded_with_alternative_text():
    data = full()
    image = Page(render_report(data)).all("img")[0]
    assert image["alt"] == "four black squares"
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == data.grids[0].png


def test_everything_is_escaped():
    hostile = "<script>alert(1)</script>"
    data = full(
        title=hostile,
        created_at=hostile,
        summary={hostile: hostile},
        config_yaml=hostile,
        records=[record(100, 1.0, distance=hostile, path='"><script>')],
        curves=[Curve(hostile, hostile, [1, 2], [1, 2], hostile)],
        grids=[Grid(hostile, b"png", '"' + hostile)],
        wall_seconds={hostile: 1.0},
    )
    page = Page(render_report(data))
    assert not page.all("script")
    assert page.text.count(hostile) >= 8


def test_an_empty_history_says_so():
    page = Page(render_report(ReportData(title="Empty", created_at="now")))
    assert "No distance has been measured yet." in page.text
    assert [tag for tag, _ in page.tags if tag in ("table", "svg", "img")] == []


def test_one_record_and_missing_errors_still_make_a_page():
    metrics = {"gfd": {"value": 84.0, "standard_error": None, "num_samples": 8}}
    page = Page(
        render_report(
            full(
                records=[{"step": 1, "created_at": "now", "metrics": metrics, "distance": NAME}],
                curves=[Curve("c", "x", [], [])],
            )
        )
    )
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
