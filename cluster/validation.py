"""The validation NLL of a run: the likelihood of held-out images' codes under the weights of a step."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.code_dataset import CodeDataset
from pipeline.loader import num_micro_batches
from pipeline.order import slice_for_rank
from stages.errors import ArtefactError
from stages.second_stage.transformer import nll


class Validation:
    """Rows [0, num_rows) of a code dataset, divided among the ranks.

    Args:
        path: of the dataset of held-out images.
        num_rows: measured at most.
        trained_on: dataset of the run, whose codes it must share.
        micro_batch_size: rows per forward pass.

    Raises:
        ArtefactError: the dataset was made by another tokenizer, on another grid or with other classes.
    """

    def __init__(self, path: str, num_rows: int, trained_on: CodeDataset, micro_batch_size: int):
        self.dataset = CodeDataset.open(path, verify=False)
        for what in ("tokenizer_fingerprint", "grid", "class_names"):
            held_out, trained = getattr(self.dataset, what), getattr(trained_on, what)
            if held_out != trained:
                raise ArtefactError(
                    f"train.validation_path is {path} with {what} {held_out}, but codes.path has {trained}. Tokenize the held-out "
                    f"images with the same tokenizer, size and source: tokenize source.split=holdout."
                )
        self.num_rows, self.micro_batch_size = min(num_rows, self.dataset.num_rows), micro_batch_size

    def measure(self, engine: Any) -> float:
        """Nats per code, without dropout and with every condition. Every rank must call it."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mine = np.arange(self.num_rows)[slice_for_rank(self.num_rows, rank, world_size)]
        count = num_micro_batches(self.num_rows, self.micro_batch_size, world_size)
        total = torch.zeros((), dtype=torch.float64)
        engine.eval()
        with torch.no_grad():
            for index in range(count):
                rows = mine[index * self.micro_batch_size : (index + 1) * self.micro_batch_size]
                padded = (
                    np.resize(rows, self.micro_batch_size) if len(rows) else np.zeros(self.micro_batch_size, np.int64)
                )
                codes = torch.from_numpy(self.dataset.codes(padded).astype(np.int64)).to(engine.device)
                labels = torch.from_numpy(self.dataset.labels(padded)).to(engine.device)
                total += nll(engine(codes, labels), codes)[: len(rows)].double().sum().cpu()
        engine.train()
        total = total.to(engine.device)
        dist.all_reduce(total)
        return total.item() / (self.num_rows * self.dataset.num_codes)
