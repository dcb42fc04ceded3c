"""Memorisation over codes: the largest share of a sample's codes that one row of the training data has in the same places.

A share counts exactly what was copied, where a distance between features also falls for images that merely look alike. It is
found by comparing everything with everything.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from evaluation.estimates import Estimate, fair_choice, mean_estimate
from evaluation.neighbour_metrics import share_beyond
from pipeline.code_dataset import CodeDataset
from stages.errors import ArtefactError

BLOCK_ROWS = 64  # training rows that stay in a core's nearest cache while all samples are compared with them


@dataclass(frozen=True, kw_only=True)
class TrainingCodes:
    """A code dataset that samples are compared with: its folder, and the root hash of the version that is meant."""

    path: str
    root_hash: str

    def choose(self, limit: int) -> np.ndarray:
        """Codes uint16 (m, L) of at most `limit` rows, a fair choice of all.

        Raises:
            ArtefactError: a file is missing or damaged, or another version has been published.
        """
        dataset = CodeDataset.open(self.path, verify=False)
        if dataset.root_hash != self.root_hash:
            raise ArtefactError(
                f"codes.path is {self.path}, which now has root hash {dataset.root_hash}, but this evaluation began with "
                f"{self.root_hash}. Evaluate again."
            )
        return dataset.codes(np.flatnonzero(fair_choice(dataset.num_rows, limit)))


def largest_shares(codes_NL: np.ndarray, training_ML: np.ndarray) -> np.ndarray:
    """Of each row the largest share of its codes that any one training row has in the same places, float64 (N,) in [0, 1].

    Args:
        codes_NL: integers; L is at most 65535.
        training_ML: of the same type, M at least 1. uint16 is fastest.
    """
    assert codes_NL.dtype == training_ML.dtype and len(training_ML) and codes_NL.shape[1] <= np.iinfo(np.uint16).max
    # Contiguous rows, which the kernel compares many codes at a time.
    most = _most_equal(np.ascontiguousarray(codes_NL), np.ascontiguousarray(training_ML))
    return most / codes_NL.shape[1]


@njit(nogil=True, cache=True)
def _most_equal(codes_NL: np.ndarray, training_ML: np.ndarray) -> np.ndarray:
    """Of each row the largest number of codes equal to those of a training row, uint16 (N,)."""
    most = np.zeros(len(codes_NL), np.uint16)
    for start in range(0, len(training_ML), BLOCK_ROWS):
        block = training_ML[start : start + BLOCK_ROWS]
        for i in range(len(codes_NL)):
            for row in range(len(block)):
                # Counted in sixteen bits: the wider the counter, the fewer codes fit a register.
                count = np.uint16(0)
                for position in range(codes_NL.shape[1]):
                    count = np.uint16(count + np.uint16(codes_NL[i, position] == block[row, position]))
                most[i] = max(most[i], count)
    return most


def code_match_estimates(
    samples_NL: np.ndarray, holdout_ML: np.ndarray, training_KL: np.ndarray
) -> dict[str, Estimate]:
    """Memorisation over codes, under the names in records.

    nearest_training_codes and nearest_training_codes_holdout: mean over samples, and over held-out images, of the largest
    share of codes equal to those of a training row, in [0, 1]. copied_code_share: share of samples with a larger one than
    99 % of the held-out images, in [0, 1]; without memorisation about 0.01, less where many images have equal shares.

    Args:
        samples_NL, holdout_ML, training_KL: codes of one integer type.
    """
    samples, holdout = (largest_shares(codes, training_KL) for codes in (samples_NL, holdout_ML))
    return {
        "nearest_training_codes": mean_estimate(samples),
        "nearest_training_codes_holdout": mean_estimate(holdout),
        "copied_code_share": share_beyond(samples, holdout),
    }
