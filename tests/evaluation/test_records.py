import json
import shutil

import duckdb
import pytest

from evaluation.records import find_record, list_records, read_record, record_id, write_record, write_rows
from stages.errors import ArtefactError

IDENTITY = {"checkpoint_hash": "c", "num_samples": 10, "seed": 0}


def content(**changes):
    metrics = {"gfd": {"value": 1.5, "standard_error": 0.1, "num_samples": 10}}
    checkpoint = "/runs/a/checkpoints/step-000000003-x"
    created_at = "2026-01-02T00:00:00.000+00:00"
    return {"metrics": metrics, "step": 3, "created_at": created_at, "checkpoint": checkpoint, **changes}


def test_a_record_is_written_once_and_read_back(tmp_path):
    identifier = record_id(IDENTITY)
    assert find_record(str(tmp_path), identifier) is None
    first = write_record(str(tmp_path), identifier, content(), {"samples": b"png"})
    second = write_record(str(tmp_path), identifier, content(step=4), {"samples": b"other"})
    assert second == first == find_record(str(tmp_path), identifier)
    assert (first.id, first.step, first.metrics["gfd"]["value"]) == (identifier, 3, 1.5)
    assert (tmp_path / first.grids["samples"]).read_bytes() == b"png"
    assert first.to_summary() == {"record": first.path, "metrics": first.metrics}


def test_the_id_depends_on_everything_that_decides_the_numbers():
    ids = {record_id(IDENTITY), *(record_id({**IDENTITY, name: "other"}) for name in IDENTITY)}
    assert len(ids) == 1 + len(IDENTITY)
    assert record_id(dict(reversed(IDENTITY.items()))) == record_id(IDENTITY)


def test_history_is_ordered_by_time(tmp_path):
    assert list_records(str(tmp_path)) == []
    for day in (3, 1, 2):
        write_record(
            str(tmp_path),
            record_id({"day": day}),
            content(step=day, created_at=f"2026-01-0{day}T00:00:00.000+00:00"),
            {},
        )
    assert [record.step for record in list_records(str(tmp_path))] == [1, 2, 3]


def test_a_changed_record_is_refused(tmp_path):
    record = write_record(str(tmp_path), record_id(IDENTITY), content(), {})
    with open(record.path) as file:
        text = file.read()
    for damaged, message in (
        (text.replace("1.5", "1.4"), "sha-256"),
        (text[:-5], "JSON"),
        (json.dumps({"a": 1}), "not an evaluation record"),
    ):
        with open(record.path, "w") as file:
            file.write(damaged)
        with pytest.raises(ArtefactError, match=message):
            read_record(record.path)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(ArtefactError, match="no such file"):
        read_record(str(tmp_path / "records" / "x.json"))


def test_the_history_is_a_table_with_a_row_per_metric(tmp_path):
    metrics = {
        "gfd": {"value": 1.5, "standard_error": 0.1, "num_samples": 10, "bias_corrected": 1.0},
        "psnr": {"value": 20.0, "standard_error": None, "num_samples": 10},
    }
    for day in (1, 2):
        created_at = f"2026-01-0{day}T00:00:00.000+00:00"
        write_record(
            str(tmp_path), record_id({"day": day}), content(step=day, created_at=created_at, metrics=metrics), {}
        )
    query = f"select metric, value, bias_corrected, run, step from '{tmp_path}/history/*.parquet' order by step, metric"
    rows = duckdb.sql(query).fetchall()
    assert rows == [
        (*row, "/runs/a", step) for step in (1, 2) for row in (("gfd", 1.5, 1.0), ("psnr", 20.0, None))
    ]


def test_rows_that_a_killed_writer_did_not_write_are_completed(tmp_path):
    record = write_record(str(tmp_path), record_id(IDENTITY), content(), {})
    (file,) = (tmp_path / "history").iterdir()
    data = file.read_bytes()
    shutil.rmtree(tmp_path / "history")
    write_rows(str(tmp_path), [record])
    assert file.read_bytes() == data
