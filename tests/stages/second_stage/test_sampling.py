"""Sampling: what is drawn, and that it depends on nothing but weights, options, seed and index."""

import dataclasses

import numpy as np
import pytest
import torch

from stages.errors import ConfigError
from stages.options import ConditioningOptions, ModelOptions, SamplingOptions
from stages.second_stage.sampling import (
    cfg_scale_at,
    draw,
    filter_logits,
    num_drawn_classes,
    sample_codes,
    sample_labels,
    uniforms,
)
from stages.second_stage.transformer import Transformer, transformer_config

OPTIONS = SamplingOptions(group_size=4, cfg_scale=1.5, top_k=12, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformer_config(
        ModelOptions(num_layers=2, hidden_size=32, num_heads=2),
        ConditioningOptions(),
        codebook_size=16,
        grid=(2, 4),
        num_classes=3,
    )
    model = Transformer(config)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def test_samples_do_not_depend_on_how_they_are_asked_for(model):
    whole = sample_codes(model, OPTIONS, 0, 20)
    for pieces in ([(0, 7), (7, 8), (8, 20)], [(i, i + 1) for i in range(20)], [(0, 3), (3, 20)]):
        assert np.array_equal(np.concatenate([sample_codes(model, OPTIONS, a, b) for a, b in pieces]), whole)


def test_seed_and_index_change_the_sample(model):
    first = sample_codes(model, OPTIONS, 0, 6)
    assert len({tuple(row) for row in first}) == 6
    assert not np.array_equal(first, sample_codes(model, dataclasses.replace(OPTIONS, seed=4), 0, 6))


@pytest.mark.parametrize(
    "changes", [{"cfg_scale": 1.0}, {"cfg_schedule": "linear"}, {"temperature": 0.5}, {"top_k": None, "top_p": 1.0}]
)
def test_every_option_path_draws_codes_in_range(model, changes):
    codes = sample_codes(model, dataclasses.replace(OPTIONS, **changes), 0, 8)
    assert codes.shape == (8, 8) and codes.min() >= 0 and codes.max() < 16


def test_guidance_scale_one_is_no_guidance(model):
    unguided = sample_codes(model, dataclasses.replace(OPTIONS, cfg_scale=1.0), 0, 8)
    nearly = sample_codes(model, dataclasses.replace(OPTIONS, cfg_scale=1.0 + 1e-9), 0, 8)
    assert np.array_equal(unguided, nearly)


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20000, 4)
    u = torch.from_numpy(uniforms(0, np.arange(20000), 0))
    codes = draw(logits, u, SamplingOptions())
    frequencies = torch.bincount(codes, minlength=4) / 20000
    torch.testing.assert_close(frequencies, logits[0].softmax(0), atol=0.01, rtol=0)
    assert frequencies[3] == 0


@pytest.mark.parametrize("u, expected", [(0.0, 1), (1 - 2**-53, 2)])
def test_extreme_uniforms_never_draw_an_excluded_code(u, expected):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert draw(logits, torch.tensor([u], dtype=torch.float64), SamplingOptions()).item() == expected


def test_uniforms_are_uniform_and_independent_of_their_company():
    u = uniforms(7, np.arange(100_000), 3)
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(np.var(u) - 1 / 12) < 0.002
    assert abs(np.corrcoef(u, uniforms(7, np.arange(100_000), 4))[0, 1]) < 0.01
    assert uniforms(7, np.array([42]), 3)[0] == u[42]


def test_top_k_keeps_ties():
    kept = filter_logits(torch.tensor([[3.0, 2.0, 2.0, 1.0]]), 2, 1.0)
    assert kept.isfinite().tolist() == [[True, True, True, False]]


def test_top_p_keeps_the_code_that_crosses_and_works_without_top_k():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert filter_logits(logits, None, 0.5).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, None, 0.6).isfinite().tolist() == [[True, True, False, False]]
    assert filter_logits(logits.flip(-1), None, 0.9).isfinite().tolist() == [[False, True, True, True]]
    assert filter_logits(logits, None, 1e-9).isfinite().sum() == 1


@pytest.mark.parametrize("schedule", ["constant", "linear", "power-cosine"])
def test_guidance_schedules(schedule):
    options = SamplingOptions(cfg_scale=3.0, cfg_schedule=schedule)
    scales = [cfg_scale_at(options, position, 10) for position in range(10)]
    assert scales[-1] == pytest.approx(3.0) and scales == sorted(scales)
    assert scales[0] == pytest.approx(3.0 if schedule == "constant" else 1.0)


def test_labels_are_balanced_and_fixed_by_index():
    assert sample_labels(SamplingOptions(), np.arange(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert sample_labels(SamplingOptions(labels=(5, 9)), np.arange(3, 6), 10).tolist() == [9, 5, 9]
    assert sample_labels(SamplingOptions(), np.arange(2), 0).tolist() == [-1, -1]


@pytest.mark.parametrize("labels", [(), (3,), (0, 3), (-1,)])
def test_classes_that_the_model_does_not_know_are_refused(model, labels):
    with pytest.raises(ConfigError, match=r"sampling.labels is \[.*\], but it must name some of the classes 0 to 2. Correct it"):
        sample_codes(model, dataclasses.replace(OPTIONS, labels=labels), 0, 4)
    with pytest.raises(ConfigError, match="knows no classes"):
        sample_labels(SamplingOptions(labels=labels), np.arange(2), 0)


def test_a_model_without_a_condition_draws_no_classes():
    torch.manual_seed(0)
    options = ModelOptions(num_layers=1, hidden_size=32, num_heads=2)
    config = transformer_config(options, ConditioningOptions(name="none"), codebook_size=16, grid=(2, 4), num_classes=3)
    model = Transformer(config).eval()
    assert num_drawn_classes(model) == 0
    with pytest.raises(ConfigError, match="knows no classes"):
        sample_codes(model, dataclasses.replace(OPTIONS, labels=(1,)), 0, 4)
