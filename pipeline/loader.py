"""One rank's share of the sample order as ready tensors, read ahead by one thread."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.code_dataset import CodeDataset
from pipeline.condition_codes import ConditionCodes
from pipeline.order import SampleOrder, Window, batch_index, rows_digest, slice_for_rank
from stages.errors import ConfigError
from stages.options import CodesOptions

READ_AHEAD_STEPS = 2  # steps whose tensors are ready
FETCH_AHEAD_STEPS = 32  # steps whose row groups are on their way, where they come from S3


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass: codes int64 (m, L), valid bool (m,), and labels int64: classes (m,) or codes (m, P), -1 for none."""

    codes: Tensor
    labels: Tensor
    valid: Tensor


@dataclass(frozen=True)
class LoadedStep:
    """One rank's share of a step.

    Attributes:
        step: counted from 0 over the run.
        batch: the global batch it consumes, counted from 0 over all epochs; that of the step, unless some are skipped.
        micro_batches: equally many of equal shape on every rank.
        num_valid: rows of the global batch that count.
        digest: of the rows this rank consumes; the ranks' digests add up to the global batch's modulo 2^64.
    """

    step: int
    batch: int
    micro_batches: list[MicroBatch]
    num_valid: int
    digest: int


def open_dataset(options: CodesOptions, *, verify: bool) -> CodeDataset:
    """The dataset of a configuration. Raises ArtefactError like `CodeDataset.open`."""
    return CodeDataset.open(
        options.path, verify=verify, cache_folder=options.cache_path, cache_bytes=options.cache_bytes
    )


def open_conditions(
    path: str | None, images: CodeDataset, options: CodesOptions, *, verify: bool, key: str
) -> ConditionCodes:
    """The codes of the condition of the images of a code dataset.

    Args:
        path: of the code dataset of conditions.
        images: the code dataset.
        options: where row groups from S3 are kept.
        verify: as of `CodeDataset.open`.
        key: of the configuration that gives `path`, for messages.

    Raises:
        ConfigError: no path is given.
        ArtefactError: a missing or damaged dataset, other views, images without a condition, or other images.
    """
    if path is None:
        raise ConfigError(
            f"{key} is not set, but conditioning.name is codes. Name the code dataset of the conditions: tokenize the same images "
            f"with the condition's tokenizer, e.g. tokenizer.input=segmentation."
        )
    return ConditionCodes(open_dataset(dataclasses.replace(options, path=path), verify=verify), images)


def dataset_order(dataset: CodeDataset, *, seed: int, global_batch_size: int, window_groups: int | None) -> SampleOrder:
    """The order of a run on a dataset.

    Args:
        dataset: the code dataset.
        seed: of the run.
        global_batch_size: rows per step over all ranks.
        window_groups: row groups that are shuffled together; None shuffles the whole dataset.
    """
    window = None if window_groups is None else Window(dataset.images_per_group, window_groups)
    return SampleOrder(
        num_images=dataset.num_images,
        num_views=dataset.num_views,
        seed=seed,
        global_batch_size=global_batch_size,
        root_hash=dataset.root_hash,
        window=window,
    )


def num_micro_batches(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro batches of a step, the same on every rank, since collectives must match; the last rows of some may be padding."""
    largest = -(-global_batch_size // world_size)
    return -(-largest // micro_batch_size)


class CodeLoader:
    """Reads a rank's slice of every global batch. Its state is the step it is asked for.

    Args:
        dataset: the code dataset.
        order: the sample order; the same on every rank.
        rank: of this process.
        world_size: number of ranks.
        micro_batch_size: rows per micro batch; shorter slices are padded with rows that do not count.
        cond_drop_prob: share of rows whose labels become -1.
        conditions: codes that take the place of classes.
    """

    def __init__(
        self,
        dataset: CodeDataset,
        order: SampleOrder,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        cond_drop_prob: float,
        conditions: ConditionCodes | None = None,
    ):
        self.dataset, self.order = dataset, order
        self._labelled = dataset if conditions is None else conditions
        self._sources: list[CodeDataset | ConditionCodes] = [dataset] if conditions is None else [dataset, conditions]
        self.micro_batch_size, self.cond_drop_prob = micro_batch_size, cond_drop_prob
        self._slice = slice_for_rank(order.global_batch_size, rank, world_size)
        self._num_micro_batches = num_micro_batches(order.global_batch_size, micro_batch_size, world_size)

    def load(self, step: int, skipped: Sequence[tuple[int, int]] = ()) -> LoadedStep:
        """This rank's share of one step. New row groups are checked beside the caller; see `settle`.

        Args:
            step: counted from 0 over the run.
            skipped: ranges of global batches that are left out, as for `pipeline.order.batch_index`.

        Raises:
            ArtefactError: a file of the dataset is missing, or one that was read before turned out to be damaged.
        """
        index = batch_index(step, skipped)
        batch = self.order.batch(index)
        rows, valid, draws = batch.rows[self._slice], batch.valid[self._slice], batch.draws[self._slice]
        positions = np.arange(self._slice.start, self._slice.stop)
        padded_rows, padded_valid = self._padded(rows, 0), self._padded(valid, False)
        is_dropped = self._padded(draws < self.cond_drop_prob, False)
        codes = torch.from_numpy(self.dataset.codes(padded_rows, wait=False).astype(np.int64))
        labels = self._labelled.labels(padded_rows, wait=False)
        labels[is_dropped] = -1
        tensors = (codes, torch.from_numpy(labels), torch.from_numpy(padded_valid))
        split = zip(*(t.split(self.micro_batch_size) for t in tensors))
        return LoadedStep(
            step=step,
            batch=index,
            micro_batches=[MicroBatch(*parts) for parts in split],
            num_valid=self.order.num_valid(index),
            digest=rows_digest(index, positions[valid], rows[valid]),
        )

    def _padded(self, values: np.ndarray, fill: int | bool) -> np.ndarray:
        missing = self._num_micro_batches * self.micro_batch_size - len(values)
        return np.concatenate([values, np.full(missing, fill, values.dtype)])

    def iterate(self, start_step: int, stop_step: int, skipped: Sequence[tuple[int, int]] = ()) -> Iterator[LoadedStep]:
        """The steps [start_step, stop_step) in order; the next ones are read while the caller computes."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="code-loader") as reader:
            ahead: deque[Future[LoadedStep]] = deque()
            for step in range(start_step, stop_step):
                for coming in range(step + len(ahead), min(step + READ_AHEAD_STEPS + 1, stop_step)):
                    ahead.append(reader.submit(self.load, coming, skipped))
                if self.dataset.is_remote and step + FETCH_AHEAD_STEPS < stop_step:
                    reader.submit(self._fetch_ahead, batch_index(step + FETCH_AHEAD_STEPS, skipped))
                yield ahead.popleft().result()

    def _fetch_ahead(self, batch: int) -> None:
        rows = self.order.batch(batch).rows[self._slice]
        for source in self._sources:
            source.prefetch(rows)

    def settle(self) -> None:
        """Waits until all that was read is checked. To be called before anything is made permanent.

        Raises:
            ArtefactError: a row group is damaged.
        """
        for source in self._sources:
            source.settle()
