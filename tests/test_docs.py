"""The examples of the user pages, run as they stand."""

import re
from pathlib import Path

import duckdb
import numpy as np
import pytest
from code_dataset_support import Recipe

from pipeline.code_dataset import CodeDataset
from pipeline.code_dataset.layout import read_json

PAGE = (Path(__file__).parents[1] / "docs" / "code-dataset.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(params=[{}, {"remap_unused": True, "used_codes": (3, 7, 19)}], ids=["plain", "remapped"])
def recipe(request):
    return Recipe(num_images=30, bad_images=(), shard_size=4, row_group_rows=8, **request.param)


def test_the_reader_of_the_page_reads_every_row(recipe, tmp_path):
    names = {}
    exec(PYTHON[0], names)
    np.testing.assert_array_equal(names["read_codes"](recipe.write(tmp_path)), recipe.codes.reshape(60, 6))
    assert sum(bool(line) for line in PYTHON[0].splitlines()) <= 15, "the page promises a short reader"


def test_pandas_reads_a_part(tmp_path):
    recipe = Recipe()
    root = recipe.write(tmp_path)
    (part,) = (tmp_path / "data").rglob("*.parquet")
    names = {"part": part, "bits": 5, "num_codes": 6}
    exec(PYTHON[1], names)
    assert names["first_row"] == recipe.codes[0, 0].tolist()
    assert len(names["rows"]) == CodeDataset.open(root, verify=False).num_rows


def test_duckdb_reads_all_parts(tmp_path):
    recipe = Recipe(num_images=30)
    root = recipe.write(tmp_path)
    Recipe(num_images=30).write(tmp_path)
    (query,) = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    rows = duckdb.sql(query.replace("'codes/", f"'{root}/")).fetchall()
    counts = np.bincount(recipe.labels(recipe.image_ids)) * recipe.num_views
    assert rows == [(label, count, 30.0) for label, count in enumerate(counts)]


def test_the_example_of_our_reader_runs(tmp_path):
    recipe = Recipe()
    names = {"root": recipe.write(tmp_path), "np": np}
    exec(PYTHON[2], names)
    np.testing.assert_array_equal(names["codes"], recipe.codes.reshape(-1, 6)[[7, 0, 11]])
    assert names["where"].column_names[:2] == ["image_id", "view"]


def test_the_page_names_every_field_of_a_manifest(tmp_path):
    Recipe(conditions=("depth",)).write(tmp_path)
    (path,) = (tmp_path / "manifests").glob("*.json")
    described = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    assert set(read_json(str(path))) <= described


def test_the_readme_names_every_module():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"^ {6,10}(\w+\.py) ", (root / "README.md").read_text(), re.MULTILINE))
    layers = ("stages", "pipeline", "cluster", "evaluation")
    modules = {path.name for layer in layers for path in (root / layer).rglob("*.py")} - {"__init__.py"}
    assert named == modules
