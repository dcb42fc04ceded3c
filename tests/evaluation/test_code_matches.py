import numpy as np
import pytest
from code_dataset_support import Recipe
from hypothesis import given
from hypothesis import strategies as st

from evaluation.code_matches import BLOCK_ROWS, TrainingCodes, code_match_estimates, largest_shares
from pipeline.code_dataset import CodeDataset
from stages.errors import ArtefactError


def codes(n: int, seed: int, num_codes: int = 64, codebook_size: int = 20, dtype=np.uint16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, codebook_size, (n, num_codes)).astype(dtype)


def textbook(codes_NL: np.ndarray, training_ML: np.ndarray) -> np.ndarray:
    return (codes_NL[:, None] == training_ML).mean(axis=2).max(axis=1)


@given(
    num_rows=st.integers(1, 2 * BLOCK_ROWS + 3),
    num_codes=st.integers(1, 70),
    codebook_size=st.integers(1, 1 << 16),
    dtype=st.sampled_from([np.uint16, np.int32]),
    seed=st.integers(0, 1000),
)
def test_equal_the_definition(num_rows, num_codes, codebook_size, dtype, seed):
    training = codes(num_rows, seed, num_codes, codebook_size, dtype)
    samples = codes(5, seed + 1, num_codes, codebook_size, dtype)
    samples[2, ::2] = training[-1, ::2]
    np.testing.assert_array_equal(largest_shares(samples, training), textbook(samples, training))


def test_rows_that_are_not_contiguous_are_compared_too():
    wide = codes(2 * BLOCK_ROWS, seed=0, num_codes=12)
    np.testing.assert_array_equal(largest_shares(wide[::3, 2:9], wide[:, 2:9]), 1.0)


def test_copies_of_training_rows_show_and_fresh_codes_do_not():
    training, holdout, fresh = codes(300, 0), codes(200, 1), codes(150, 2)
    copies = training[:50].copy()
    copies[:, :16] = codes(50, 3, 16)  # three quarters of a row, the rest is new
    found = code_match_estimates(np.concatenate([fresh, copies]), holdout, training)
    assert set(found) == {"nearest_training_codes", "nearest_training_codes_holdout", "copied_code_share"}
    assert found["copied_code_share"].value == pytest.approx(50 / 200, abs=0.02)
    shares = textbook(np.concatenate([fresh, copies]), training)
    assert found["nearest_training_codes"].value == pytest.approx(shares.mean())
    assert found["nearest_training_codes"].standard_error == pytest.approx(shares.std(ddof=1) / np.sqrt(200))
    assert found["nearest_training_codes_holdout"].value == pytest.approx(textbook(holdout, training).mean())
    assert all(estimate.num_samples == 200 and estimate.standard_error > 0 for estimate in found.values())
    assert code_match_estimates(fresh, holdout, training)["copied_code_share"].value < 0.03


def test_training_codes_are_a_choice_over_all_rows_of_the_dataset(tmp_path):
    root = Recipe(num_images=40).write(tmp_path)
    dataset = CodeDataset.open(root, verify=False)
    training = TrainingCodes(path=root, root_hash=dataset.root_hash)
    everything = dataset.codes(np.arange(dataset.num_rows))
    np.testing.assert_array_equal(training.choose(1000), everything)
    chosen = training.choose(30)
    assert chosen.shape == (30, dataset.num_codes) and chosen.dtype == np.uint16
    known = {row.tobytes(): place for place, row in enumerate(everything)}
    places = [known[row.tobytes()] for row in chosen]
    assert places == sorted(places) and places[-1] - places[0] > dataset.num_rows // 2
    np.testing.assert_array_equal(training.choose(30), chosen)


def test_another_version_of_the_dataset_is_refused(tmp_path):
    training = TrainingCodes(path=Recipe().write(tmp_path), root_hash="0" * 64)
    with pytest.raises(
        ArtefactError, match="codes.path is .* which now has root hash .* but this evaluation began with 0{64}"
    ):
        training.choose(10)
