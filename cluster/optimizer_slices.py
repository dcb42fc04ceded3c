"""Which part of every parameter's fp32 weight and optimizer state a rank owns, for each ZeRO stage.

DeepSpeed's own access to whole tensors is not enough: with two parameter groups, ZeRO 1 and 2 link only the first group's state, and
ZeRO 3 fails to set a parameter that the ranks do not divide. This reads the same attributes of DeepSpeed 0.19's optimizers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class OwnedSlice:
    """Elements [start, start + size) of a flattened parameter, kept at [flat_start, flat_start + size) of `flat`.

    Attributes:
        name: of the parameter in the module.
        flat: fp32 tensor that the optimizer steps; also the key of its state.
    """

    name: str
    flat: Tensor
    flat_start: int
    start: int
    size: int

    def kept_in(self, flat: Tensor) -> Tensor:
        """The slice's elements in a tensor laid out like `flat`."""
        return flat.detach().view(-1).narrow(0, self.flat_start, self.size)

    def part_of(self, whole: Tensor) -> Tensor:
        """The slice's elements in a whole parameter."""
        return whole.view(-1).narrow(0, self.start, self.size)


def owned_slices(engine: Any) -> list[OwnedSlice]:
    """What this rank owns; every rank owns everything where the optimizer is not sharded."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    find = {0: _whole, 1: _sharded_flat, 2: _sharded_flat, 3: _sharded_each}[stage]
    return list(find(engine.optimizer, names))


def _whole(optimizer: Any, names: dict[int, str]) -> Iterator[OwnedSlice]:
    if hasattr(optimizer, "fp32_groups"):  # bf16 weights beside fp32 copies
        pairs = [pair for groups in zip(optimizer.fp16_groups, optimizer.fp32_groups) for pair in zip(*groups)]
    else:
        pairs = [(weight, weight) for group in optimizer.param_groups for weight in group["params"]]
    for weight, copy in pairs:
        yield OwnedSlice(names[id(weight)], copy, 0, 0, copy.numel())


def _sharded_flat(optimizer: Any, names: dict[int, str]) -> Iterator[OwnedSlice]:
    """ZeRO 1 and 2: a group's parameters end to end, cut into one piece per rank."""
    for weights, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups):
        for weight in weights:
            mapping = weight._hp_mapping
            if mapping is not None:  # None where other ranks own all of it
                kept, owned = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield OwnedSlice(names[id(weight)], flat, kept.start, owned.start, owned.numel)


def _sharded_each(optimizer: Any, names: dict[int, str]) -> Iterator[OwnedSlice]:
    """ZeRO 3: every parameter cut into one piece per rank, the last of which may end in padding."""
    rank = dist.get_rank()
    for weights, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat):
        flat_start = 0
        for weight in weights:
            share = weight.ds_tensor.ds_numel
            size = min(share, weight.ds_numel - rank * share)
            if size > 0:
                yield OwnedSlice(names[id(weight)], flat, flat_start, rank * share, size)
            flat_start += share


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside DeepSpeed's."""
    return engine.basic_optimizer


def gather_state(engine: Any, key: str) -> dict[str, Tensor]:
    """One state of every parameter, whole, as fp32 CPU tensors on rank 0 (empty on other ranks). Every rank must call it.

    Args:
        engine: DeepSpeed's, after a step or a load.
        key: as in the optimizer's state, such as "exp_avg".
    """
    slices = {owned.name: owned for owned in owned_slices(engine)}
    state, is_sharded = base_optimizer(engine).state, engine.zero_optimization_stage() > 0
    gathered = {}
    for name, parameter in engine.module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        whole = torch.zeros(shape, dtype=torch.float32, device=engine.device)
        owned = slices.get(name)
        if owned is not None:
            owned.part_of(whole).copy_(owned.kept_in(state[owned.flat][key]))
        if is_sharded:
            dist.reduce(whole, dst=0)
        if dist.get_rank() == 0:
            gathered[name] = whole.cpu()
    return gathered


def refresh_weights(engine: Any) -> None:
    """Brings the weights of the forward pass up to date after the optimizer's fp32 weights were written. Every rank must call it."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    elif stage > 0:
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for weights, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups):
            for weight, copy in zip(weights, copies):
                weight.data.copy_(copy)
