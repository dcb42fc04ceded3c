"""AdamW is torch's, and its average is the textbook's."""

import torch

from stages.second_stage.optimizer import WEIGHT_AVERAGE, AveragingAdamW


def steps(optimizer, weight, count):
    seen = []
    for step in range(count):
        weight.grad = torch.full_like(weight, float(step + 1))
        optimizer.step()
        seen.append(weight.detach().clone())
    return seen


def test_the_average_follows_the_weights():
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = AveragingAdamW([weight], average_decay=0.9, lr=0.1)
    seen = steps(optimizer, weight, 120)
    average = seen[0]
    for number, weights in enumerate(seen[1:], start=2):
        decay = min(0.9, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * weights
    torch.testing.assert_close(optimizer.state[weight][WEIGHT_AVERAGE], average)


def test_without_an_average_it_is_adamw():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizer = AveragingAdamW([ours], average_decay=0.0, lr=0.1, weight_decay=0.2)
    steps(optimizer, ours, 5)
    steps(torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.2, fused=True), theirs, 5)
    assert torch.equal(ours, theirs)
    assert WEIGHT_AVERAGE not in optimizer.state[ours]


def test_the_average_is_saved_and_loaded():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AveragingAdamW([weight], average_decay=0.5, lr=0.1)
    steps(optimizer, weight, 3)
    other = AveragingAdamW([torch.nn.Parameter(torch.ones(3))], average_decay=0.5, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    (state,) = other.state.values()
    assert torch.equal(state[WEIGHT_AVERAGE], optimizer.state[weight][WEIGHT_AVERAGE])
