import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from evaluation.frechet import Reference, frechet_distance
from evaluation.gaussian_metric import FOLD_ROWS, FrechetDistance, GaussianMetric
from evaluation.set_metric import ReferenceSet
from evaluation.statistics import GaussianStatistics, merge_all


class MeanPool(torch.nn.Module):
    """A fixed linear map of pixels to 12 features, for both our metric and torchmetrics'."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(3 * 8 * 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().flatten(1) @ self.weight / 100


def features(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 12)) @ np.diag(np.linspace(0.2, 2.0, 12)) + shift


@pytest.fixture(scope="module")
def reference() -> ReferenceSet:
    return ReferenceSet(Reference.of(GaussianStatistics.of(features(500, seed=2))))


def distance(reference: ReferenceSet, **options) -> FrechetDistance:
    return FrechetDistance(12, reference=reference, **options)


def test_equals_torchmetrics_on_the_same_extractor():
    generator = torch.Generator().manual_seed(3)
    real = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    fake = torch.randint(20, 230, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    theirs = FrechetInceptionDistance(feature=MeanPool(), input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = distance(ReferenceSet(Reference.of(GaussianStatistics.of(MeanPool()(real).numpy()))))
    ours.update(MeanPool()(fake))
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize("num_shards", [1, 3, 8])
def test_shards_give_the_statistics_of_the_whole(num_shards):
    values = torch.from_numpy(features(3 * FOLD_ROWS + 100, seed=1, shift=0.5))
    first, *rest = (GaussianMetric(12) for _ in range(num_shards))
    for metric, shard in zip([first, *rest], values.tensor_split(num_shards), strict=True):
        metric.update(shard)
    for metric in rest:
        first.merge_state(metric)
    (found,), whole = first.statistics(), GaussianStatistics.of(values.numpy())
    assert found.n == whole.n
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


def test_the_same_rows_give_the_same_bits_however_they_are_cut():
    values, blocks = torch.from_numpy(features(4 * FOLD_ROWS, seed=1)).float(), torch.arange(4 * FOLD_ROWS) % 3
    found = []
    for size in (32, 700, 4 * FOLD_ROWS):
        metric = GaussianMetric(12, num_blocks=3)
        for start in range(0, len(values), size):
            metric.update(values[start : start + size], blocks[start : start + size])
        found.append([s.m2.tobytes() + s.mean.tobytes() for s in metric.statistics()])
    assert found[0] == found[1] == found[2]
    assert merge_all(metric.statistics()).n == len(values)


def test_state_survives_saving_and_reset(reference):
    metric = distance(reference)
    metric.update(torch.from_numpy(features(FOLD_ROWS + 30, seed=1)))
    restored = distance(reference)
    restored.load_state_dict(metric.state_dict())
    assert restored.statistics()[0].n == FOLD_ROWS + 30
    assert restored.compute() == metric.compute()
    metric.reset()
    assert metric.statistics()[0].n == 0


def test_reduces_over_processes_like_torchmetrics_does(reference):
    values = torch.from_numpy(features(4 * FOLD_ROWS + 100, seed=1))
    shards = [distance(reference) for _ in range(4)]
    for metric, shard in zip(shards, values.tensor_split(4), strict=True):
        metric.update(shard)
    gathered = {"moments": [m.moments for m in shards], "rows": [torch.cat(m.rows) for m in shards]}
    gathered["row_blocks"] = [torch.cat(m.row_blocks) for m in shards]

    def gather(tensor: torch.Tensor, group: object) -> list[torch.Tensor]:
        name = "moments" if tensor.dtype == torch.float64 and tensor.ndim == 3 else "rows"
        return gathered[name if tensor.is_floating_point() else "row_blocks"]

    synced = distance(reference, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    synced.update(values[: len(values) // 4])
    expected = frechet_distance(GaussianStatistics.of(values.numpy()), reference.gaussian)
    assert float(synced.compute()) == pytest.approx(expected, rel=1e-12)
