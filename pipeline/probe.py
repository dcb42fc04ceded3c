"""Golden images: 64 fixed pictures whose codes are stored with a code dataset, so that an encoder proves that it is the same.

A fingerprint says that the tensors are the same; the probe says that the arithmetic is, too: a wrong numeric mode, a broken
device or another preprocessing of the weights shows here before it can spoil a shard.
"""

import hashlib
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.code_dataset.layout import canonical_json, probe_path, read_json, sha256_hex
from pipeline.encoding import encode_views
from stages.errors import ArtefactError
from stages.first_stage.tokenizer import Tokenizer
from stages.hashing import hash64
from stages.options import CodesOptions

NUM_GOLDEN_IMAGES = 64
CODES_PER_SIDE = 4
# Near ties may fall otherwise on other hardware; bfloat16 has many more of them.
MIN_AGREEMENT = {"fp32": 0.99, "bf16": 0.9}


def golden_images(size: int, channels: int) -> np.ndarray:
    """uint8 (64, size, size, channels), the same on every machine: integer arithmetic on hashes.

    Smooth fields of growing frequency; every fourth image is rough.
    """
    images = np.empty((NUM_GOLDEN_IMAGES, size, size, channels), np.uint8)
    place = np.arange(size)
    for i in range(NUM_GOLDEN_IMAGES):
        cells = 1 + i % 8
        knots = hash64(i, np.arange((cells + 1) ** 2 * channels)) & np.uint64(255)
        grid = knots.astype(np.int64).reshape(cells + 1, cells + 1, channels)
        low, part = np.divmod(place * cells, size)
        rows = grid[low] * (size - part)[:, None, None] + grid[low + 1] * part[:, None, None]
        field = rows[:, low] * (size - part)[None, :, None] + rows[:, low + 1] * part[None, :, None]
        smooth = field // size**2
        noise = (hash64(i, 1 + np.arange(smooth.size)) >> np.uint64(58)).astype(np.int64).reshape(smooth.shape)
        images[i] = (smooth + noise - 32 if i % 4 == 3 else smooth).clip(0, 255)
    return images


def make_probe(tokenizer: Tokenizer, options: CodesOptions) -> dict[str, Any]:
    """Golden images by hash, with the codes that this tokenizer gives them in the numeric mode of `options`."""
    images = golden_images(CODES_PER_SIDE * tokenizer.downsample, tokenizer.config.in_channels)
    codes = encode_views(tokenizer, images, options)
    return {
        "num_images": NUM_GOLDEN_IMAGES,
        "size": images.shape[1],
        "images_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
        "codes_sha256": hashlib.sha256(codes.astype("<i8").tobytes()).hexdigest(),
        "min_agreement": MIN_AGREEMENT[options.encode_precision],
        "codes": codes.tolist(),
    }


def freeze_probe(root: str, plan_fingerprint: str, tokenizer: Tokenizer, options: CodesOptions) -> dict[str, Any]:
    """Stores the probe of a plan unless there is one, and returns the one that is stored, with the hash of its file."""
    path = probe_path(root, plan_fingerprint)
    storage.put_if_absent(path, canonical_json(make_probe(tokenizer, options)))
    probe = read_json(path)
    return {**probe, "file_sha256": sha256_hex(canonical_json(probe))}


def check_probe(tokenizer: Tokenizer, options: CodesOptions, probe: dict[str, Any], made_for: str) -> None:
    """Encodes the golden images and compares with the codes of a probe.

    Args:
        tokenizer: on the device, and in the memory layout, that it is to work in.
        options: with the numeric mode of the probe.
        probe: as `make_probe` returned it.
        made_for: what the probe belongs to, for the message.

    Raises:
        ArtefactError: fewer codes agree than the probe asks for.
    """
    found = make_probe(tokenizer, options)
    are_same_images = probe["images_sha256"] == found["images_sha256"]
    agreement = float(np.mean(np.array(probe["codes"]) == np.array(found["codes"]))) if are_same_images else 0.0
    if agreement < probe["min_agreement"]:
        raise ArtefactError(
            f"The tokenizer gives the golden images other codes here ({found['codes_sha256'][:16]}) than when {made_for} was "
            f"made ({probe['codes_sha256'][:16]}): {agreement:.1%} agree, but at least {probe['min_agreement']:.0%} must. "
            f"Check this machine's device and libraries."
        )
