"""Tokenizers from and to the checkpoints of CompVis/taming-transformers, LlamaGen and diffusers.

What the tensors cannot tell (the resolution the network was configured for, the groups of its norms, and whether a LlamaGen
codebook may be normalised) an export writes beside them under `MARKER`, which foreign readers pass over. Without it a
checkpoint counts as published: 256 pixels, 32 groups, and l2-normalised codes in LlamaGen files.
"""

import json
import logging
import os
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from stages.compvis_project import Project
from stages.errors import ArtefactError, ConfigError
from stages.files import replace as replace_file
from stages.first_stage.architecture import build_tokenizer, check_described, infer_config
from stages.first_stage.artefact import MARKER, fingerprint
from stages.first_stage.foreign import DIFFUSERS_WEIGHTS, INTEGERS, Foreign, name_some, read_foreign
from stages.first_stage.names import FORMATS, count_levels, current, detect_format, is_attention_matrix, renamer
from stages.first_stage.tokenizer import Tokenizer
from stages.first_stage.tokenizer_config import PUBLISHED_NORM_GROUPS, TokenizerConfig

logger = logging.getLogger(__name__)

Part = Literal["first_stage", "cond_stage"]
FILES = {"compvis": "tokenizer.ckpt", "llamagen": "tokenizer.pt", "diffusers": DIFFUSERS_WEIGHTS[0]}
DIFFUSERS_CONFIG = "config.json"
# What shapes do not show and this project builds in one way only.
DIFFUSERS_FIXED = {"norm_type": "group", "act_fn": "silu"}
QUANTIZERS_OF = {"compvis": ("vq", "gumbel"), "llamagen": ("vq",), "diffusers": ("vq",)}
# A transformer's checkpoint contains its tokenizers; what else it and latent-diffusion's models hold is no part of them.
OTHER_PARTS = {
    r"(transformer|permuter)\.": "the transformer",
    r"(first_stage_model|cond_stage_model)\.": "another tokenizer",
    r"(model|model_ema)\.|(betas|alphas_|sqrt_|log_|posterior_|lvlb_weights|scale_factor|logvar)": "a diffusion model",
    r"loss\.": "the training losses",
}
TRAINING_ONLY = {
    r"loss\.": "the training losses",
    r"model_ema\.": "averaged weights",
    r"colorize$": "colours for pictures of label maps",
    r"quantize\.codebook_used$": "a count of used codes",
}
USED, CODEBOOK = "quantize.used", "quantize.embedding.weight"
PER_CODE = (CODEBOOK, "quantize.embed.weight", "quantize.proj.weight", "quantize.proj.bias")  # those of GumbelVQ last
UNIT_NORM_TOLERANCE = 1e-5


def import_tokenizer(
    file: str, format: str = "auto", project: Project | None = None, part: Part = "first_stage"
) -> Tokenizer:
    """A tokenizer from published weights, in eval mode, with its fingerprint.

    The same weights give the same fingerprint under any of the three namings. Nothing in the file is executed. Every tensor is
    either used or named in the log as one that a tokenizer does not need.

    Args:
        file: a local checkpoint (.ckpt, .pt, .bin, .safetensors), or a diffusers folder.
        format: "compvis", "llamagen", "diffusers", or "auto" to tell by the tensors' names.
        project: the project file of the checkpoint; it must agree with the tensors.
        part: which tokenizer of a transformer's checkpoint.

    Raises:
        ConfigError: no such file, format or part.
        ArtefactError: damaged, hostile, not exactly the tensors of a VQGAN, or a tokenizer of this project's own.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format is {format}, but it must be auto, {', '.join(FORMATS)}. Choose one of them.")
    return take_tokenizer(read_foreign(file), format, project, part)


def take_tokenizer(foreign: Foreign, format: str, project: Project | None, part: Part) -> Tokenizer:
    """`import_tokenizer` from a file that is read already."""
    whole = _autoencoder(foreign, part)
    foreign = _used_codes_only(whole)
    tensors, path = foreign.tensors, foreign.path
    found = detect_format(list(tensors))
    if found is None or format not in ("auto", found):
        wanted = "CompVis, LlamaGen or diffusers VQGANs" if format == "auto" else format
        raise ArtefactError(
            f"{path} has tensors such as {name_some(tensors)}, but they are not named like those of {wanted}. "
            f"Choose {f'--format {found}' if found else 'a checkpoint of a convolutional VQGAN'}."
        )
    if found == "diffusers":
        foreign = replace(foreign, marker=_with_diffusers_config(foreign))
    described = project.autoencoder(f"{part}_config") if project is not None else None
    if project is not None and (described is None or "ddconfig" not in described.params):
        raise ConfigError(
            f"--config is {project.path}, but it describes no autoencoder with a ddconfig. Name the YAML file that came with the "
            f"checkpoint, or leave it out."
        )
    rename = renamer(found, count_levels(list(tensors), found))
    config = infer_config(foreign, rename, described)
    if config.quantizer not in QUANTIZERS_OF[found]:
        raise ArtefactError(
            f"{path} has the names of {found} and the quantizer {config.quantizer}, but {found} has no such. Check that the file is whole."
        )
    if described is not None and project is not None:
        as_trained = replace(config, codebook_size=_num_entries(whole) or config.codebook_size)
        check_described(as_trained, described, project.path, path)
    tokenizer = build_tokenizer(config, tensors, rename, path)
    if found == "llamagen" and foreign.marker.get("codes") != "euclidean":
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
        ConfigError: no such format, a quantizer that it has not, or the folder holds such files already.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format}, but it must be {', '.join(FORMATS)}. Choose one of them.")
    path = os.path.join(folder, FILES[format])
    for target in [path] + [os.path.join(folder, DIFFUSERS_CONFIG)] * (format == "diffusers"):
        if os.path.exists(target):
            raise ConfigError(f"output is {folder}, but {target} is there already. Choose another folder.")
    baked = tokenizer.baked()
    if baked.config.quantizer not in QUANTIZERS_OF[format]:
        raise ConfigError(
            f"--format is {format}, but it has no quantizer {baked.config.quantizer}, which this tokenizer has. "
            f"{'Use --format compvis.' if baked.config.quantizer in QUANTIZERS_OF['compvis'] else 'Keep the tokenizer as it is.'}"
        )
    rename = renamer(format, len(baked.config.channel_multipliers))
    tensors = {rename(name): _outward(name, tensor, format) for name, tensor in baked.state_dict().items()}
    marker = {
        "resolution": baked.config.resolution,
        "num_norm_groups": baked.config.num_norm_groups,
        "attention_resolutions": baked.config.attention_resolutions,
        "codes": "euclidean",
    }
    for misfit in _misfits(baked.config, format):
        logger.warning("%s cannot build this tokenizer, and its own code will not load the file: %s.", format, misfit)
    if format == "llamagen" and not _is_unit(tensors[CODEBOOK]):
        logger.warning(
            "The codebook of this tokenizer is not of unit length. LlamaGen's own code normalises it and gets other "
            "codes; importing the file here does not."
        )
    if format != "diffusers" and baked.config.num_norm_groups != PUBLISHED_NORM_GROUPS:
        logger.warning(
            "The norms of this tokenizer have %d groups. %s's own code has %d, loads the file all the same and gets other codes and "
            "images; importing the file here does not, and diffusers can be told.",
            baked.config.num_norm_groups,
            format,
            PUBLISHED_NORM_GROUPS,
        )
    if format == "diffusers":
        weights = save(tensors, metadata={"format": "pt", MARKER: json.dumps(marker)})
        config = json.dumps(_diffusers_config(baked.config), indent=2).encode()
        replace_file(path, lambda file: file.write(weights))
        replace_file(os.path.join(folder, DIFFUSERS_CONFIG), lambda file: file.write(config))
    else:
        key = "state_dict" if format == "compvis" else "model"
        replace_file(path, lambda file: torch.save({key: tensors, MARKER: marker}, file))
    return path


def _autoencoder(foreign: Foreign, part: Part) -> Foreign:
    """The tensors of one autoencoder alone."""
    prefix = f"{part}_model."
    if foreign.has(prefix):
        inner = foreign.part(prefix)
        rest = foreign.without({prefix.replace(".", r"\."): f"the tokenizer {part}"}).without(OTHER_PARTS).tensors
        if rest:
            raise ArtefactError(
                f"{foreign.path} has the unknown {name_some(rest)}, but beside {prefix}* it may hold only parts of "
                "published models. Check that the model has no additions."
            )
    elif part == "first_stage":
        inner = foreign
    else:
        raise ConfigError(f"--part is {part}, but {foreign.path} has no {prefix}*. Leave --part out.")
    inner = inner.without(TRAINING_ONLY)
    tensors = {current(name): tensor for name, tensor in inner.tensors.items()}
    if len(tensors) < len(inner.tensors):
        twice = [name for name in inner.tensors if current(name) != name and current(name) in inner.tensors]
        raise ArtefactError(
            f"{inner.path} has {name_some(twice)} under old and new names, but each must be there once. Check that the file is whole."
        )
    return Foreign(inner.path, tensors, inner.marker).checked()


def _num_entries(foreign: Foreign) -> int | None:
    """Rows of the codebook, those too that a `remap` leaves unused."""
    return next((len(tensor) for name in PER_CODE if (tensor := foreign.tensors.get(name)) is not None and tensor.dim()), None)


def _used_codes_only(foreign: Foreign) -> Foreign:
    """Cuts a codebook to the codes that a `remap` keeps, so that code i is the i-th of them, as its transformer knows it."""
    tensors, num_entries = dict(foreign.tensors), _num_entries(foreign)
    used = tensors.pop(USED, None)
    if used is None or num_entries is None:
        return foreign
    if used.dim() != 1 or not len(used) or used.dtype not in INTEGERS or not 0 <= used.min() <= used.max() < num_entries:
        raise ArtefactError(
            f"{foreign.path} has {USED} of shape {tuple(used.shape)}, but it must number entries of the codebook of "
            f"{num_entries}. Fetch it again."
        )
    logger.warning(
        "%s uses %d of %d codebook entries: the tokenizer has these only, and encodes to the nearest of them.",
        foreign.path,
        len(used),
        num_entries,
    )
    # One of another length is no part of the codebook; the check of shapes names it.
    per_code = {name: tensors[name] for name in PER_CODE if name in tensors and tensors[name].shape[:1] == (num_entries,)}
    cut = {name: tensor[used.long()] for name, tensor in per_code.items()}
    return Foreign(foreign.path, {**tensors, **cut}, foreign.marker)


def _normalise_codebook(tokenizer: Tokenizer) -> None:
    """LlamaGen compares unit vectors; with a unit codebook the Euclidean nearest entry is the same one."""
    weight = tokenizer.quantize.get_parameter("embedding.weight")
    # Dividing a unit vector by its rounded norm again would change its last bits.
    if not _is_unit(weight):
        weight.copy_(F.normalize(weight, dim=-1))


def _is_unit(codebook_KD: Tensor) -> bool:
    return bool(((codebook_KD.norm(dim=-1) - 1.0).abs() < UNIT_NORM_TOLERANCE).all())


def _misfits(config: TokenizerConfig, format: str) -> list[str]:
    """What a project's own code builds in one way only and this tokenizer has otherwise; importing it here works all the same."""
    found = []
    sides = [config.resolution >> level for level in range(len(config.channel_multipliers))]
    attended = [side for side in sides if side in config.attention_resolutions]
    if not config.middle_attention:
        found.append("it always has attention in the middle")
    if format == "llamagen" and attended != sides[-1:]:
        found.append(f"it has attention at the last level, {sides[-1]} x {sides[-1]}, alone, and here it is at {attended or 'none'}")
    if config.quantizer == "gumbel" and config.codebook_dim != config.z_channels:
        found.append(f"its GumbelVQ has one width, and here codes have {config.codebook_dim} and z_channels {config.z_channels}")
    return found


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
        "norm_num_groups": config.num_norm_groups,
        "mid_block_add_attention": config.middle_attention,
        **DIFFUSERS_FIXED,
    }


def _with_diffusers_config(foreign: Foreign) -> dict[str, Any]:
    """The marker with what diffusers' config.json, where there is one, says that tensors do not show."""
    path = os.path.join(os.path.dirname(foreign.path), DIFFUSERS_CONFIG)
    if not os.path.exists(path):
        return foreign.marker
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged ({error}), but it must be JSON. Fetch it again.") from None
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds {type(content).__name__}, but it must be a mapping. Fetch it again.")
    for key, value in DIFFUSERS_FIXED.items():
        if content.get(key, value) != value:
            raise ArtefactError(
                f"{path} has {key} {content[key]}, but only {value} is supported. Choose another model."
            )
    if "norm_num_groups" not in content:
        return foreign.marker
    num_groups, exported = content["norm_num_groups"], foreign.marker.get("num_norm_groups")
    if type(num_groups) is not int or num_groups < 1:
        raise ArtefactError(f"{path} has norm_num_groups {num_groups}, but it must be a positive integer. Fetch it again.")
    if exported not in (None, num_groups):
        raise ArtefactError(
            f"{path} has norm_num_groups {num_groups}, but {foreign.path} was exported with {exported}. Put the file's own "
            f"{DIFFUSERS_CONFIG} beside it, or none."
        )
    return {**foreign.marker, "num_norm_groups": num_groups}
