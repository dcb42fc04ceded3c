"""One rank's share of the sample order as ready tensors, read ahead by one thread."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.code_dataset import CodeDataset
from pipeline.order import SampleOrder, rows_digest, slice_for_rank


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass: codes int64 (m, L), labels int64 (m,) with -1 for no condition, valid bool (m,)."""

    codes: Tensor
    labels: Tensor
    valid: Tensor


class CodeLoader:
    """Reads a rank's slice of every global batch. Its state is the step it is asked for.

    Args:
        dataset: the code dataset.
        order: the sample order; the same on every rank.
        rank: of this process.
        world_size: number of ranks.
        micro_batch_size: rows per micro batch; shorter slices are padded with rows that do not count.
        cond_drop_prob: share of rows whose label becomes -1.
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
    ):
        self.dataset, self.order = dataset, order
        self.micro_batch_size, self.cond_drop_prob = micro_batch_size, cond_drop_prob
        self._slice = slice_for_rank(order.global_batch_size, rank, world_size)
        largest = -(-order.global_batch_size // world_size)
        self._num_micro_batches = -(-largest // micro_batch_size)  # the same on every rank: collectives must match

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of one step."""
        batch = self.order.batch(step)
        rows, valid = self._padded(batch.rows[self._slice], 0), self._padded(batch.valid[self._slice], False)
        is_dropped = self._padded(self.order.draws(step)[self._slice] < self.cond_drop_prob, False)
        codes = torch.from_numpy(self.dataset.codes(rows))
        labels = torch.from_numpy(np.where(is_dropped, -1, self.dataset.labels(rows)))
        split = zip(*(tensor.split(self.micro_batch_size) for tensor in (codes, labels, torch.from_numpy(valid))))
        return [MicroBatch(*tensors) for tensors in split]

    def _padded(self, values: np.ndarray, fill: int | bool) -> np.ndarray:
        missing = self._num_micro_batches * self.micro_batch_size - len(values)
        return np.concatenate([values, np.full(missing, fill, values.dtype)])

    def iterate(self, start_step: int, stop_step: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, micro batches) of the steps [start_step, stop_step); the next step is read while the caller computes."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="code-loader") as reader:
            ahead = reader.submit(self.micro_batches, start_step) if start_step < stop_step else None
            for step in range(start_step, stop_step):
                assert ahead is not None
                current = ahead.result()
                ahead = reader.submit(self.micro_batches, step + 1) if step + 1 < stop_step else None
                yield step, current

    def num_valid(self, step: int) -> int:
        """Rows of the global batch that count."""
        return self.order.num_valid(step)

    def digest(self, step: int) -> int:
        """Digest of the rows this rank consumes in a step; the ranks' digests add up to the global batch's."""
        batch = self.order.batch(step)
        positions = np.arange(self.order.global_batch_size)[self._slice]
        counts = batch.valid[self._slice]
        return rows_digest(step, positions[counts], batch.rows[self._slice][counts])
