"""Weights of the perceptual loss: a file is what its hash says, the web needs a hash, and nothing is made up."""

import hashlib
import http.server
import threading

import pytest
import torch
from safetensors.torch import save_file

from pipeline.perceptual import load_lpips
from stages.errors import ArtefactError, ConfigError, StorageError
from stages.first_stage.lpips import BLOCKS, WIDTHS
from stages.options import TokenizerTrainOptions


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A VGG16 of small random weights as safetensors, and heads as torch saves them; with their hashes."""
    folder, vgg, inputs = tmp_path_factory.mktemp("weights"), {}, 3
    for block, width in zip(BLOCKS, WIDTHS):
        for position in block:
            vgg[f"features.{position}.weight"] = torch.randn(width, inputs, 3, 3) * 0.01
            vgg[f"features.{position}.bias"] = torch.zeros(width)
            inputs = width
    heads = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(WIDTHS)}
    save_file(vgg, folder / "vgg.safetensors")
    torch.save(heads, folder / "heads.pth")
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("vgg.safetensors", "heads.pth")]
    return folder, *hashes


def options(files, **changes):
    folder, _, _ = files
    given = {"perceptual_vgg": str(folder / "vgg.safetensors"), "perceptual_heads": str(folder / "heads.pth")}
    return TokenizerTrainOptions(perceptual_weight=1.0, **{**given, **changes})


def test_files_are_loaded_and_their_hashes_told(files):
    _, vgg, heads = files
    network, hashes = load_lpips(options(files, perceptual_vgg_sha256=vgg.upper()))
    assert hashes == {"perceptual_vgg": vgg, "perceptual_heads": heads}
    images = torch.rand(2, 3, 16, 16)
    assert network(images, images).shape == (2,)


def test_without_weight_nothing_is_loaded(files):
    assert load_lpips(TokenizerTrainOptions(perceptual_vgg="nowhere")) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"perceptual_vgg": None}, ["perceptual_vgg names no weights"]),
        ({"perceptual_vgg": "/nowhere/vgg.pth"}, ["perceptual_vgg is /nowhere/vgg.pth", "no such file"]),
        ({"perceptual_vgg_sha256": "00ff"}, ["perceptual_vgg_sha256 is 00ff", "Check the file"]),
        ({"perceptual_vgg_sha256": ""}, ["perceptual_vgg_sha256 is ", "Check the file"]),
        ({"perceptual_heads": None}, ["perceptual_heads has no lin0"]),
        ({"perceptual_vgg": "https://example.org/vgg.pth"}, ["must have a known hash", "perceptual_vgg_sha256"]),
    ],
)
def test_what_is_missing_or_wrong_is_an_error(files, changes, words):
    with pytest.raises(ConfigError) as caught:
        load_lpips(options(files, **changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_damaged_file_is_an_error(files, tmp_path):
    damaged = tmp_path / "vgg.pth"
    damaged.write_bytes(b"PK\3\4 cut off")
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_lpips(options(files, perceptual_vgg=str(damaged)))


@pytest.fixture
def server(files):
    """A web server for the folder of the files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(files[0]), **kwargs)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_weights_come_from_the_web(files, server):
    _, vgg, _ = files
    address = f"{server}/vgg.safetensors"
    for known in (vgg, vgg[:8]):
        _, hashes = load_lpips(options(files, perceptual_vgg=address, perceptual_vgg_sha256=known))
        assert hashes["perceptual_vgg"] == vgg
    with pytest.raises(ConfigError, match="Check the file"):
        load_lpips(options(files, perceptual_vgg=address, perceptual_vgg_sha256="0" * 64))
    with pytest.raises(StorageError, match="cannot be downloaded"):
        load_lpips(options(files, perceptual_vgg=f"{server}/gone", perceptual_vgg_sha256=vgg))
