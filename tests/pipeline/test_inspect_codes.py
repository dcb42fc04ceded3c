import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from code_dataset_support import Recipe
from PIL import Image
from tests_support import TINY_TOKENIZER

import ray_job
from pipeline import storage
from pipeline.code_dataset import manifest
from pipeline.inspect_codes import inspect_codes, render_inspection, write_pictures
from pipeline.tokenizers import store_tokenizer
from stages.errors import ArtefactError
from stages.first_stage.tokenizer import Tokenizer

RECIPE = Recipe(conditions=("depth",), row_group_rows=8, duplicate_of=((7, 3),))


def test_the_facts_are_those_of_the_rows(tmp_path):
    found = inspect_codes(RECIPE.write(tmp_path))
    assert (found.num_rows, found.num_images, found.grid, found.codebook_size) == (38, 19, (2, 3), 20)
    histogram = np.bincount(RECIPE.codes.ravel(), minlength=20)
    np.testing.assert_array_equal(found.histogram, histogram)
    shares = histogram[histogram > 0] / histogram.sum()
    entropy = -(shares * np.log2(shares)).sum()
    assert found.entropy_bits_per_code == pytest.approx(entropy)
    assert found.entropy_bound_bytes_per_row == pytest.approx(entropy * 6 / 8)
    assert found.classes == dict(zip(RECIPE.plan.identity["class_names"], np.bincount(RECIPE.image_ids % 3) * 2))
    size = found.bytes_per_row
    assert (size["codes"], size["conditions"]) == (4, 4 + 6)
    num_bytes = sum(storage.size(path) for path in storage.list_files(str(tmp_path / "data")))
    assert size["total"] == pytest.approx(num_bytes / 38)
    assert size["total"] == pytest.approx(size["codes"] + size["conditions"] + size["keys and crops"])


def test_rows_without_a_class_are_counted_apart(tmp_path):
    assert inspect_codes(Recipe(num_classes=0).write(tmp_path)).classes == {"(none)": 38}


def test_the_text_says_what_people_ask_for(tmp_path):
    text = render_inspection(inspect_codes(RECIPE.write(tmp_path)))
    for part in ("38 = 19 images x 2 views", "empty 1", "duplicates       1, dropped 0", "class 0", "entropy bound"):
        assert part in text


def test_statistics_that_are_not_those_of_the_rows_are_refused(tmp_path, monkeypatch):
    root = RECIPE.write(tmp_path)
    content = manifest.read_manifest(root)
    content["stats"]["used_codes"] += 1
    monkeypatch.setattr("pipeline.code_dataset.reader.read_manifest", lambda path: content)
    with pytest.raises(ArtefactError, match="code statistics"):
        inspect_codes(root)


@pytest.fixture
def tokenizer_path(tmp_path):
    torch.manual_seed(0)
    path = str(tmp_path / "tokenizer")
    return path, store_tokenizer(Tokenizer(TINY_TOKENIZER), path)


def test_pictures_show_decoded_rows_and_the_codebook(tokenizer_path, tmp_path):
    path, fingerprint = tokenizer_path
    recipe = Recipe(grid=(4, 4), codebook_size=32, tokenizer_fingerprint=fingerprint)
    root = recipe.write(tmp_path / "codes")
    csv, png = write_pictures(inspect_codes(root), path, str(tmp_path / "pictures"))
    with Image.open(io.BytesIO(storage.read_bytes(png))) as image:
        assert image.mode == "RGB" and len(np.unique(np.asarray(image))) > 10
    lines = storage.read_bytes(csv).decode().splitlines()
    assert lines[0] == "code,count" and len(lines) == 33
    assert sum(int(line.split(",")[1]) for line in lines[1:]) == 38 * 16


def test_rows_are_not_decoded_by_another_tokenizer(tokenizer_path, tmp_path):
    path, fingerprint = tokenizer_path
    root = Recipe(grid=(4, 4), codebook_size=32).write(tmp_path / "codes")
    with pytest.raises(ArtefactError) as error:
        write_pictures(inspect_codes(root), path, str(tmp_path / "pictures"))
    assert fingerprint in str(error.value) and "f" * 64 in str(error.value)


def test_the_command_prints_text_and_one_line_of_json(tmp_path, capsys):
    root = RECIPE.write(tmp_path)
    assert ray_job.main(["inspect", root, "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert "root hash" in "\n".join(text)
    summary = json.loads(last)
    assert summary["num_rows"] == 38 and summary["files"] == []
    assert dataclasses.asdict(inspect_codes(root))["classes"] == summary["classes"]
