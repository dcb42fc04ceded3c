"""The first stage's training in real process groups (gloo) without Ray: the ranks read their images themselves."""

import functools
from contextlib import contextmanager

import pyarrow as pa
import torch
import torch.distributed as dist
from tests_support import tiny_config
from train_support import never, nothing, start

from cluster import checkpoints, run_log, tokenizer_loop, training_run
from cluster.tokenizer_history import TrainingInputs, list_training_images
from cluster.tokenizer_options import TokenizerJobOptions, settle, training_path
from pipeline.image_loader import ImageLoader
from pipeline.image_order import list_hash
from pipeline.order import batch_index
from stages.config import select_sections
from stages.first_stage.training import FirstStageTrainer

TRAIN = {"precision": "fp32", "num_samples": 96, "checkpoint_every_steps": 3, "log_every_steps": 1, "min_crop": 0.7}


class LocalLoader(ImageLoader):
    """Reads in the rank's own process instead of Ray's tasks."""

    def _stream(self, start, stop, skipped):
        for step in range(start, stop):
            rows, pixels = self.reader.read_step(step, self._entries, skipped, self.table)
            yield self._loaded(step, batch_index(step, skipped), rows, pixels)


def without_ray(prepare=nothing):
    """Makes a rank do without Ray, and then what `prepare` does."""
    tokenizer_loop.ImageLoader = LocalLoader
    tokenizer_loop.get_device = lambda: torch.device("cpu")
    prepare()


def options_for(folder, **sections):
    """Options of a tiny tokenizer training in a folder: six steps of 16 images, a commit every three."""
    train = {**TRAIN, **sections.pop("tokenizer_train", {})}
    return settle(select_sections(TokenizerJobOptions, tiny_config(folder, tokenizer_train=train, **sections)), None)


def inputs_for(options):
    """What the driver would hand out, without a perceptual network."""
    images = list_training_images(options)
    return TrainingInputs(list_hash(images), len(images), pa.table({"uri": images["uri"]}), None, {})


def begin(options, world_size, prepare=nothing, should_leave=never):
    """Starts the training in `world_size` processes."""
    loop = functools.partial(tokenizer_loop.tokenizer_worker, inputs=inputs_for(options))
    return start(options, world_size, functools.partial(without_ray, prepare), should_leave, loop)


def train(options, world_size, prepare=nothing, should_leave=never):
    """Trains to the end and returns the latest commit; raises what a worker raised. One rank trains in this process."""
    if world_size == 1:
        with _group_of_one(), _restored(tokenizer_loop, tokenizer_loop.TokenizerStage, FirstStageTrainer, training_run):
            without_ray(prepare)
            tokenizer_loop.tokenizer_worker(options, 1, should_leave, inputs=inputs_for(options))
    else:
        processes = begin(options, world_size, prepare, should_leave)
        while not processes.join():
            pass
    return checkpoints.latest_commit(training_path(options.tokenizer.path))


@contextmanager
def _group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _restored(*owners):
    """Undoes what is set on modules or classes meanwhile."""
    before = [dict(vars(owner)) for owner in owners]
    try:
        yield
    finally:
        for owner, values in zip(owners, before):
            for name, value in values.items():
                if vars(owner)[name] is not value:
                    setattr(owner, name, value)


def records_of(options, commit):
    """Records of all steps behind a commit."""
    return run_log.read_log(training_path(options.tokenizer.path), commit.content["log"])


def numbers_of(options, commit):
    """What every step behind a commit measured."""
    return [
        {name: value for name, value in record.items() if name not in ("digests", "step", "batch")}
        for record in records_of(options, commit)
    ]
