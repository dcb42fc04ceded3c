"""Reading a code dataset: sequentially beside memcpy, at random beside packaged loaders, and from a cold start.

python benchmarks/loader.py [--num-images 1281167] [--repeats 5] [--without-competitors]

Runs on one core, with the page cache warm and kernels compiled. `make bench` provides the other loaders.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks.competitors import measure_all
from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.parts import RowFormat, make_rows
from pipeline.code_dataset.plan import freeze, make_plan
from pipeline.code_dataset.publish import publish
from pipeline.code_dataset.receipts import commit_shard, read_receipts
from pipeline.loader import CodeLoader, dataset_order
from pipeline.sources import listing
from stages.memory import keep_freed_memory

GRID, CODEBOOK_SIZE, BATCH, SHARD_SIZE = (16, 16), 1024, 1024, 65_536
MANY_ROWS = 1_000_000_000


def write_dataset(root: str, codes: np.ndarray, row_group_rows: int | None = None) -> CodeDataset:
    """A published dataset of these codes (n, 256), without images or a tokenizer."""
    n = len(codes)
    row_format = RowFormat(num_codes=codes.shape[1], codebook_size=CODEBOOK_SIZE, has_labels=False)
    plan = make_plan(listing(np.arange(n), [str(i) for i in range(n)]), {"class_names": []}, SHARD_SIZE)
    freeze(root, plan)
    for shard in range(plan.num_shards):
        ids = np.arange(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, n))
        rows = make_rows(
            row_format,
            codes=codes[ids],
            image_ids=ids,
            views=np.zeros(len(ids)),
            crops=np.tile(np.float32([0, 0, 256, 256]), (len(ids), 1)),
            is_flipped=np.zeros(len(ids), bool),
            source_sha256=np.random.default_rng(shard).integers(0, 256, (len(ids), 32), np.uint8),
        )
        commit_shard(root, plan.fingerprint, shard, rows=rows, quarantined=[], row_format=row_format, num_views=1)
    description = {
        "plan_fp": plan.fingerprint,
        "class_names": [],
        "conditions": [],
        "views": ["center"],
        "grid": list(GRID),
        "tokenizer": {"fingerprint": "f" * 64},
        "codec": {"name": "pack_le", "num_codes": codes.shape[1], "codebook_size": CODEBOOK_SIZE},
    }
    receipts = read_receipts(root, plan.fingerprint, plan.num_shards)
    publish(root, receipts, description, row_group_rows=row_group_rows)
    return CodeDataset.open(root, verify=True)


def median_seconds(run: Callable[[], None], repeats: int) -> float:
    """Median over the repeats, after one run that does not count."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def sequential(dataset: CodeDataset, repeats: int) -> None:
    """All rows in order, every row group hashed in every pass, beside copying as many bytes in memory."""
    batches = [np.arange(i, min(i + BATCH, dataset.num_rows)) for i in range(0, dataset.num_rows, BATCH)]

    def read() -> None:
        opened = CodeDataset(dataset.path, dataset.manifest)
        for rows in batches:
            opened.codes(rows)

    num_bytes = dataset.num_rows * dataset.num_codes * 2
    source = np.ones(num_bytes, np.uint8)
    target = np.empty_like(source)
    ours = num_bytes / median_seconds(read, repeats) / 1e9
    copy = num_bytes / median_seconds(lambda: np.copyto(target, source), repeats) / 1e9
    print(f"sequential: {ours:.1f} GB/s as uint16, hash checked; memcpy {copy:.1f} GB/s; ratio {ours / copy:.2f}")


def at_random(dataset: CodeDataset, repeats: int) -> list[np.ndarray]:
    """An epoch in the order of a run: codes alone, and as the tensors a trainer gets. Returns the batches of rows."""
    order = dataset_order(dataset, seed=0, global_batch_size=BATCH, window_groups=None)
    windowed = dataset_order(dataset, seed=0, global_batch_size=BATCH, window_groups=8)
    sizes = {"rank": 0, "world_size": 1, "micro_batch_size": BATCH, "cond_drop_prob": 0.1}
    loader, steps = CodeLoader(dataset, order, **sizes), range(order.steps_per_epoch)

    def read(epoch_order) -> None:
        for step in steps:
            dataset.codes(epoch_order.batch(step).rows, wait=False)

    def load() -> None:
        for step in steps:
            loader.load(step)

    for name, run in (
        ("order and codes, uint16", lambda: read(order)),
        ("the same in windows of 8 row groups", lambda: read(windowed)),
        ("the loader's int64 tensors, labels and digest", load),
    ):
        rate = dataset.num_images / median_seconds(run, repeats)
        print(f"random: {rate / 1e6:.2f} M images/s, {name}")
    return [order.batch(step).rows for step in steps if order.num_valid(step) == BATCH]


def many_rows(dataset: CodeDataset) -> CodeDataset:
    """A manifest of 1e9 rows whose parts are all this dataset's first one."""
    first = dataset.manifest["parts"][0]
    starts = range(0, MANY_ROWS - first["rows"] + 1, first["rows"])
    num_rows = len(starts) * first["rows"]
    counts = {**dataset.manifest["counts"], "n_rows": num_rows, "n_images": num_rows}
    parts = [{**first, "row_start": start} for start in starts]
    return CodeDataset(dataset.path, {**dataset.manifest, "counts": counts, "parts": parts})


def resume(dataset: CodeDataset, repeats: int) -> None:
    """From an opened manifest to the first batch of a step in the middle; opening it is given apart."""
    many, size = many_rows(dataset), {"rank": 0, "world_size": 1, "micro_batch_size": BATCH, "cond_drop_prob": 0.1}
    opening = median_seconds(lambda: CodeDataset.open(dataset.path, verify=False) and None, repeats)
    print(f"resume: a manifest of {dataset.num_rows:,} rows is opened in {opening * 1e3:.1f} ms")
    for of, name in ((dataset, f"{dataset.num_rows:,} rows"), (many, f"{many.num_rows:,} rows (simulated manifest)")):
        for window in (None, 8):

            def first_batch() -> None:
                opened = CodeDataset(of.path, of.manifest)
                order = dataset_order(opened, seed=0, global_batch_size=BATCH, window_groups=window)
                steps = CodeLoader(opened, order, **size).iterate(order.steps_per_epoch * 3 // 2, 10**9)
                next(steps)
                times.append(time.perf_counter() - started)
                steps.close()
                opened.settle()  # or the checks of this start would run beside the next one

            times: list[float] = []
            for _ in range(repeats + 1):
                started = time.perf_counter()
                first_batch()
            kind = "global order" if window is None else f"windows of {window} row groups"
            print(f"resume: first batch after {statistics.median(times[1:]) * 1e3:.1f} ms, {name}, {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1_281_167)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-competitors", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()  # as every trainer does
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    codes = np.random.default_rng(0).integers(0, CODEBOOK_SIZE, (args.num_images, GRID[0] * GRID[1]), np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(folder, codes)
        file_bytes = sum(part["bytes"] for part in dataset.manifest["parts"]) / dataset.num_rows
        print(f"bytes per row: {dataset.bytes_per_row} of codes, {file_bytes:.2f} with keys, crops and footers")
        sequential(dataset, args.repeats)
        batches = at_random(dataset, args.repeats)
        resume(dataset, args.repeats)
    if not args.without_competitors:
        for competitor in measure_all(codes, batches, args.repeats):
            print(competitor)


if __name__ == "__main__":
    main()
