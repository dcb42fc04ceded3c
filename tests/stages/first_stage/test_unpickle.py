"""Reading checkpoints: tensors come through, classes become nothing, and nothing is ever executed."""

import argparse
import collections
import pathlib
import pickle
import sys
import types
import zipfile

import pytest
import torch

from stages.errors import ArtefactError
from stages.first_stage.unpickle import read_checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.fixture
def framework(monkeypatch):
    """A package with the name of a training framework that exists only while the checkpoint is written."""
    module = types.ModuleType("pytorch_lightning.fakes")
    for name, bases in (("Callback", (object,)), ("AttributeDict", (dict,)), ("Items", (list,))):
        setattr(module, name, type(name, bases, {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_through_among_framework_objects(tmp_path, framework, zipped):
    callback = framework.Callback()
    callback.best = 1.0
    content = {
        "state_dict": collections.OrderedDict(TENSORS),
        "hyper_parameters": framework.AttributeDict(lr=1e-4),
        "callbacks": {framework.Callback: {"best": 3}, "items": framework.Items([1, 2])},
        "callback": callback,
        "args": argparse.Namespace(lr=1.0, out=pathlib.PurePosixPath("x"), names={"a", "b"}),
        "counts": collections.defaultdict(list, x=[1]),
        "optimizer_states": [{"state": {0: {"step": 1}}}],
    }
    path = str(tmp_path / "last.ckpt")
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in ("pytorch_lightning.fakes", "pytorch_lightning"):
        del sys.modules[name]
    read = read_checkpoint(path)
    assert read["state_dict"].keys() == TENSORS.keys()
    assert all(torch.equal(read["state_dict"][name], tensor) for name, tensor in TENSORS.items())
    assert not isinstance(read["args"], argparse.Namespace), "classes are not brought to life"


def hostile_calls(marker):
    return [
        Calls(open, marker, "w"),
        Calls(exec, f"open({marker!r}, 'w')"),
        Calls(eval, f"open({marker!r}, 'w')"),
        Calls(__import__, "antigravity"),
        Calls(getattr, "x", "upper"),
        Calls(torch.load, marker),
        Calls(torch.hub.download_url_to_file, "file:///etc/hostname", marker),
        Calls(torch.storage._load_from_bytes, b""),
        Calls(pickle.loads, b"N."),
    ]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("which", range(len(hostile_calls(""))))
@pytest.mark.parametrize("container", ["pickle", "zip", "legacy"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, which, container):
    marker, path = tmp_path / "pwned", str(tmp_path / "evil.ckpt")
    content = {"state_dict": hostile_calls(str(marker))[which]}
    if container == "pickle":
        with open(path, "wb") as file:
            pickle.dump(content, file)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(ArtefactError, match="do not trust this file|cannot be read"):
        read_checkpoint(path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_function_hidden_behind_an_allowed_name_is_refused(tmp_path):
    path = str(tmp_path / "evil.ckpt")
    with open(path, "wb") as file:
        # Protocol 4 names may have dots: collections, then OrderedDict.fromkeys.
        file.write(b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93\x8c\x01a\x85R.")
    with pytest.raises(ArtefactError, match="OrderedDict.fromkeys"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*TorchScript:UserWarning")
def test_a_torchscript_archive_is_not_run(tmp_path):
    path = str(tmp_path / "scripted.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
@pytest.mark.parametrize(
    "data", [b"", b"\x00" * 64, b"PK\x03\x04" + b"\x00" * 64, b"not a checkpoint at all", b"\x80\x02}q\x00."]
)
def test_other_files_are_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtefactError):
        read_checkpoint(str(tmp_path / name))


def test_a_cut_off_checkpoint_is_refused(tmp_path):
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": {"a": torch.randn(100, 100)}}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ArtefactError, match="whole"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("identity", [b"K\x01", b"]", b")", b"X\x07\x00\x00\x00storage\x85"], ids=["number", "list", "empty", "short"])
def test_a_storage_that_is_named_wrongly_is_refused(tmp_path, identity):
    """What stands before the opcode Q in a pickle is what torch.load takes for the description of a storage."""
    torch.save({"a": torch.zeros(2)}, tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as whole, zipfile.ZipFile(tmp_path / "odd.ckpt", "w") as odd:
        for name in whole.namelist():
            data = b"\x80\x02}X\x01\x00\x00\x00a" + identity + b"Qs." if name.endswith("data.pkl") else whole.read(name)
            odd.writestr(name, data)
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_checkpoint(str(tmp_path / "odd.ckpt"))


def test_something_else_than_a_dict_is_refused(tmp_path):
    path = str(tmp_path / "list.ckpt")
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ArtefactError, match="must be a dict"):
        read_checkpoint(path)


def test_a_pickle_changes_no_function_that_others_call(tmp_path):
    rebuild = torch._utils._rebuild_tensor_v2
    # Asks for the function and gives it attributes, which the BUILD opcode sets one by one.
    program = b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(X\x01\x00\x00\x00xtstb."
    path = str(tmp_path / "x.ckpt")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + program)
        archive.writestr("x/version", "3")
    with pytest.raises(ArtefactError):
        read_checkpoint(path)
    assert rebuild.__defaults__ == (None,)
    torch.save(TENSORS, tmp_path / "good.ckpt")
    assert read_checkpoint(str(tmp_path / "good.ckpt")).keys() == TENSORS.keys()
