"""The pictures of the page: same-seed samples over time to step through, and what is shown beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.compare import group_series
from evaluation.records import Record
from evaluation.sheets import Sheet, make_sheet
from evaluation.trends import series_names

MAX_FRAMES, MAX_SERIES = 30, 4
SAMPLES = "samples"
CAPTIONS = {
    "real": "Held-out real images",
    "reconstructions": "The same images after the tokenizer",
    "neighbours": "Samples, each with its nearest training image to the right",
}


@dataclass(frozen=True)
class Frame:
    """One picture and what it is."""

    sheet: Sheet
    caption: str
    link: str | None = None


@dataclass(frozen=True)
class Viewer:
    """Samples of one series over time.

    Attributes:
        name: what tells it from other series; empty if it is the only one.
        frames: oldest first.
        num_left_out: records between them that are not shown.
    """

    name: str
    frames: Sequence[Frame]
    num_left_out: int = 0


@dataclass(frozen=True)
class Pictures:
    """Everything that the page shows of images.

    Attributes:
        viewers: the series with the newest record first.
        still: pictures of the newest record.
        classes: names by class, of those that a sheet can be cut to.
    """

    viewers: Sequence[Viewer] = ()
    still: Sequence[Frame] = ()
    classes: Mapping[int, str] = field(default_factory=dict)


def gather_pictures(
    records: Sequence[Record],
    read: Callable[[str], bytes],
    link: Callable[[Record], str | None],
    headline: Record | None = None,
) -> Pictures:
    """The pictures of a history.

    Args:
        records: of one store.
        read: the bytes of a grid, by its path in a record.
        link: to a record's file, as the page has it.
        headline: whose pictures stand still; those of the newest if not given.
    """
    if not records:
        return Pictures()
    chosen = [s for s in reversed(group_series(records)) if any(SAMPLES in r.grids for r in s)][:MAX_SERIES]
    names = series_names(chosen) if len(chosen) > 1 else [""] * len(chosen)
    viewers = [_viewer(name, series, read, link) for name, series in zip(names, chosen)]
    shown = headline or max(records, key=lambda record: record.created_at)
    still = [_still(shown, name, read) for name in shown.grids if name != SAMPLES]
    class_names = shown.content.get("class_names", [])
    frames = [*still, *(frame for viewer in viewers for frame in viewer.frames)]
    labels = sorted({label for frame in frames for label in frame.sheet.boxes})
    return Pictures(
        viewers, still, {label: class_names[label] if label < len(class_names) else str(label) for label in labels}
    )


def _viewer(
    name: str, series: Sequence[Record], read: Callable[[str], bytes], link: Callable[[Record], str | None]
) -> Viewer:
    with_samples = [record for record in series if SAMPLES in record.grids]
    kept = _evenly(with_samples, MAX_FRAMES)
    frames = [Frame(_sheet(record, SAMPLES, read), _caption(record), link(record)) for record in kept]
    return Viewer(name, frames, len(with_samples) - len(kept))


def _evenly(records: Sequence[Record], count: int) -> list[Record]:
    """At most so many, evenly spread, the first and the last among them."""
    if len(records) <= count:
        return list(records)
    return [records[round(i * (len(records) - 1) / (count - 1))] for i in range(count)]


def _still(record: Record, name: str, read: Callable[[str], bytes]) -> Frame:
    return Frame(_sheet(record, name, read), CAPTIONS.get(name, name.replace("_", " ").capitalize()))


def _sheet(record: Record, name: str, read: Callable[[str], bytes]) -> Sheet:
    layouts: Mapping[str, Any] = record.content.get("layouts", {})
    return make_sheet(read(record.grids[name]), layouts.get(name))


def _caption(record: Record) -> str:
    return f"Step {record.step:,}, {record.created_at[:10]}"
