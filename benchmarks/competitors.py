"""Packaged loaders beside Tessera's: the same codes, each in the library's own format, read the fastest documented way.

A module for `benchmarks/loader.py`, not a script. Codes are uint16 (n, 256); a batch is an int64 array of positions.
Libraries are imported before any clock starts. A rate counts whole images handed over as one (batch, 256) array.
"""

import importlib.util
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa

MDS_BATCHES = 50  # at some 12,000 images/s a pass over ImageNet would take minutes
ROWS_PER_FILE = 131_072  # of Parquet; 64 MiB of uint16, so that ImageNet is ten read tasks and not one
Batches = list[np.ndarray]
Read = Callable[[], Iterator[np.ndarray]]  # one pass over the batches, from its start


@dataclass(frozen=True)
class Competitor:
    """What one loader did; the three figures are nan where it could not be imported."""

    name: str
    images_per_second: float  # median over the repeats, page cache warm
    bytes_per_image: float  # on disk, everything the library wrote
    seconds_to_first_batch: float  # from opening what is on disk to holding one batch
    note: str

    def __str__(self) -> str:
        if math.isnan(self.images_per_second):
            return f"{self.name}: {self.note}"
        return (
            f"{self.name}: {self.images_per_second:,.0f} images/s, {self.bytes_per_image:,.1f} bytes per image, "
            f"first batch after {self.seconds_to_first_batch * 1000:,.1f} ms ({self.note})"
        )


def measure_all(codes: np.ndarray, batches: Batches, repeats: int) -> list[Competitor]:
    """Every loader on these codes, one after another; one that is not installed has a line that says so."""
    found = []
    for name, measure_loader in LOADERS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                found += measure_loader(codes, batches, repeats, folder)
            except ImportError as error:
                found.append(Competitor(name, math.nan, math.nan, math.nan, f"not installed ({error})"))
    return found


def measure(
    name: str,
    open_loader: Callable[[], Read],
    repeats: int,
    num_bytes: float,
    note: str,
    expected: np.ndarray | None = None,
) -> Competitor:
    """What one loader did, from a function that opens its data; `expected` is the first batch at our positions."""
    started = time.perf_counter()
    read = open_loader()
    reading = read()
    first_batch = next(reading)
    seconds = time.perf_counter() - started
    if expected is not None and not np.array_equal(first_batch, expected):
        raise AssertionError(f"{name} returned other codes than were written.")
    reading.close()
    return Competitor(name, statistics.median(rate(read) for _ in range(repeats)), num_bytes, seconds, note)


def rate(read: Read) -> float:
    """Images per second of one pass."""
    started = time.perf_counter()
    num_images = sum(len(batch) for batch in read())
    return num_images / (time.perf_counter() - started)


def bytes_per_image(folder: str, num_images: int) -> float:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / num_images


def arrow_table(codes: np.ndarray) -> pa.Table:
    """One column `codes` of fixed-size lists, without a copy."""
    return pa.table({"codes": pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])})


def numpy_memmap(codes: np.ndarray, batches: Batches, repeats: int, folder: str) -> list[Competitor]:
    """The ceiling: uint16 rows of one .npy file by a permutation stored in memory, 8 more bytes per image."""
    path = f"{folder}/codes.npy"
    np.save(path, codes)

    def open_loader() -> Read:
        rows = np.asarray(np.load(path, mmap_mode="r"))
        np.random.default_rng(0).permutation(len(rows))  # the index that every opening has to build
        return lambda: (np.take(rows, batch, axis=0) for batch in batches)

    note = f"globally random by a stored O(N) permutation, numpy {np.__version__}"
    size = bytes_per_image(folder, len(codes))
    return [measure("numpy memmap", open_loader, repeats, size, note, codes[batches[0]])]


def hf_datasets(codes: np.ndarray, batches: Batches, repeats: int, folder: str) -> list[Competitor]:
    """Map-style `dataset[rows]` of a memory-mapped Arrow file, as numpy and as Arrow tables viewed as numpy."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(arrow_table(codes)).save_to_disk(folder)

    def as_numpy() -> Read:
        dataset = datasets.load_from_disk(folder).with_format("numpy", dtype=np.uint16)
        return lambda: (dataset[batch]["codes"] for batch in batches)

    def as_arrow() -> Read:
        dataset = datasets.load_from_disk(folder).with_format("arrow")
        return lambda: (rows_of(dataset[batch]["codes"], codes.shape[1]) for batch in batches)

    size = bytes_per_image(folder, len(codes))
    note = f"globally random, datasets {datasets.__version__}"
    return [
        measure("HF datasets, numpy format", as_numpy, repeats, size, note, codes[batches[0]]),
        measure("HF datasets, arrow format", as_arrow, repeats, size, note, codes[batches[0]]),
    ]


def rows_of(column: pa.ChunkedArray, num_codes: int) -> np.ndarray:
    """A column of fixed-size lists as an array (rows, num_codes)."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, num_codes)


def mosaicml_streaming(codes: np.ndarray, batches: Batches, repeats: int, folder: str) -> list[Competitor]:
    """MDS: `dataset[rows]` at our positions, and the library's own shuffled iteration over as many batches."""
    with torchvision_stub():
        import streaming

    with streaming.MDSWriter(out=folder, columns={"codes": f"ndarray:uint16:{codes.shape[1]}"}) as writer:
        for row in codes:
            writer.write({"codes": row})
    batches, batch_size = batches[:MDS_BATCHES], len(batches[0])

    def stack(samples) -> np.ndarray:
        return np.stack([sample["codes"] for sample in samples])

    def random_access() -> Read:
        dataset = streaming.StreamingDataset(local=folder, batch_size=batch_size)
        return lambda: (stack(dataset[batch]) for batch in batches)

    def shuffled(algorithm: str) -> Read:
        dataset = streaming.StreamingDataset(
            local=folder, batch_size=batch_size, shuffle=True, shuffle_algo=algorithm, num_canonical_nodes=1
        )

        def read() -> Iterator[np.ndarray]:
            samples = iter(dataset)
            try:
                for _ in batches:
                    yield stack(islice(samples, batch_size))
            finally:
                dataset._iterator.exit()  # no public way to stop its threads, and they go on looking at the folder

        return read

    size = bytes_per_image(folder, len(codes))
    version = f"{len(batches)} batches a pass, mosaicml-streaming {streaming.__version__}"
    name, note = "mosaicml-streaming", f"globally random, {version}"
    found = [measure(f"{name}, dataset[rows]", random_access, repeats, size, note, codes[batches[0]])]
    for algorithm in ("py1e", "py1s"):
        note = f"its own shuffled iteration, {version}"
        found.append(measure(f"{name}, {algorithm}", partial(shuffled, algorithm), repeats, size, note))
    return found


@contextmanager
def torchvision_stub():
    """Lets `streaming` import two torchvision names that only its vision datasets use, without torchvision."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    stubs = {} if importlib.util.find_spec("torchvision") else {name: ModuleType(name) for name in names}
    for name, stub in stubs.items():
        stub.__spec__, stub.__path__ = ModuleSpec(name, None), []
        stub.VisionDataset, stub.to_tensor = object, None
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


def ray_data(codes: np.ndarray, batches: Batches, repeats: int, folder: str) -> list[Competitor]:
    """Whole epochs of `read_parquet(...).iter_batches` with a local shuffle buffer of ten batches."""
    import ray
    import ray.data

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        blocks = [codes[start : start + ROWS_PER_FILE] for start in range(0, len(codes), ROWS_PER_FILE)]
        ray.data.from_numpy(blocks).write_parquet(folder)
        batch_size = len(batches[0])

        def open_loader() -> Read:
            dataset = ray.data.read_parquet(folder)
            iterate = partial(dataset.iter_batches, batch_size=batch_size, batch_format="numpy")
            return lambda: (batch["data"] for batch in iterate(local_shuffle_buffer_size=10 * batch_size))

        size = bytes_per_image(folder, len(codes))
        note = f"locally shuffled only, whole epochs with their start, one CPU for tasks, ray {ray.__version__}"
        return [measure("Ray Data", open_loader, repeats, size, note)]
    finally:
        ray.shutdown()


LOADERS = {
    "numpy memmap": numpy_memmap,
    "HF datasets": hf_datasets,
    "mosaicml-streaming": mosaicml_streaming,
    "Ray Data": ray_data,
}
