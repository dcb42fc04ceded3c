"""The validation NLL of a run: the likelihood of held-out images' codes under the weights of a step."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.train_options import TrainJobOptions
from pipeline.code_dataset import CodeDataset
from pipeline.condition_codes import ConditionCodes
from pipeline.loader import num_micro_batches, open_conditions
from pipeline.order import slice_for_rank
from stages.errors import ArtefactError
from stages.second_stage.transformer import nll


class Validation:
    """Rows [0, num_rows) of a code dataset, divided among the ranks.

    Args:
        dataset: of held-out images.
        num_rows: measured at most.
        trained_on: dataset of the run, whose codes it must share.
        micro_batch_size: rows per forward pass.
        conditions: codes of the held-out images' condition that take the place of classes.

    Raises:
        ArtefactError: the dataset was made by another tokenizer, on another grid or with other classes.
    """

    def __init__(
        self,
        dataset: CodeDataset,
        num_rows: int,
        trained_on: CodeDataset,
        micro_batch_size: int,
        conditions: ConditionCodes | None = None,
    ):
        self.dataset, self._labelled = dataset, dataset if conditions is None else conditions
        check_alike("train.validation_path", dataset, trained_on, "codes.path")
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
                labels = torch.from_numpy(self._labelled.labels(padded)).to(engine.device)
                total += nll(engine(codes, labels), codes)[: len(rows)].double().sum().cpu()
        engine.train()
        total = total.to(engine.device)
        dist.all_reduce(total)
        return total.item() / (self.num_rows * self.dataset.num_codes)


def check_alike(key: str, held_out: CodeDataset, trained_on: CodeDataset, trained_key: str) -> None:
    """Refuses a code dataset of held-out images whose codes do not mean what those of the training images mean.

    Raises:
        ArtefactError: it was made by another tokenizer, on another grid or with other classes; both sides are named.
    """
    for what in ("tokenizer_fingerprint", "grid", "class_names"):
        ours, theirs = getattr(held_out, what), getattr(trained_on, what)
        if ours != theirs:
            raise ArtefactError(
                f"{key} is {held_out.path} with {what} {ours}, but {trained_key} has {theirs}. Tokenize the held-out "
                f"images with the same tokenizer, size and source: tokenize source.split=holdout."
            )


def open_validation(
    options: TrainJobOptions, dataset: CodeDataset, conditions: ConditionCodes | None
) -> Validation | None:
    """The validation that a run asks for; None if it asks for none.

    Raises:
        ConfigError: the run is conditioned on codes, and those of the held-out images are not named.
        ArtefactError: a dataset is missing, or has other codes than the training's.
    """
    train = options.train
    if train.validation_path is None:
        return None
    held_out = CodeDataset.open(train.validation_path, verify=False)
    held_out_conditions = None
    if conditions is not None:
        key = "conditioning.validation_codes_path"
        path = options.conditioning.validation_codes_path
        held_out_conditions = open_conditions(path, held_out, options.codes, verify=False, key=key)
        check_alike(key, held_out_conditions.dataset, conditions.dataset, "conditioning.codes_path")
    return Validation(held_out, train.validation_rows, dataset, train.micro_batch_size, held_out_conditions)
