"""Two processes that train together hold the same codebook, and it is the one that a single process would hold."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from quantizer_support import quantizer_of

from stages.first_stage.quantizers.entropy import binary_entropy_loss
from stages.first_stage.quantizers.ranks import mean_over_ranks, num_ranks

KINDS = ("vq", "vq-l2", "vq-ema")
NUM_STEPS = 3


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(10 * step + rank))


def train(kind, rank):
    """Starts, steps and revives one quantizer; returns its state and the rows that were revived."""
    quantizer = quantizer_of(kind, seed=5 + rank).train()  # ranks that begin apart end together
    quantizer.start(quantizer(batch(rank, 0)).vectors_ND)
    for step in range(NUM_STEPS):
        quantized = quantizer(batch(rank, step))
    rows = quantizer.revive(counts_of(rank), quantized.vectors_ND)
    assert not len(quantizer.revive(torch.ones(16, dtype=torch.int64), quantized.vectors_ND)), "all are in use"
    return dict(quantizer.state_dict()), rows


def counts_of(rank: int) -> torch.Tensor:
    """Each of the first entries is used by one rank alone, the last two by none."""
    counts = torch.zeros(16, dtype=torch.int64)
    counts[:14] = torch.arange(14) % 2 == rank
    return counts


def worker(number, file, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
    outcome = {"num_ranks": num_ranks()} | {kind: train(kind, number) for kind in KINDS}
    logits = batch(number, 0).permute(0, 2, 3, 1).reshape(-1, 4).requires_grad_()
    loss = binary_entropy_loss(logits)
    loss.backward()
    outcome["entropy"] = (loss.detach(), logits.grad)
    outcome["mean"] = mean_over_ranks(torch.full((3,), float(number)))
    torch.save(outcome, f"{results}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder / "rendezvous"), str(folder)), nprocs=2)
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_hold_the_same_codebook(outcomes, kind):
    (first, first_rows), (second, second_rows) = (outcome[kind] for outcome in outcomes)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first_rows.tolist() == second_rows.tolist() == [14, 15], "an entry that one rank uses is alive"


def test_averages_are_those_of_one_process_with_all_vectors(outcomes):
    quantizer = quantizer_of("vq-ema", seed=5).train()
    quantizer.start(quantizer(batch(0, 0)).vectors_ND)
    for step in range(NUM_STEPS):
        quantizer(torch.cat([batch(0, step), batch(1, step)]))
    state = outcomes[0]["vq-ema"][0]
    for name in ("counts_K", "sums_KD", "embedding.weight"):
        torch.testing.assert_close(state[name][:14], quantizer.state_dict()[name][:14])


def test_the_entropy_over_ranks_has_the_gradient_of_one_process(outcomes):
    whole = torch.cat([batch(number, 0).permute(0, 2, 3, 1).reshape(-1, 4) for number in range(2)]).requires_grad_()
    binary_entropy_loss(whole).backward()
    # Data-parallel training averages gradients, which halves each rank's.
    found = torch.cat([outcome["entropy"][1] for outcome in outcomes]) / 2
    torch.testing.assert_close(found, whole.grad)
    assert all(outcome["num_ranks"] == 2 for outcome in outcomes)
    assert all(torch.equal(outcome["mean"], torch.full((3,), 0.5)) for outcome in outcomes)


def test_one_process_passes_through():
    tensor = torch.randn(3, requires_grad=True)
    assert num_ranks() == 1 and mean_over_ranks(tensor) is tensor
