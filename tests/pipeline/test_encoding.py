import numpy as np
import pytest
import torch
from tests_support import TINY_TOKENIZER

from pipeline import winograd
from pipeline.encoding import encode_views, machine, numeric_mode, prepare_tokenizer
from stages.first_stage.pixels import to_float
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(TINY_TOKENIZER).eval()


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_codes_do_not_depend_on_how_full_the_last_batch_is(tokenizer, precision):
    options = CodesOptions(encode_batch_size=4, encode_precision=precision)
    codes = encode_views(tokenizer, pixels(7), options)
    assert codes.shape == (7, 64) and codes.dtype == np.int64
    np.testing.assert_array_equal(encode_views(tokenizer, pixels(7)[:5], options), codes[:5])
    assert encode_views(tokenizer, pixels(0), options).shape == (0, 64)


def test_codes_are_those_of_the_tokenizer(tokenizer):
    with torch.inference_mode():
        expected = tokenizer.encode(to_float(torch.from_numpy(pixels(4))))
    np.testing.assert_array_equal(encode_views(tokenizer, pixels(4), CodesOptions(encode_batch_size=4)), expected)


def test_every_call_of_the_encoder_has_one_shape_and_the_declared_precision(tokenizer, monkeypatch):
    seen, encode = [], tokenizer.encode

    def watching(images):
        seen.append((tuple(images.shape), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return encode(images)

    monkeypatch.setattr(tokenizer, "encode", watching)
    for precision in ("fp32", "bf16"):
        encode_views(tokenizer, pixels(7), CodesOptions(encode_batch_size=3, encode_precision=precision))
    assert seen == [((3, 3, 16, 16), False, False)] * 3 + [((3, 3, 16, 16), True, False)] * 3


def test_threads_share_a_batch(tokenizer, monkeypatch):
    expected = encode_views(tokenizer, pixels(7), CodesOptions(encode_batch_size=3))
    seen, encode = [], tokenizer.encode

    def watching(images):
        seen.append((len(images), torch.get_num_threads()))
        return encode(images)

    monkeypatch.setattr(tokenizer, "encode", watching)
    torch.set_num_threads(2)
    try:
        codes = encode_views(tokenizer, pixels(7), CodesOptions(encode_batch_size=3))
        assert seen == [(2, 1)] * 4 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(codes, expected)


def test_a_prepared_tokenizer_gives_the_same_codes_and_images(tokenizer, monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    torch.manual_seed(0)
    prepared = prepare_tokenizer(Tokenizer(TINY_TOKENIZER).eval(), CPU)
    options = CodesOptions(encode_batch_size=4)
    agreement = (encode_views(prepared, pixels(8), options) == encode_views(tokenizer, pixels(8), options)).mean()
    assert agreement > 0.99 and prepared.fingerprint == tokenizer.fingerprint
    codes = torch.arange(2 * 64).view(2, 8, 8) % tokenizer.codebook_size
    with torch.inference_mode():
        torch.testing.assert_close(prepared.decode(codes), tokenizer.decode(codes), rtol=1e-4, atol=1e-5)


def test_preparing_makes_float32_mean_float32(tokenizer):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    prepare_tokenizer(tokenizer, CPU)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_the_numeric_mode_is_declared():
    mode = numeric_mode(CodesOptions(encode_precision="bf16", encode_batch_size=3))
    assert mode == {"precision": "bf16", "tf32": False, "batch_size": 3}


def test_the_machine_is_on_record():
    here = machine(CPU)
    assert here["torch"] == torch.__version__ and here["device"] and here["cuda"] is None and here["cudnn"] is None
