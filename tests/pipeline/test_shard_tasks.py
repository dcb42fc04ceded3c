import numpy as np
import pytest
import torch
from tests_support import TINY_TOKENIZER

from pipeline import shard_tasks
from pipeline.shard_tasks import ShardEncoder, ShardJob, encode_views, fetch
from pipeline.tokenizers import store_tokenizer
from stages.errors import ArtefactError, BadImage
from stages.first_stage.pixels import to_float
from stages.first_stage.tokenizer import Tokenizer
from stages.options import CodesOptions, ImageOptions


class Flaky:
    """A source whose storage fails a number of times before it answers."""

    class_names = ()

    def __init__(self, *faults):
        self.faults = list(faults)

    def fetch(self, uri):
        if self.faults:
            raise self.faults.pop(0)
        return b"data"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(shard_tasks, "READ_RETRY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return Tokenizer(TINY_TOKENIZER).eval()


def test_storage_faults_are_retried():
    assert fetch(Flaky(TimeoutError(), PermissionError()), "uri") == b"data"


def test_storage_that_keeps_failing_is_no_bad_image():
    with pytest.raises(PermissionError, match="locked"):
        fetch(Flaky(*[PermissionError("locked")] * 100), "uri")


def test_a_file_that_is_gone_is_a_bad_image():
    with pytest.raises(BadImage) as error:
        fetch(Flaky(FileNotFoundError("gone")), "uri")
    assert error.value.kind == "missing"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_codes_do_not_depend_on_how_full_the_last_batch_is(tokenizer, precision):
    views = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    options = CodesOptions(encode_batch_size=4, encode_precision=precision)
    codes = encode_views(tokenizer, views, options)
    assert codes.shape == (7, 64) and codes.dtype == np.int64
    np.testing.assert_array_equal(encode_views(tokenizer, views[:5], options), codes[:5])
    assert encode_views(tokenizer, views[:0], options).shape == (0, 64)


def test_codes_are_those_of_the_tokenizer(tokenizer):
    views = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = tokenizer.encode(to_float(torch.from_numpy(views)))
    np.testing.assert_array_equal(encode_views(tokenizer, views, CodesOptions(encode_batch_size=4)), expected)


def test_an_encoder_refuses_another_tokenizer_than_the_plans(tokenizer, tmp_path):
    path = str(tmp_path / "tokenizer")
    fingerprint = store_tokenizer(tokenizer, path)
    job = ShardJob(
        source=Flaky(),
        images=ImageOptions(size=16),
        codes=CodesOptions(path=str(tmp_path / "codes")),
        plan_fingerprint="p",
        plan_images=None,
        tokenizer_path=path,
        tokenizer_fingerprint="of another",
    )
    with pytest.raises(ArtefactError) as error:
        ShardEncoder(job)
    assert fingerprint in str(error.value) and "of another" in str(error.value)
