"""FLOP and memory: what plan promises, against what torch counts and processes measure."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import configure, measure, predict
from cluster.estimates import (
    GPUS,
    activation_bytes,
    logits_bytes,
    matrix_sizes,
    other_sizes,
    rank_memory,
    row_flop,
    steps_per_second,
)
from stages.options import DeepSpeedOptions, OptimOptions, TrainOptions
from stages.second_stage.transformer import Transformer, TransformerConfig, nll, num_parameters

SMALL = TransformerConfig(
    codebook_size=128,
    grid=(4, 4),
    num_classes=10,
    conditioning="class",
    num_layers=3,
    hidden_size=64,
    num_heads=2,
    ffn_size=192,
    residual_dropout=0.1,
    embedding_dropout=0.1,
    qk_norm=True,
    rope_base=1e4,
)
NUM_ROWS = 2


def loss_of(model, device):
    codes = torch.zeros(NUM_ROWS, SMALL.num_codes, dtype=torch.long, device=device)
    num_prefix_tokens = model.config.num_prefix_tokens
    labels = torch.zeros(NUM_ROWS, *[num_prefix_tokens] * (num_prefix_tokens > 1), dtype=torch.long, device=device)
    return nll(model(codes, labels), codes).sum()


GPT_2 = {"norm": "layer", "ffn": "gelu", "positions": "learned", "bias": True}
CONDITION = {"conditioning": "codes", "num_prefix_tokens": SMALL.num_codes}
MAPS = {"conditioning": "codes", "num_prefix_tokens": 16, "positions": "learned"}


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"conditioning": "none"}, GPT_2, {"bias": True}, MAPS])
def test_sizes_are_those_of_the_module(changes):
    config = dataclasses.replace(SMALL, **changes)
    with torch.device("meta"):
        model = Transformer(config)
    linear = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    matrices = [parameter.numel() for parameter in model.parameters() if id(parameter) in linear]
    others = [parameter.numel() for parameter in model.parameters() if id(parameter) not in linear]
    assert sorted(matrix_sizes(config)) == sorted(matrices)
    assert sorted(other_sizes(config)) == sorted(others)
    assert sum(matrices) + sum(others) == num_parameters(config)


def test_flop_are_those_that_torch_counts():
    with torch.device("meta"):
        model = Transformer(SMALL)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, "meta").backward()
    assert counter.get_total_flops() == NUM_ROWS * row_flop(SMALL)


def activations(config, precision, checkpointing=False):
    return activation_bytes(config, precision=precision, num_rows=NUM_ROWS, use_gpu=False, checkpointing=checkpointing)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"residual_dropout": 0.0, "embedding_dropout": 0.0}, {"qk_norm": False}, CONDITION])
def test_activations_are_what_autograd_keeps(changes, precision):
    config = dataclasses.replace(SMALL, **changes)
    model = Transformer(config).to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, "cpu")
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    log_probabilities = logits_bytes(config, NUM_ROWS) // 3
    assert measured - log_probabilities == pytest.approx(activations(config, precision), rel=0.03)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_whole_block():
    shallow = dataclasses.replace(SMALL, num_layers=2)
    block = activations(SMALL, "fp32") - activations(shallow, "fp32")
    inputs = 4 * NUM_ROWS * SMALL.num_codes * SMALL.hidden_size
    saved = activations(SMALL, "fp32") - activations(SMALL, "fp32", checkpointing=True)
    assert saved == 3 * block - (3 * inputs + block)


def memory(zero_stage, world_size=4, *, precision="bf16", num_accumulated=1, average=0.0, use_gpu=True, **deepspeed):
    train = TrainOptions(
        global_batch_size=NUM_ROWS * world_size * num_accumulated, micro_batch_size=NUM_ROWS, precision=precision
    )
    return rank_memory(
        SMALL,
        train,
        OptimOptions(weight_average_decay=average),
        DeepSpeedOptions(bucket_size=1000, **deepspeed),
        zero_stage=zero_stage,
        world_size=world_size,
        use_gpu=use_gpu,
        checkpointing=False,
    )


def test_what_each_stage_shards():
    parameters = num_parameters(SMALL)
    stages = [memory(stage) for stage in range(4)]
    assert [m.weights // parameters for m in stages[:3]] == [2, 2, 2]
    assert [m.gradients // parameters for m in stages[:2]] == [2, 2]
    assert stages[2].gradients == stages[3].gradients == stages[1].gradients // 4
    assert [m.optimizer for m in stages] == [12 * parameters] + 3 * [3 * parameters]
    # Every parameter of so small a model stays whole on every rank, beside the rank's share.
    assert stages[3].weights == stages[2].weights * 5 // 4
    peaks = [m.peak for m in stages[:3]]
    assert peaks == sorted(peaks, reverse=True)


def test_fp32_has_no_second_copy_of_the_weights_in_stage_0_only():
    parameters = num_parameters(SMALL)
    assert memory(0, precision="fp32").optimizer == 8 * parameters
    assert memory(1, precision="fp32").optimizer == 3 * parameters


def test_the_weight_average_is_sharded_with_the_optimizer():
    parameters = num_parameters(SMALL)
    assert memory(0, average=0.999).optimizer - memory(0).optimizer == 4 * parameters
    assert memory(2, average=0.999).optimizer - memory(2).optimizer == parameters


def test_gradients_of_earlier_micro_batches_stay():
    assert memory(1, num_accumulated=2).peak > memory(1).peak


def test_offloading_moves_a_share_to_the_host():
    for stage in (1, 2, 3):
        kept, offloaded = memory(stage), memory(stage, offload_optimizer=True)
        assert offloaded.optimizer == 0 and offloaded.host >= kept.optimizer and offloaded.peak < kept.peak
    both = memory(3, offload_optimizer=True, offload_parameters=True)
    assert both.host - memory(3, offload_optimizer=True).host == 2 * num_parameters(SMALL) // 4
    assert memory(0, offload_optimizer=True) == memory(0)
    assert memory(3, use_gpu=False, offload_optimizer=True).peak > both.peak + both.host // 2


def test_a_gpu_takes_steps_by_its_peak():
    assert steps_per_second(1e15, 8, GPUS["A100"], 0.5) == pytest.approx(8 * 312e12 * 0.5 / 1e15)


def check_measured(precision, world_size, zero_stage, *overrides, num_accumulated=1):
    config = configure([f"train.precision={precision}", *overrides], world_size, zero_stage, num_accumulated)
    peak, _ = measure(world_size, config, as_trained=False)
    assert peak == pytest.approx(predict(world_size, config).peak, rel=0.1)


def test_the_peak_of_real_ranks_is_the_predicted_one():
    check_measured("bf16", 2, zero_stage=1)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("zero_stage", range(4))
def test_the_peak_of_real_ranks_is_the_predicted_one_in_every_stage(precision, world_size, zero_stage):
    check_measured(precision, world_size, zero_stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, zero_stage, num_accumulated",
    [
        (["train.micro_batch_size=16"], 1, 1),
        (["train.micro_batch_size=16", "train.activation_checkpointing=true"], 3, 1),
        (["optim.weight_average_decay=0.999"], 2, 1),
        ([], 1, 2),
        ([], 2, 2),
        (["deepspeed.offload_optimizer=true"], 2, 1),
        (["deepspeed.bucket_size=50000000"], 3, 1),
    ],
)
def test_the_peak_of_real_ranks_is_the_predicted_one_with_other_options(overrides, zero_stage, num_accumulated):
    check_measured("fp32", 2, zero_stage, *overrides, num_accumulated=num_accumulated)


@pytest.mark.slow
def test_stage_3_on_four_ranks_holds_a_third_of_the_state_of_stage_0():
    whole, sharded = (
        measure(4, configure(["train.precision=fp32"], 4, stage, 1), as_trained=False) for stage in (0, 3)
    )
    assert sharded[1] <= 0.35 * whole[1]
