"""Checkpoints for another world size or ZeRO stage, by way of DeepSpeed's universal format: whole fp32 tensors of every parameter.

DeepSpeed converts the shards of ZeRO 1 to 3. It has no converter for stage 0, whose checkpoint is whole already. Its loaders take
only what the same kind of stage wrote and know nothing of an average of the weights, so a universal checkpoint is read here, in
the same way for every stage.
"""

import os
import subprocess
import sys
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cluster.optimizer_slices import base_optimizer, owned_slices, refresh_weights
from stages.errors import ArtefactError
from stages.second_stage.optimizer import WEIGHT_AVERAGE

WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
NUM_CONVERTERS = 2
PARAMETER_NAMES = "parameter_names"  # of a stage-0 checkpoint, in the order in which its optimizer numbers them


def convert(shards: str, zero_stage: int, output: str) -> None:
    """Writes the universal form of a DeepSpeed checkpoint: `output`/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt.

    Args:
        shards: folder of the files that DeepSpeed saved.
        zero_stage: that saved them.
        output: folder to be filled.

    Raises:
        ArtefactError: DeepSpeed cannot read them; the text ends with what it said.
    """
    if zero_stage == 0:
        _convert_whole(shards, output)
        return
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", shards, "--output_folder", output]
    command += ["--num_extract_workers", str(NUM_CONVERTERS), "--num_merge_workers", str(NUM_CONVERTERS)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    if done.returncode:
        raise ArtefactError(
            f"{shards} is of ZeRO stage {zero_stage}, but DeepSpeed cannot convert it: {done.stderr.strip()[-2000:]}. Use another "
            f"checkpoint, or the world size and ZeRO stage that wrote it."
        )


def _convert_whole(shards: str, output: str) -> None:
    saved = torch.load(os.path.join(shards, "mp_rank_00_model_states.pt"), map_location="cpu", weights_only=False)
    optimizer = saved["optimizer"]
    copies = [copy for group in optimizer.get("fp32_groups", []) for copy in group]  # where the weights are bf16
    state = optimizer.get("optimizer_state_dict", optimizer)["state"]
    for number, name in enumerate(saved[PARAMETER_NAMES]):
        weight = copies[number] if copies else saved["module"][name]
        folder = os.path.join(output, "zero", name)
        os.makedirs(folder)
        for key, tensor in [(WEIGHT, weight), *((key, state[number][key]) for key in MOMENTS)]:
            torch.save(tensor, os.path.join(folder, f"{key}.pt"))


def load(engine: Any, folder: str, *, step: int, weights: str, averages: str | None) -> None:
    """Brings an engine that made no step yet to the state of a universal checkpoint. Every rank must call it.

    Args:
        engine: DeepSpeed's, of any ZeRO stage and world size.
        folder: what `convert` filled.
        step: optimizer steps behind it.
        weights: safetensors file of the checkpoint's weights, which the converted ones must equal.
        averages: safetensors file of the averaged weights, where the engine's optimizer keeps them.

    Raises:
        ArtefactError: a parameter is missing or differs from the checkpoint's weights.
    """
    optimizer = base_optimizer(engine)
    with safe_open(weights, framework="pt") as saved:
        for owned in owned_slices(engine):
            whole = _read(folder, owned.name, WEIGHT)
            _check_equal(owned.name, whole, saved.get_tensor(owned.name), weights)
            owned.kept_in(owned.flat).copy_(owned.part_of(whole))
            state = optimizer.state[owned.flat]
            state["step"] = torch.tensor(float(step), device=owned.flat.device)
            for key in MOMENTS:
                _write(state, key, owned, _read(folder, owned.name, key))
            if averages is not None:
                with safe_open(averages, framework="pt") as file:
                    _write(state, WEIGHT_AVERAGE, owned, file.get_tensor(owned.name))
    refresh_weights(engine)


def load_weights(engine: Any, weights: str) -> None:
    """Gives an engine new weights and an optimizer that made no step yet. Every rank must call it.

    Args:
        engine: DeepSpeed's, of any ZeRO stage and world size.
        weights: safetensors file with every parameter.
    """
    optimizer = base_optimizer(engine)
    with safe_open(weights, framework="pt") as file:
        for owned in owned_slices(engine):
            owned.kept_in(owned.flat).copy_(owned.part_of(file.get_tensor(owned.name).float()))
            optimizer.state[owned.flat].clear()
    refresh_weights(engine)


def _read(folder: str, name: str, key: str) -> Tensor:
    path = os.path.join(folder, "zero", name, f"{key}.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except FileNotFoundError:
        raise ArtefactError(
            f"The converted checkpoint has no {key} of {name}, but the model does. Use another checkpoint."
        ) from None
    return (content["param"] if isinstance(content, dict) else content).float()


def _write(state: Any, key: str, owned: Any, whole: Tensor) -> None:
    if key not in state:
        state[key] = torch.zeros_like(owned.flat)
    owned.kept_in(state[key]).copy_(owned.part_of(whole))


def _check_equal(name: str, whole: Tensor, saved: Tensor, path: str) -> None:
    if not torch.equal(whole.view(-1).to(saved.dtype), saved.view(-1)):
        raise ArtefactError(
            f"Converting a checkpoint gave another {name} than {path} holds. Use another checkpoint, or the world size and ZeRO stage "
            f"that wrote it."
        )
