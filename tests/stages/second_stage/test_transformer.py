"""The transformer: causality, cache, conditioning, parameter bookkeeping."""

import dataclasses
import math

import pytest
import torch

from stages.errors import ConfigError
from stages.options import ConditioningOptions, ModelOptions
from stages.second_stage.conditioning import ClassConditioning, Conditioning
from stages.second_stage.operations import rotate
from stages.second_stage.transformer import (
    KVCache,
    Transformer,
    matrix_sizes,
    nll,
    num_parameters,
    other_sizes,
    parameter_groups,
    prefix_stride,
    rope_angles,
    rotations,
    transformer_config,
)

OPTIONS = ModelOptions(num_layers=2, hidden_size=32, num_heads=2)
GPT_2 = {"norm": "layer", "ffn": "gelu", "positions": "learned", "bias": True, "qk_norm": False}


def build(conditioning="class", **changes):
    torch.manual_seed(0)
    config = transformer_config(
        dataclasses.replace(OPTIONS, **changes),
        ConditioningOptions(name=conditioning),
        codebook_size=16,
        grid=(3, 4),
        num_classes=5,
    )
    model = Transformer(config)
    torch.nn.init.normal_(model.head.weight)  # the shipped initialisation is zero, which would hide everything
    return model.eval()


@pytest.fixture(params=["class", "none"])
def model(request):
    return build(request.param)


def codes_and_labels(batch=3):
    return torch.randint(0, 16, (batch, 12)), torch.tensor([0, 4, -1])[:batch]


def test_first_loss_is_that_of_a_uniform_guess():
    config = transformer_config(OPTIONS, ConditioningOptions(), codebook_size=16, grid=(3, 4), num_classes=5)
    codes, labels = codes_and_labels()
    losses = nll(Transformer(config)(codes, labels), codes)
    torch.testing.assert_close(losses, torch.full((3,), 12 * math.log(16)))


def test_logits_depend_on_earlier_codes_only(model):
    codes, labels = codes_and_labels()
    changed = codes.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 16
    before, after = model(codes, labels), model(changed, labels)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(dim=(0, 2)).min() > 1e-6


def test_cached_steps_equal_the_whole_sequence(model):
    codes, labels = codes_and_labels()
    cache = KVCache(model.config, 3, 12, torch.float32, "cpu")
    logits = [model.prefill(labels, cache)] + [model.step(codes[:, i], cache) for i in range(11)]
    torch.testing.assert_close(torch.stack(logits, 1), model(codes, labels), atol=1e-5, rtol=1e-5)


def test_class_changes_the_logits_and_null_is_a_class_of_its_own():
    model = build("class")
    codes = torch.randint(0, 16, (1, 12)).expand(6, 12)
    logits = model(codes, torch.tensor([0, 1, 2, 3, 4, -1]))
    assert len({tuple(row.flatten()[:4].tolist()) for row in logits}) == 6


def test_unconditional_ignores_labels():
    model = build("none")
    codes = torch.randint(0, 16, (1, 12)).expand(3, 12)
    logits = model(codes, torch.tensor([0, 4, -1]))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("conditioning", ["class", "none"])
@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": False}, {"ffn_size": 48}, GPT_2, {"bias": True}, {"norm": "layer"}]
)
def test_parameters_are_counted_without_building(conditioning, changes):
    model = build(conditioning, **changes)
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_only_linear_matrices_decay(model):
    decayed, kept = parameter_groups(model, 0.1)
    linears = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert {id(p) for p in decayed["params"]} == linears
    assert decayed["weight_decay"] == 0.1 and kept["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    angles = rope_angles((4, 4), 1, 8, 100.0)
    assert torch.equal(angles[0], torch.zeros(4)), "the prefix does not turn"
    q, k = torch.randn(8), torch.randn(8)

    def score(i, j):
        turned = [rotate(x[None, None, None], angles[1 + p].cos(), angles[1 + p].sin()) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(0, 5), score(10, 15))  # one row and one column apart, both times
    torch.testing.assert_close(score(1, 2), score(13, 14))
    assert not torch.isclose(score(0, 1), score(0, 4)), "a step right is not a step down"
    torch.testing.assert_close(rotate(q[None, None, None], angles[7].cos(), angles[7].sin()).norm(), q.norm())


@pytest.mark.parametrize("condition,stride", [((4, 6), 1.0), ((2, 3), 2.0), ((8, 12), 0.5)])
def test_codes_of_a_condition_turn_like_the_cells_that_they_cover(condition, stride):
    num_tokens = condition[0] * condition[1]
    assert prefix_stride((4, 6), num_tokens) == stride
    angles = rope_angles((4, 6), num_tokens, 8, 100.0)
    prefix, codes = angles[:num_tokens].view(*condition, 4), angles[num_tokens:].view(4, 6, 4)
    assert torch.equal(codes, rope_angles((4, 6), 1, 8, 100.0)[1:].view(4, 6, 4))
    if stride == 2.0:  # the middle of four cells
        codes = codes.view(2, 2, 3, 2, 4).mean((1, 3))
    if stride == 0.5:  # the middle of four tokens
        prefix = prefix.view(4, 2, 6, 2, 4).mean((1, 3))
    torch.testing.assert_close(prefix, codes)


def test_a_condition_that_does_not_lie_on_the_grid_needs_learned_positions():
    sizes = dict(codebook_size=16, grid=(4, 4), num_classes=9)
    conditioning = ConditioningOptions(name="codes", num_tokens=8)
    with pytest.raises(ConfigError, match="codes with 8 tokens per image.* grid of 4 x 4 codes.*model.positions=learned"):
        transformer_config(OPTIONS, conditioning, **sizes)
    learned = dataclasses.replace(OPTIONS, positions="learned")
    assert transformer_config(learned, conditioning, **sizes).num_positions == 8 + 15


class FourTokens(ClassConditioning):
    """A conditioning of a user's own."""

    num_prefix_tokens = 4

    def __init__(self, num_classes, hidden_size):
        super().__init__(num_classes, 4 * hidden_size)

    def forward(self, labels_B):
        return super().forward(labels_B).view(len(labels_B), 4, -1)


class TokensOfTheModule(FourTokens):
    """Its class says one token, its modules say four."""

    num_prefix_tokens = 1

    def __init__(self, num_classes, hidden_size):
        super().__init__(num_classes, hidden_size)
        self.num_prefix_tokens = 4


class TokensOfAProperty(FourTokens):
    """Nobody can ask the class."""

    @property
    def num_prefix_tokens(self):
        return 4


def config_of(conditioning, **changes):
    given = ConditioningOptions(name=conditioning, **changes)
    return transformer_config(OPTIONS, given, codebook_size=16, grid=(4, 4), num_classes=5)


@pytest.mark.parametrize("name", ["class", "none", f"{__name__}:FourTokens"])
def test_codes_keep_their_places_behind_any_condition(name):
    config = config_of(name)
    model, (cos_TD, _) = Transformer(config), rotations(config, torch.float32, torch.device("cpu"))
    first_code = model.conditioning.num_prefix_tokens
    alone, _ = rotations(config_of("none"), torch.float32, torch.device("cpu"))
    assert torch.equal(cos_TD[first_code:], alone[1:])
    assert model(torch.zeros(2, 16, dtype=torch.long), torch.tensor([0, -1])).shape == (2, 16, 16)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())


def test_a_number_of_tokens_that_only_the_module_knows_is_refused():
    with pytest.raises(ConfigError, match="Make it an attribute of the class"):
        config_of(f"{__name__}:TokensOfAProperty")


@pytest.mark.parametrize("name, num_tokens", [("class", 1), ("none", 1), (f"{__name__}:FourTokens", 4)])
def test_the_number_of_tokens_is_that_of_the_condition(name, num_tokens):
    assert config_of(name, num_tokens=num_tokens) == config_of(name)
    with pytest.raises(ConfigError, match=f"conditioning.num_tokens is 16, but conditioning.name={name} has {num_tokens} per image"):
        config_of(name, num_tokens=16)


def test_a_module_with_other_tokens_than_its_class_says_is_refused():
    with pytest.raises(ConfigError, match="TokensOfTheModule with 4 tokens per image, but positions are laid out for 1"):
        Transformer(config_of(f"{__name__}:TokensOfTheModule"))


def test_learns_to_repeat_a_condition_of_codes():
    torch.manual_seed(0)
    conditioning = ConditioningOptions(name="codes", num_tokens=16)
    model = Transformer(transformer_config(OPTIONS, conditioning, codebook_size=8, grid=(4, 4), num_classes=8)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    for _ in range(150):
        codes = torch.randint(8, (32, 16))
        loss = nll(model(codes, 7 - codes), codes).mean() / 16
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5, "nothing but the condition tells the codes"


def test_dropout_acts_in_training_only():
    model = build(residual_dropout=0.5, embedding_dropout=0.5)
    codes, labels = codes_and_labels()
    assert torch.equal(model(codes, labels), model(codes, labels))
    model.train()
    assert not torch.equal(model(codes, labels), model(codes, labels))


def test_learns_to_repeat_the_class():
    model = build().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-2)
    labels = torch.arange(5)
    codes = labels[:, None].expand(5, 12).contiguous()
    for _ in range(60):
        loss = nll(model(codes, labels), codes).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0


@pytest.mark.parametrize("positions", ["rope", "rope-zero-prefix", "learned"])
def test_a_model_that_was_sampled_from_can_be_trained(positions):
    rotations.cache_clear()
    model, (codes, labels) = build(positions=positions), codes_and_labels()
    with torch.inference_mode():
        model(codes, labels)
    nll(model.train()(codes, labels), codes).mean().backward()
    assert model.head.weight.grad.abs().sum() > 0


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="model.hidden_size is 36.*Use 40"):
        transformer_config(
            dataclasses.replace(OPTIONS, hidden_size=36),
            ConditioningOptions(),
            codebook_size=16,
            grid=(2, 2),
            num_classes=0,
        )


def test_class_conditioning_needs_classes():
    config = transformer_config(
        OPTIONS, ConditioningOptions(name="class"), codebook_size=16, grid=(2, 2), num_classes=0
    )
    with pytest.raises(ConfigError, match="conditioning.name is class"):
        Transformer(config)


class Prepared(Conditioning):
    """A user's own, with weights that it brings along."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(torch.full((num_classes + 1, hidden_size), 7.0))
        self.map = torch.nn.Linear(hidden_size, hidden_size, bias=False)
        torch.nn.init.eye_(self.map.weight)

    def forward(self, labels_B):
        return self.map(self.embedding(torch.where(labels_B < 0, len(self.embedding.weight) - 1, labels_B)))[:, None]


def test_a_conditioning_of_the_users_own_keeps_its_weights():
    conditioning = ConditioningOptions(name=f"{__name__}:Prepared")
    model = ModelOptions(num_layers=1, hidden_size=32, num_heads=2)
    config = transformer_config(model, conditioning, codebook_size=16, grid=(2, 4), num_classes=3)
    transformer = Transformer(config)
    assert (transformer.conditioning.embedding.weight == 7).all()
    assert torch.equal(transformer.conditioning.map.weight, torch.eye(32))
    assert 0 < transformer.code_embedding.weight.std() < 0.03
    decayed, others = ([p.numel() for p in group["params"]] for group in parameter_groups(transformer, 0.1))
    assert sorted(matrix_sizes(config)) == sorted(decayed)
    assert sorted(other_sizes(config)) == sorted([*others, 4 * 32])  # the frozen table is in no group
    assert num_parameters(config) == sum(p.numel() for p in transformer.parameters())
