"""What is in a code dataset, for people: counts, classes, how its codebook is used, what its bytes hold, and a picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline import storage
from pipeline.binding import check_tokenizer, encoding_of
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.publish import statistics
from pipeline.encoding import prepare_tokenizer
from pipeline.grids import grid_png
from pipeline.tokenizers import open_tokenizer
from stages.errors import ArtefactError
from stages.first_stage.pixels import to_uint8

NUM_GRID_ROWS = 64
NUM_BARS, BAR_WIDTH = 10, 40


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Facts of a code dataset. Bytes per row are averages over the files of its parts.

    Attributes:
        classes: rows per class, by name; "(none)" for rows without one.
        views: names of the stored views, in order of the view column.
        counts: as in the manifest.
        histogram: int64 (codebook_size,), how often each code occurs.
        entropy_bits_per_code: order-0 entropy of the codes.
        bytes_per_row: of packed codes, of conditions (labels and maps), of the describing columns and footers, and of all.
        entropy_bound_bytes_per_row: what an ideal order-0 coder would need for a row's codes.
    """

    path: str
    root_hash: str
    num_rows: int
    num_images: int
    grid: tuple[int, int]
    classes: dict[str, int]
    views: tuple[str, ...]
    counts: dict[str, Any]
    codebook_size: int
    used_codes: int
    bits_per_code: int
    entropy_bits_per_code: float
    bytes_per_row: dict[str, float]
    entropy_bound_bytes_per_row: float
    part_bytes: list[int]
    histogram: np.ndarray

    def to_summary(self) -> dict[str, Any]:
        """All but the histogram, JSON-able."""
        return {name: value for name, value in self.__dict__.items() if name != "histogram"}


def inspect_codes(path: str) -> Inspection:
    """Reads every code and label of a dataset.

    Raises:
        ArtefactError: missing or damaged, or with other statistics than its manifest says.
    """
    dataset = CodeDataset.open(path, verify=False)
    manifest = dataset.manifest
    histogram, labels = _scan(dataset)
    stats = statistics(histogram)
    if stats != manifest["stats"]:
        raise ArtefactError(
            f"{path} has code statistics {stats}, but its manifest says {manifest['stats']}. Restore it, or tokenize anew."
        )
    names = [*dataset.class_names, "(none)"]
    return Inspection(
        path=path,
        root_hash=dataset.root_hash,
        num_rows=dataset.num_rows,
        num_images=dataset.num_images,
        grid=dataset.grid,
        classes={name: int(count) for name, count in zip(names, labels) if count},
        views=tuple(manifest["views"]),
        counts=manifest["counts"],
        codebook_size=dataset.codebook_size,
        used_codes=stats["used_codes"],
        bits_per_code=manifest["codec"]["bits"],
        entropy_bits_per_code=stats["entropy_bits_per_code"],
        bytes_per_row=_bytes_per_row(dataset),
        entropy_bound_bytes_per_row=stats["entropy_bits_per_code"] * dataset.num_codes / 8,
        part_bytes=[part["bytes"] for part in manifest["parts"]],
        histogram=histogram,
    )


def _scan(dataset: CodeDataset) -> tuple[np.ndarray, np.ndarray]:
    """How often each code occurs, and each class, with rows without one counted last."""
    codes = np.zeros(dataset.codebook_size, np.int64)
    labels = np.zeros(len(dataset.class_names) + 1, np.int64)
    for start in range(0, dataset.num_rows, dataset.row_group_rows):
        rows = np.arange(start, min(start + dataset.row_group_rows, dataset.num_rows))
        codes += np.bincount(dataset.codes(rows).ravel(), minlength=len(codes))
        labels += np.bincount(dataset.labels(rows) % len(labels), minlength=len(labels))
    return codes, labels


def _bytes_per_row(dataset: CodeDataset) -> dict[str, float]:
    columns = {column["name"]: column for column in dataset.manifest["columns"]}
    conditions = sum(c["bytes"] for c in columns.values() if c["role"] in ("label", "condition"))
    total = sum(part["bytes"] for part in dataset.manifest["parts"]) / dataset.num_rows
    return {
        "codes": dataset.bytes_per_row,
        "conditions": conditions,
        "keys and crops": total - dataset.bytes_per_row - conditions,
        "total": total,
    }


def render_inspection(inspection: Inspection) -> str:
    """The facts as text, with how evenly the codebook is used as bars."""
    grid, size = "x".join(map(str, inspection.grid)), inspection.bytes_per_row
    kinds = inspection.counts["n_quarantined"]
    lines = [
        f"{inspection.path}",
        f"  root hash        {inspection.root_hash}",
        f"  rows             {inspection.num_rows:,} = {inspection.num_images:,} images x {len(inspection.views)} views",
        f"  views            {', '.join(inspection.views)}",
        f"  codes            {grid} per row, {inspection.bits_per_code} bits each",
        f"  quarantined      {sum(kinds.values()):,}" + "".join(f", {kind} {n}" for kind, n in sorted(kinds.items())),
        f"  duplicates       {inspection.counts['n_duplicates']:,}, dropped {inspection.counts['n_dedup_dropped']:,}",
        f"  codebook         {inspection.used_codes:,} of {inspection.codebook_size:,} entries in use, entropy "
        f"{inspection.entropy_bits_per_code:.3f} bits per code, perplexity {2**inspection.entropy_bits_per_code:,.0f}",
        f"  bytes per row    {size['total']:.2f} = codes {size['codes']:.0f} + conditions {size['conditions']:.0f} + keys and "
        f"crops {size['keys and crops']:.2f}",
        f"  entropy bound    {inspection.entropy_bound_bytes_per_row:.1f} bytes per row; packed codes are "
        f"{size['codes'] / max(inspection.entropy_bound_bytes_per_row, 1e-9):.3f} times that",
        f"  parts            {len(inspection.part_bytes)}, {min(inspection.part_bytes) / 1e6:.1f} to "
        f"{max(inspection.part_bytes) / 1e6:.1f} MB",
        "  classes",
        *(f"    {name:<20} {count:,}" for name, count in inspection.classes.items()),
        "  share of all codes by tenth of the codebook, most used first",
        *_bars(inspection.histogram),
    ]
    return "\n".join(lines)


def _bars(histogram: np.ndarray) -> list[str]:
    tenths = np.array_split(np.sort(histogram)[::-1], NUM_BARS)
    shares = [tenth.sum() / max(1, histogram.sum()) for tenth in tenths]
    return [f"    {share:6.1%} {'#' * round(share * BAR_WIDTH)}".rstrip() for share in shares]


def write_pictures(inspection: Inspection, tokenizer_path: str | None, folder: str) -> list[str]:
    """Writes `codebook.csv` (code, count) and, with a tokenizer, `rows.png` of decoded rows; returns their paths.

    Raises:
        ArtefactError: the tokenizer is not the dataset's.
    """
    paths = [storage.join(folder, "codebook.csv")]
    text = "code,count\n" + "".join(f"{code},{count}\n" for code, count in enumerate(inspection.histogram))
    storage.replace(paths[0], text.encode())
    if tokenizer_path is not None:
        paths.append(storage.join(folder, "rows.png"))
        storage.replace(paths[1], grid_png(_decoded_rows(inspection.path, tokenizer_path)))
    return paths


@torch.inference_mode()
def _decoded_rows(path: str, tokenizer_path: str) -> np.ndarray:
    """Rows spread evenly over the dataset as images, uint8 (n, H, W, C)."""
    dataset = CodeDataset.open(path, verify=False)
    tokenizer = prepare_tokenizer(open_tokenizer(tokenizer_path), torch.device("cpu"))
    check_tokenizer(tokenizer_path, tokenizer, encoding_of(dataset.manifest), f"the code dataset {path}")
    count = min(NUM_GRID_ROWS, dataset.num_rows)
    rows = np.arange(count) * dataset.num_rows // count
    codes = torch.from_numpy(dataset.codes(rows).astype(np.int64)).view(count, *dataset.grid)
    return to_uint8(tokenizer.decode(codes)).numpy()
