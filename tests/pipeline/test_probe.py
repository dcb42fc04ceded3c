import json

import numpy as np
import pytest
import torch
from tests_support import TINY_TOKENIZER

from pipeline import storage
from pipeline.code_dataset.layout import probe_path, sha256_hex
from pipeline.probe import check_probe, freeze_probe, golden_images, make_probe
from stages.errors import ArtefactError
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions

OPTIONS = CodesOptions(encode_batch_size=16)


def tokenizer(seed=0):
    torch.manual_seed(seed)
    return Tokenizer(TINY_TOKENIZER).eval()


def with_other_codes(probe, share):
    """The probe with a share of its codes changed."""
    codes = np.array(probe["codes"])
    flat = codes.reshape(-1)
    flat[: round(share * flat.size)] ^= 1
    return {**probe, "codes": codes.tolist()}


def test_golden_images_never_change():
    """Code datasets rest on them."""
    digests = [sha256_hex(golden_images(size, channels).tobytes())[:16] for size, channels in ((8, 3), (32, 3), (8, 1))]
    assert digests == ["a637d40e18d5ad2a", "0d6930a1134fa883", "f221ea061eae065d"]


def test_golden_images_are_64_different_pictures():
    images = golden_images(32, 3)
    assert images.shape == (64, 32, 32, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 64
    roughness = np.abs(np.diff(images.astype(int), axis=2)).mean(axis=(1, 2, 3))
    is_rough = np.arange(64) % 4 == 3
    assert roughness[is_rough].min() > 10 > roughness[:8:8].max(), "both smooth and rough ones"
    assert images.min() < 10 and images.max() > 245


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_encoder_passes(precision):
    options = CodesOptions(encode_batch_size=16, encode_precision=precision)
    probe = json.loads(json.dumps(make_probe(tokenizer(), options)))
    assert np.array(probe["codes"]).shape == (64, 16) and len(np.unique(probe["codes"])) > 3
    check_probe(tokenizer(), options, probe, "codes")
    check_probe(tokenizer(), CodesOptions(encode_batch_size=5, encode_precision=precision), probe, "codes")


def test_other_weights_are_refused_with_both_sides_named():
    probe, other = make_probe(tokenizer(), OPTIONS), make_probe(tokenizer(1), OPTIONS)
    with pytest.raises(ArtefactError, match="% agree, but at least 99% must") as error:
        check_probe(tokenizer(1), OPTIONS, probe, "the code dataset /codes")
    for side in (probe["codes_sha256"][:16], other["codes_sha256"][:16], "the code dataset /codes"):
        assert side in str(error.value)


def test_another_numeric_mode_is_refused():
    probe = make_probe(tokenizer(), OPTIONS)
    with pytest.raises(ArtefactError, match="agree, but at least 99% must"):
        check_probe(tokenizer(), CodesOptions(encode_batch_size=16, encode_precision="bf16"), probe, "codes")


@pytest.mark.parametrize("precision, tolerated, refused", [("fp32", 0.005, 0.015), ("bf16", 0.09, 0.11)])
def test_a_few_near_ties_are_tolerated(precision, tolerated, refused):
    options = CodesOptions(encode_batch_size=16, encode_precision=precision)
    probe = make_probe(tokenizer(), options)
    check_probe(tokenizer(), options, with_other_codes(probe, tolerated), "codes")
    with pytest.raises(ArtefactError, match="agree"):
        check_probe(tokenizer(), options, with_other_codes(probe, refused), "codes")


def test_codes_of_other_images_prove_nothing():
    probe = {**make_probe(tokenizer(), OPTIONS), "images_sha256": "0" * 64}
    with pytest.raises(ArtefactError, match="0.0% agree"):
        check_probe(tokenizer(), OPTIONS, probe, "codes")


def test_the_first_probe_of_a_plan_stays(tmp_path):
    first = freeze_probe(str(tmp_path), "plan", tokenizer(), OPTIONS)
    assert freeze_probe(str(tmp_path), "plan", tokenizer(1), OPTIONS) == first
    assert first["file_sha256"] == sha256_hex(storage.read_bytes(probe_path(str(tmp_path), "plan")))
    assert first == {**make_probe(tokenizer(), OPTIONS), "file_sha256": first["file_sha256"]}
