"""What every conditioning must do. Parametrised over the registry: a new entry is tested without a new test."""

import pytest
import torch

from stages.errors import ConfigError
from stages.second_stage.conditioning import CONDITIONINGS, open_conditioning

HIDDEN_SIZE, NUM_CLASSES, NUM_CODES = 8, 5, 4


@pytest.fixture(params=sorted(CONDITIONINGS))
def conditioning(request):
    torch.manual_seed(0)
    return open_conditioning(request.param, NUM_CLASSES, HIDDEN_SIZE, NUM_CODES if request.param == "codes" else 1)


def labels_of(conditioning, *labels):
    """One label per image, or as many codes."""
    labels_B = torch.tensor(labels)
    return labels_B if conditioning.num_prefix_tokens == 1 else labels_B[:, None].repeat(1, NUM_CODES)


def test_prefix_has_the_promised_shape(conditioning):
    prefix = conditioning(labels_of(conditioning, 0, 4, -1))
    assert prefix.shape == (3, conditioning.num_prefix_tokens, HIDDEN_SIZE)


def test_null_has_the_labels_shape_and_ignores_them(conditioning):
    labels = labels_of(conditioning, 0, 4, -1)
    null = conditioning.null(labels)
    assert null.shape == labels.shape and null.dtype == torch.int64
    prefix = conditioning(null)
    assert torch.equal(prefix[0], prefix[1]) and torch.equal(prefix[0], prefix[2])


def test_labels_matter_exactly_when_conditional(conditioning):
    prefix = conditioning(labels_of(conditioning, 0, 1, -1))
    differs = not torch.equal(prefix[0], prefix[1]) and not torch.equal(prefix[0], prefix[2])
    assert differs == conditioning.is_conditional


def test_rows_do_not_see_each_other(conditioning):
    together = conditioning(labels_of(conditioning, 3, 0))
    assert torch.equal(together[0], conditioning(labels_of(conditioning, 3))[0])


def test_learns(conditioning):
    conditioning(labels_of(conditioning, 0, 1)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in conditioning.parameters())


def test_a_class_of_ones_own_is_opened_by_its_path():
    opened = open_conditioning("stages.second_stage.conditioning:NoConditioning", 0, HIDDEN_SIZE)
    assert opened.num_prefix_tokens == 1


def test_unknown_names_are_refused_with_the_allowed_ones():
    with pytest.raises(ConfigError, match="conditioning.name is text, but it must be one of: class, codes, none"):
        open_conditioning("text", 0, HIDDEN_SIZE)
