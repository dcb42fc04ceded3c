"""The direction of dependency: stages, pipeline, cluster, evaluation, ray_job; a module imports only its own layer and those before."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["stages", "pipeline", "cluster", "evaluation", "ray_job"]
MODULES = sorted(path for layer in LAYERS[:-1] for path in (ROOT / layer).rglob("*.py")) + [ROOT / "ray_job.py"]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    to_the_right = LAYERS[LAYERS.index(layer) + 1 :]
    assert not imported(path) & set(to_the_right)


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_stages_are_pure_pytorch(path):
    assert not imported(path) & {"ray", "deepspeed", "s3fs", "fsspec", "boto3", "multiprocessing", "subprocess"}


def test_configuration_imports_neither_torch_nor_ray():
    code = "import sys, stages.config, ray_job; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400
