"""Streaming training images with real Ray Data: the same steps from any start, for any ranks, and faults come through."""

import numpy as np
import pytest
import ray

from pipeline import image_loader
from pipeline.image_loader import ImageLoader
from pipeline.image_order import ImageOrder, list_hash
from pipeline.image_reader import ImageReader
from pipeline.order import rows_digest
from pipeline.sources import open_source
from stages.errors import ConfigError
from stages.options import ImageOptions, SourceOptions, TokenizerOptions, TokenizerTrainOptions

pytestmark = pytest.mark.ray
IMAGES = ImageOptions(size=8)


def loader(rank=0, world_size=1, **tokenizer):
    source = open_source(SourceOptions(name="scenes", num_images=20), IMAGES)
    table = source.list_images("train").select(["uri", "image_id"])
    order = ImageOrder(list_hash=list_hash(table), num_images=20, seed=0, global_batch_size=8)
    reader = ImageReader(source, order, IMAGES, TokenizerOptions(**tokenizer), TokenizerTrainOptions(min_crop=0.5))
    made = ImageLoader(reader, ray.put(table), rank=rank, world_size=world_size, cpus_per_rank=0.1)
    return made, reader, table


def test_steps_come_in_order_across_tasks_and_datasets(ray_cluster, monkeypatch):
    monkeypatch.setattr(image_loader, "IMAGES_PER_TASK", 16)  # two steps a task
    monkeypatch.setattr(image_loader, "STEPS_PER_DATASET", 5)
    images, reader, table = loader()
    steps = list(images.iterate(2, 14, skipped=((4, 6),)))
    assert [step.step for step in steps] == list(range(2, 14))
    assert [step.batch for step in steps] == [2, 3, *range(6, 16)]
    for step in steps:
        rows, pixels = reader.read_step(step.step, slice(0, 8), ((4, 6),), table)
        assert np.array_equal(step.pixels, pixels)
        assert step.digest == rows_digest(step.batch, np.arange(8), rows)


def test_ranks_share_a_batch_and_any_step_can_be_the_first(ray_cluster):
    whole = list(loader()[0].iterate(0, 4))
    parts = [list(loader(rank, 2)[0].iterate(2, 4)) for rank in range(2)]
    for one, a, b in zip(whole[2:], *parts):
        assert np.array_equal(one.pixels, np.concatenate([a.pixels, b.pixels]))
        assert (a.digest + b.digest) % 2**64 == one.digest


def test_a_reader_that_stops_early_leaves_nothing_behind(ray_cluster):
    steps = loader()[0].iterate(0, 1000)
    assert next(steps).step == 0
    steps.close()
    assert next(loader()[0].iterate(7, 9)).step == 7


def test_a_users_error_comes_through(ray_cluster):
    images, _, _ = loader(input="segmentation", num_labels=2)
    with pytest.raises(ConfigError, match="num_labels"):
        list(images.iterate(0, 2))
