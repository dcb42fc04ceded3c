"""One rank's share of a tokenizer's training images, streamed by Ray Data: tasks anywhere in the cluster read while the rank trains.

Ray Data cannot go on from the middle of an epoch, and splits a dataset among ranks as it happens to flow. So every rank has a dataset
of its own, whose rows are not images but steps: which images a step consumes follows from its number alone.
"""

import logging
import pickle
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data

from pipeline.image_reader import ImageReader
from pipeline.order import batch_index, rows_digest, slice_for_rank
from stages.errors import TesseraError

READ_AHEAD_STEPS = 2  # steps whose pixels lie in this process
STEPS_PER_DATASET = 2048  # the next dataset starts while the last steps of one are consumed
IMAGES_PER_TASK = 64  # at least, so that starting a task costs little beside reading
ERROR = "error"  # the column of a block that could not be read
STORE_SHARE = 0.25  # of the cluster's shared memory, for all ranks together


@dataclass(frozen=True)
class LoadedImages:
    """One rank's share of a step.

    Attributes:
        step: counted from 0 over the training.
        batch: the global batch it consumes; that of the step, unless some are skipped.
        pixels: uint8 (b, size, size, C), from `ImageReader.read_step`.
        digest: of the rows this rank consumes; the ranks' digests add up to the global batch's modulo 2^64.
    """

    step: int
    batch: int
    pixels: np.ndarray
    digest: int


class ImageLoader:
    """Streams a rank's entries of every global batch. Its state is the step it is asked for.

    Args:
        reader: knows the order and how to read.
        table: a reference to the image list in Ray's object store.
        rank: of this process.
        world_size: number of ranks.
        cpus_per_rank: that reading must leave alone.
    """

    def __init__(self, reader: ImageReader, table: ray.ObjectRef, *, rank: int, world_size: int, cpus_per_rank: float):
        self.reader, self.table, self.world_size, self.cpus_per_rank = reader, table, world_size, cpus_per_rank
        self._entries = slice_for_rank(reader.order.global_batch_size, rank, world_size)

    def iterate(self, start_step: int, stop_step: int, skipped: Sequence[tuple[int, int]] = ()) -> Iterator[LoadedImages]:
        """The steps [start_step, stop_step) in order; the next ones are read while the caller computes.

        Args:
            start_step: counted from 0 over the training.
            stop_step: likewise.
            skipped: ranges of global batches that are left out, as for `pipeline.order.batch_index`.

        Raises:
            TesseraError: from `ImageReader.read_step`.
            ray.exceptions.RayTaskError: anything else that fails while images are read.
        """
        steps = self._stream(start_step, stop_step, skipped)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="image-loader") as reader:
            ahead: deque[Future[LoadedImages]] = deque()
            try:
                for step in range(start_step, stop_step):
                    while len(ahead) <= READ_AHEAD_STEPS and step + len(ahead) < stop_step:
                        ahead.append(reader.submit(next, steps))
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()
                reader.submit(steps.close).result()

    def _stream(
        self, start: int, stop: int, skipped: Sequence[tuple[int, int]]
    ) -> Generator[LoadedImages, None, None]:
        for first in range(start, stop, STEPS_PER_DATASET):
            dataset = self._dataset(first, min(first + STEPS_PER_DATASET, stop), skipped)
            expected = first
            for block in dataset.iter_batches(batch_size=None, prefetch_batches=1):
                if ERROR in block:
                    raise pickle.loads(block[ERROR][0])
                for step, rows, pixels in zip(block["step"].tolist(), block["rows"], block["pixels"]):
                    assert step == expected, f"Ray Data gave step {step} for {expected}"
                    expected += 1
                    yield self._loaded(step, batch_index(step, skipped), rows, pixels)

    def _loaded(self, step: int, batch: int, rows: np.ndarray, pixels: np.ndarray) -> LoadedImages:
        positions = np.arange(self._entries.start, self._entries.stop)
        return LoadedImages(step, batch, pixels, rows_digest(batch, positions, rows.astype(np.int64)))

    def _dataset(self, first: int, stop: int, skipped: Sequence[tuple[int, int]]) -> ray.data.Dataset:
        per_task = max(1, IMAGES_PER_TASK // (self._entries.stop - self._entries.start))
        num_tasks = -(-(stop - first) // per_task)
        dataset = ray.data.range(stop - first, override_num_blocks=num_tasks).map_batches(
            _read_steps,  # type: ignore[arg-type]  # Ray's annotations know no further arguments
            fn_args=(first, self._entries, tuple(skipped), self.reader, self.table),
            batch_size=None,
        )
        self._limit(dataset.context)
        return dataset

    def _limit(self, context: ray.data.DataContext) -> None:
        """Keeps the order, and to this rank's share of what the cluster has to spare."""
        resources, options = ray.cluster_resources(), context.execution_options
        spare = resources.get("CPU", 0.0) - self.world_size * self.cpus_per_rank
        options.preserve_order = True
        options.resource_limits = ray.data.ExecutionResources(
            cpu=max(1, spare // self.world_size),
            object_store_memory=STORE_SHARE * resources.get("object_store_memory", 1e9) / self.world_size,
        )
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)  # it tells of every dataset, which here is a stretch of steps


def _read_steps(
    block: dict[str, np.ndarray], first: int, entries: slice, skipped: Any, reader: ImageReader, table: ray.ObjectRef
) -> dict[str, np.ndarray]:
    """Steps, their rows (n, b) and pixels (n, b, size, size, C). Or an error for users: Ray Data would keep no more than its text."""
    listing, steps = ray.get(table), block["id"] + first
    try:
        rows, pixels = zip(*(reader.read_step(int(step), entries, skipped, listing) for step in steps))
    except TesseraError as error:
        return {ERROR: np.array([pickle.dumps(error)], dtype=object)}
    return {"step": steps, "rows": np.stack(rows), "pixels": np.stack(pixels)}
