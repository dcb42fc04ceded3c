"""Values with error bars."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.errors import ConfigError
from stages.options import EvaluationOptions


@dataclass(frozen=True)
class Estimate:
    """A measured value.

    Attributes:
        value: the plain estimate.
        num_samples: images behind it. Part of the meaning: a Fréchet distance falls as it grows.
        standard_error: one standard deviation over repeated draws of those images; None where none is defined.
        bias_corrected: the value with its bias of order 1 / num_samples removed; None where there is no such bias.
        features: `EXTRACTOR/OUTPUT` it was measured on; None where it was none.
        block_means: of a mean over images that are the same for every model, the mean of each block of them; else None.
    """

    value: float
    num_samples: int
    standard_error: float | None = None
    bias_corrected: float | None = None
    features: str | None = None
    block_means: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields of a record; those after num_samples only where there are any."""
        content: dict[str, Any] = {
            "value": self.value,
            "standard_error": self.standard_error,
            "num_samples": self.num_samples,
        }
        optional = {"bias_corrected": self.bias_corrected, "features": self.features, "block_means": self.block_means}
        return content | {name: value for name, value in optional.items() if value is not None}


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean of one number per image (n,) with the usual standard error; None of it for a single image."""
    n = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else None
    return Estimate(float(np.mean(values)), n, error)


def blocked_mean(values: np.ndarray, blocks: np.ndarray, num_blocks: int) -> Estimate:
    """`mean_estimate` of numbers (n,) of images that are the same for every model, with the mean of each of their blocks, int64 (n,);
    without these where there is one block, or an empty one."""
    counts = np.bincount(blocks, minlength=num_blocks)
    if num_blocks == 1 or not counts.all():
        return mean_estimate(values)
    means = np.bincount(blocks, values, num_blocks) / counts
    return dataclasses.replace(mean_estimate(values), block_means=means.tolist())


def jackknife(
    value: float, without_block: Sequence[float], num_samples: int, without_pair: Sequence[float] = ()
) -> Estimate:
    """Delete-block jackknife over K blocks of equal size (Quenouille 1949, Tukey 1958); no error bar for one block.

    The jackknife counts the variance that comes from pairs of images, as in a squared mean, twice. Where that matters,
    the statistic without pairs of blocks tells how much it is (Efron and Stein 1981, section 5).

    Args:
        value: the statistic over all images.
        without_block: the statistic over all images but those of block k, for each k.
        num_samples: images behind `value`.
        without_pair: the same without blocks 0 and 1, 2 and 3 …, for which K must be at least 3.
    """
    k = len(without_block)
    if k < 2:
        return Estimate(value, num_samples)
    mean = float(np.mean(without_block))
    variance = (k - 1) / k * float(np.sum((np.asarray(without_block) - mean) ** 2))
    if len(without_pair):
        first, second = (np.asarray(without_block)[i :: 2][: len(without_pair)] for i in (0, 1))
        interactions = k * value - (k - 1) * (first + second) + (k - 2) * np.asarray(without_pair)
        # At most half of it can be from pairs.
        variance = max(variance - float(np.mean(interactions**2)) / (2 * (1 + 2 / k)), variance / 2)
    return Estimate(value, num_samples, float(np.sqrt(variance)), k * value - (k - 1) * mean)


def check_num_samples(options: EvaluationOptions) -> None:
    """Refuses with ConfigError fewer samples than error bars need."""
    if options.num_samples < 2 * options.num_blocks:
        raise ConfigError(
            f"evaluation.num_samples is {options.num_samples}, but the error bars need two per block of evaluation.num_blocks "
            f"({options.num_blocks}). Raise it to {2 * options.num_blocks}."
        )


def assign_blocks(num_images: int, num_blocks: int) -> np.ndarray:
    """The block of each image, int64 (num_images,), sizes equal to within one.

    A fixed pseudo-random assignment: neither images sorted by class nor labels that come in turn can line up with the
    blocks.
    """
    keys = np.random.Philox(key=num_images).random_raw(num_images)
    blocks = np.empty(num_images, dtype=np.int64)
    blocks[np.argsort(keys, kind="stable")] = np.arange(num_images) % num_blocks
    return blocks


def fair_choice(num_images: int, limit: int) -> np.ndarray:
    """Which of so many images are taken, bool (num_images,), where only `limit` can be: a fixed pseudo-random choice."""
    if num_images <= limit:
        return np.ones(num_images, dtype=bool)
    chosen = np.zeros(num_images, dtype=bool)
    keys = np.random.Philox(key=num_images, counter=1).random_raw(num_images)
    chosen[np.argsort(keys, kind="stable")[:limit]] = True
    return chosen


def leave_one_out(statistic: Callable[[np.ndarray], float], counts: np.ndarray, num_samples: int) -> Estimate:
    """Jackknife of a statistic of histograms: `counts` int64 (K, V), one histogram per block."""
    total = counts.sum(axis=0)
    return jackknife(statistic(total), [statistic(total - block) for block in counts], num_samples)


def perplexity(counts: np.ndarray) -> float:
    """exp of the entropy of a histogram (V,): the number of equally used codes with the same entropy."""
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def usage(counts: np.ndarray) -> float:
    """Share of the entries of a histogram (V,) that occur at all."""
    return float(np.mean(counts > 0))
