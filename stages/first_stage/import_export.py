"""Tokenizers from and to the checkpoints of CompVis/taming-transformers, LlamaGen and diffusers.

What the tensors cannot tell (the resolution the network was configured for, and whether a LlamaGen codebook may be
normalised) an export writes beside them under `MARKER`, which foreign readers pass over. Without it a checkpoint counts
as published: 256 pixels, and l2-normalised codes in LlamaGen files.
"""

import json
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.errors import ArtefactError, ConfigError
from stages.first_stage.architecture import PUBLISHED_RESOLUTION, build_tokenizer, infer_config, name_some
from stages.first_stage.artefact import fingerprint
from stages.first_stage.blocks import NUM_GROUPS
from stages.first_stage.names import FORMATS, count_levels, current, detect_format, is_attention_matrix, renamer
from stages.first_stage.tokenizer import Tokenizer, TokenizerConfig
from stages.first_stage.unpickle import read_checkpoint

logger = logging.getLogger(__name__)

MARKER = "tessera"
FILES = {"compvis": "tokenizer.ckpt", "llamagen": "tokenizer.pt", "diffusers": "diffusion_pytorch_model.safetensors"}
DIFFUSERS_CONFIG = "config.json"
DIFFUSERS_WEIGHTS = (FILES["diffusers"], "diffusion_pytorch_model.bin")
# What shapes do not show and this project builds in one way only.
DIFFUSERS_FIXED = {"norm_num_groups": NUM_GROUPS, "norm_type": "group", "act_fn": "silu"}
# Losses and averages of training, usage counters, buffers: no part of a tokenizer.
DROPPED = re.compile(r"(loss\.|model_ema\.|colorize$|quantize\.codebook_used$|.*\.attn\.mask$)")
# A transformer's checkpoint contains its tokenizer.
FIRST_STAGE = "first_stage_model."
UNIT_NORM_TOLERANCE = 1e-5


def import_tokenizer(file: str, format: str = "auto") -> Tokenizer:
    """A tokenizer from published weights, in eval mode, with its fingerprint.

    The same weights give the same fingerprint under any of the three namings. Nothing in the file is executed.

    Args:
        file: a local checkpoint (.ckpt, .pt, .bin, .safetensors), or a diffusers folder.
        format: "compvis", "llamagen", "diffusers", or "auto" to tell by the tensors' names.

    Raises:
        ConfigError: no such file or format.
        ArtefactError: damaged, hostile, or not exactly the tensors of a VQGAN.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format is {format}, but it must be auto, {', '.join(FORMATS)}. Choose one of them.")
    path = _weights_file(file)
    content = read_checkpoint(path)
    tensors = _tensors(content, path)
    marker = _read_marker(content, path)
    found = detect_format(list(tensors))
    if found is None or format not in ("auto", found):
        wanted = "CompVis, LlamaGen or diffusers VQGANs" if format == "auto" else format
        raise ArtefactError(
            f"{path} has tensors such as {name_some(tensors)}, but they are not named like those of {wanted}. "
            f"Choose {f'--format {found}' if found else 'a checkpoint of a convolutional VQGAN'}."
        )
    if found == "diffusers":
        _check_diffusers_config(os.path.join(os.path.dirname(path), DIFFUSERS_CONFIG))
    rename = renamer(found, count_levels(list(tensors), found))
    config = infer_config(tensors, rename, marker, path)
    tokenizer = build_tokenizer(config, tensors, rename, path)
    if found == "llamagen" and marker.get("codes") != "euclidean":
        _normalise_codebook(tokenizer)
    tokenizer.fingerprint = fingerprint(tokenizer)
    return tokenizer


def export_tokenizer(tokenizer: Tokenizer, format: str, folder: str) -> str:
    """Writes a tokenizer the way another project stores it, and returns the path of the weights.

    Importing the file gives back the same fingerprint.

    Args:
        tokenizer: what to write; stored as it is saved, that is with the codebook the decoder sees.
        format: "compvis" (dict under `state_dict`), "llamagen" (under `model`), "diffusers" (safetensors, config.json).
        folder: local folder, made if it is missing.

    Raises:
        ConfigError: no such format, none for this quantizer, or the folder holds such files already.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format}, but it must be {', '.join(FORMATS)}. Choose one of them.")
    path = os.path.join(folder, FILES[format])
    for target in [path] + [os.path.join(folder, DIFFUSERS_CONFIG)] * (format == "diffusers"):
        if os.path.exists(target):
            raise ConfigError(f"output is {folder}, but {target} is there already. Choose another folder.")
    os.makedirs(folder, exist_ok=True)
    baked = tokenizer.baked()
    if baked.config.quantizer != "vq":
        raise ConfigError(
            f"tokenizer.quantizer is {baked.config.quantizer}, but these formats only know nearest entries (vq). Keep the artefact itself."
        )
    rename = renamer(format, len(baked.config.channel_multipliers))
    tensors = {rename(name): _outward(name, tensor, format) for name, tensor in baked.state_dict().items()}
    marker = {
        "resolution": baked.config.resolution,
        "attention_resolutions": baked.config.attention_resolutions,
        "codes": "euclidean",
    }
    if format == "llamagen" and not _is_unit(tensors["quantize.embedding.weight"]):
        logger.warning(
            "The codebook of this tokenizer is not of unit length. LlamaGen's own code normalises it and gets other "
            "codes; importing the file here does not."
        )
    if format == "diffusers":
        config_text = json.dumps(_diffusers_config(baked.config), indent=2)
        _replace(path, lambda part: save_file(tensors, part, metadata={"format": "pt", MARKER: json.dumps(marker)}))
        _replace(os.path.join(folder, DIFFUSERS_CONFIG), lambda part: _write_text(part, config_text))
    else:
        key = "state_dict" if format == "compvis" else "model"
        _replace(path, lambda part: torch.save({key: tensors, MARKER: marker}, part))
    return path


def _weights_file(file: str) -> str:
    if os.path.isdir(file):
        candidates = [os.path.join(file, name) for name in DIFFUSERS_WEIGHTS]
        path = next((candidate for candidate in candidates if os.path.exists(candidate)), None)
        if path is None:
            raise ConfigError(
                f"file is {file}, but this folder has no {' or '.join(DIFFUSERS_WEIGHTS)}. Name the file itself."
            )
        return path
    if not os.path.exists(file):
        raise ConfigError(f"file is {file}, but there is no such file. Check the path.")
    return file


def _tensors(content: dict[str, Any], path: str) -> dict[str, Tensor]:
    """The tensors of the autoencoder alone."""
    nested = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    named = {str(name): value for name, value in nested.items() if name != MARKER}
    if any(name.startswith(FIRST_STAGE) for name in named):
        named = {name.removeprefix(FIRST_STAGE): v for name, v in named.items() if name.startswith(FIRST_STAGE)}
    kept = {current(name): value for name, value in named.items() if not DROPPED.match(name)}
    strays = [name for name, value in kept.items() if not isinstance(value, Tensor)]
    if strays:
        raise ArtefactError(
            f"{path} has {name_some(strays)}, but every weight must be a tensor. Choose the file of the weights."
        )
    broken = [name for name, value in kept.items() if not value.isfinite().all()]
    if broken:
        raise ArtefactError(
            f"{path} has {name_some(broken)} with values that are not finite, but weights must be. Fetch it again."
        )
    return kept


def _read_marker(content: dict[str, Any], path: str) -> dict[str, Any]:
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(MARKER, "{}")
        try:
            marker = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtefactError(
                f"{path} has damaged metadata ({error}), but {MARKER} must be JSON. Export it again."
            ) from None
    else:
        marker = content.get(MARKER, {})
    if not _is_marker(marker):
        raise ArtefactError(
            f"{path} has {MARKER} {marker}, but resolutions must be positive integers. Export it again."
        )
    return marker


def _is_marker(marker: Any) -> bool:
    if not isinstance(marker, dict) or not isinstance(marker.get("attention_resolutions", ()), list | tuple):
        return False
    numbers = [marker.get("resolution", PUBLISHED_RESOLUTION), *marker.get("attention_resolutions", ())]
    return all(type(number) is int and number > 0 for number in numbers)


def _normalise_codebook(tokenizer: Tokenizer) -> None:
    """LlamaGen compares unit vectors; with a unit codebook the Euclidean nearest entry is the same one."""
    weight = tokenizer.quantize.get_parameter("embedding.weight")
    # Dividing a unit vector by its rounded norm again would change its last bits.
    if not _is_unit(weight):
        weight.copy_(F.normalize(weight, dim=-1))


def _is_unit(codebook_KD: Tensor) -> bool:
    return bool(((codebook_KD.norm(dim=-1) - 1.0).abs() < UNIT_NORM_TOLERANCE).all())


def _outward(name: str, tensor: Tensor, format: str) -> Tensor:
    tensor = tensor.detach().to("cpu", torch.float32)
    return (tensor[:, :, 0, 0] if format == "diffusers" and is_attention_matrix(name) else tensor).contiguous()


def _diffusers_config(config: TokenizerConfig) -> dict[str, Any]:
    """Keyword arguments of diffusers' VQModel."""
    levels = range(len(config.channel_multipliers))
    attended = [config.resolution >> i in config.attention_resolutions for i in levels]
    return {
        "_class_name": "VQModel",
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attended)],
        "block_out_channels": [config.base_channels * m for m in config.channel_multipliers],
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "sample_size": config.resolution,
        "num_vq_embeddings": config.codebook_size,
        "vq_embed_dim": config.codebook_dim,
        **DIFFUSERS_FIXED,
    }


def _check_diffusers_config(path: str) -> None:
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged ({error}), but it must be JSON. Fetch it again.") from None
    for key, value in DIFFUSERS_FIXED.items():
        if isinstance(content, dict) and content.get(key, value) != value:
            raise ArtefactError(
                f"{path} has {key} {content[key]}, but only {value} is supported. Choose another model."
            )


def _write_text(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _replace(path: str, write: Callable[[str], Any]) -> None:
    """Writes the whole file or none."""
    temporary = f"{path}.part-{os.getpid()}"
    write(temporary)
    os.replace(temporary, path)
