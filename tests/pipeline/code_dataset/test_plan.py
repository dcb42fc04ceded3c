import json

import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.code_dataset.layout import claim_path
from pipeline.code_dataset.plan import freeze, make_plan, read_plan
from pipeline.sources import listing
from stages.errors import ArtefactError, ConfigError

IDENTITY = {"class_names": ["a", "b"], "tokenizer": "t"}


def table(labels=(0, 1, 1), num_bytes=(1, 2, 3)):
    return listing(np.arange(3), ["x", "y", "z"], np.array(labels), num_bytes)


def test_shards_are_consecutive():
    plan = make_plan(table(), IDENTITY, shard_size=2)
    assert plan.images["shard"].to_pylist() == [0, 0, 1]
    assert plan.num_shards == 2


def test_whatever_decides_the_rows_is_in_the_fingerprint():
    changed = [
        make_plan(table(), IDENTITY, 2),
        make_plan(table(), IDENTITY, 3),
        make_plan(table(), {**IDENTITY, "tokenizer": "u"}, 2),
        make_plan(table(labels=(0, 1, 0)), IDENTITY, 2),
        make_plan(table(num_bytes=(1, 2, 4)), IDENTITY, 2),
        make_plan(table().slice(0, 2), IDENTITY, 2),
    ]
    assert len({plan.fingerprint for plan in changed}) == len(changed)
    assert make_plan(table(), IDENTITY, 2).fingerprint == changed[0].fingerprint


def test_a_plan_does_not_depend_on_how_arrow_chunks_it():
    chunked = pa.concat_tables([table().slice(0, 1), table().slice(1)])
    assert make_plan(chunked, IDENTITY, 2).fingerprint == make_plan(table(), IDENTITY, 2).fingerprint


def test_a_stored_plan_is_read_back(tmp_path):
    plan = make_plan(table(), IDENTITY, 2)
    freeze(str(tmp_path), plan)
    freeze(str(tmp_path), plan)
    stored = read_plan(str(tmp_path), plan.fingerprint)
    assert stored.images.to_pylist() == plan.images.to_pylist()
    assert stored.identity == plan.identity == {**IDENTITY, "shard_size": 2}
    assert json.dumps(stored.identity)


def test_a_folder_of_another_plan_is_refused(tmp_path):
    first, second = make_plan(table(), IDENTITY, 2), make_plan(table(), IDENTITY, 3)
    freeze(str(tmp_path), first)
    with pytest.raises(ArtefactError) as error:
        freeze(str(tmp_path), second)
    assert first.fingerprint in str(error.value) and second.fingerprint in str(error.value)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_of_two_plans_that_start_together_in_a_new_folder_one_is_refused(request, tmp_path, monkeypatch, place):
    """The other job stores its plan when the first has looked at the folder and written nothing yet."""
    root = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    first, second = make_plan(table(), IDENTITY, 2), make_plan(table(), IDENTITY, 3)
    list_files, overtaking = storage.list_files, [second]

    def list_and_be_overtaken(*args, **kwargs):
        found = list_files(*args, **kwargs)
        while overtaking:
            freeze(root, overtaking.pop())
        return found

    monkeypatch.setattr(storage, "list_files", list_and_be_overtaken)
    with pytest.raises(ArtefactError, match=f"holds a code dataset of plan {second.fingerprint}, but .* {first.fingerprint}"):
        freeze(root, first)
    freeze(root, second)
    assert len(read_plan(root, second.fingerprint).images) == 3


def test_a_folder_of_an_earlier_version_goes_on_and_refuses_another_plan(tmp_path):
    root, first, second = str(tmp_path), make_plan(table(), IDENTITY, 2), make_plan(table(), IDENTITY, 3)
    freeze(root, first)
    storage.delete(claim_path(root))
    with pytest.raises(ArtefactError, match=first.fingerprint):
        freeze(root, second)
    freeze(root, first)
    assert storage.exists(claim_path(root))


def test_a_damaged_plan_is_refused(tmp_path):
    plan = make_plan(table(), IDENTITY, 2)
    freeze(str(tmp_path), plan)
    (path,) = tmp_path.rglob("plan.parquet")
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], data.replace(b"y", b"w"), b""):
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match="plan.parquet is damaged"):
            freeze(str(tmp_path), plan)
    path.unlink()
    with pytest.raises(ArtefactError, match="plan.parquet is missing"):
        read_plan(str(tmp_path), plan.fingerprint)


def test_an_empty_listing_is_refused():
    with pytest.raises(ConfigError, match="source has 0 images"):
        make_plan(table().slice(0, 0), IDENTITY, 2)


@pytest.mark.parametrize("labels", [(0, 1, 2), (-1, 0, 1)])
def test_a_label_outside_the_classes_is_refused(labels):
    with pytest.raises(ConfigError, match="2 classes"):
        make_plan(table(labels=labels), IDENTITY, 2)
