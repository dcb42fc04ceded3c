"""Evaluation records: immutable, one JSON file per evaluation, named by the hash of all that decides its numbers.

Beside each record lies a Parquet file with a row per metric, under `history/`: that folder is a table of everything
ever measured, for pandas, DuckDB and the like. The JSON file is the record; the table can be made again from it.
"""

import datetime
import io
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.hashing import canonical_hash
from pipeline import storage
from stages.errors import ArtefactError

logger = logging.getLogger(__name__)

FORMAT = "tessera-evaluation-record"
FORMAT_VERSION = 1
ROWS = pa.schema(
    [
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("standard_error", pa.float64()),
        ("bias_corrected", pa.float64()),
        ("num_samples", pa.int64()),
        ("record_id", pa.string()),
        ("run", pa.string()),
        ("step", pa.int64()),
        ("checkpoint", pa.string()),
        ("checkpoint_hash", pa.string()),
        ("extractor", pa.string()),
        ("extractor_fingerprint", pa.string()),
        ("reference_key", pa.string()),
        ("sampling", pa.string()),
        ("seed", pa.int64()),
        ("created_at", pa.timestamp("ms", tz="UTC")),
    ]
)


@dataclass(frozen=True)
class Record:
    """One evaluation: where its file is, and what the file says."""

    path: str
    content: dict[str, Any]

    @property
    def id(self) -> str:
        return self.content["record_id"]

    @property
    def step(self) -> int:
        return self.content["step"]

    @property
    def run(self) -> str:
        """Folder of the run whose checkpoint was measured."""
        return run_of(self.content["checkpoint"])

    @property
    def created_at(self) -> str:
        """ISO 8601, UTC."""
        return self.content["created_at"]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """By name: value, standard_error, num_samples and, where there is one, bias_corrected."""
        return self.content["metrics"]

    @property
    def grids(self) -> dict[str, str]:
        """By name (samples, real, reconstructions, neighbours …): path of the PNG, relative to the folder of the evaluation."""
        return self.content["grids"]

    def to_summary(self) -> dict[str, Any]:
        """What the command line reports."""
        return {"record": self.path, "metrics": self.metrics}


def run_of(checkpoint: str) -> str:
    """Folder of the run that a checkpoint's path lies in."""
    return checkpoint.rsplit("/checkpoints/", 1)[0]


def record_id(identity: dict[str, Any]) -> str:
    """32 hexadecimal digits that stand for everything the numbers depend on."""
    return canonical_hash({"format_version": FORMAT_VERSION, **identity})[:32]


def record_path(evaluation_path: str, identifier: str) -> str:
    """Where the record of this id is kept."""
    return storage.join(evaluation_path, "records", f"{identifier}.json")


def write_record(evaluation_path: str, identifier: str, content: dict[str, Any], grids: dict[str, bytes]) -> Record:
    """Stores a record, its grids first, and returns what is stored: the first record of an id stays.

    Args:
        evaluation_path: folder of the history.
        identifier: from `record_id`.
        content: all fields but format, record_id, grids and sha256.
        grids: PNG files by name.
    """
    paths = {name: f"grids/{identifier}/{name}.png" for name in grids}
    for name, data in grids.items():
        storage.put_if_absent(storage.join(evaluation_path, paths[name]), data)
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, "record_id": identifier, **content, "grids": paths}
    text = json.dumps({**body, "sha256": canonical_hash(body)}, indent=2, allow_nan=False, ensure_ascii=False)
    path = record_path(evaluation_path, identifier)
    storage.put_if_absent(path, text.encode())
    record = read_record(path)
    write_rows(evaluation_path, [record])
    return record


def write_rows(evaluation_path: str, records: Iterable[Record]) -> None:
    """Writes the rows of records that have none yet."""
    folder = storage.join(evaluation_path, "history")
    present = set(storage.list_files(folder, suffix=".parquet"))
    for record in records:
        path = storage.join(folder, f"{record.id}.parquet")
        if path not in present:
            buffer = io.BytesIO()
            pq.write_table(_rows(record), buffer)
            storage.put_if_absent(path, buffer.getvalue())


def _rows(record: Record) -> pa.Table:
    content = record.content
    shared = {
        "record_id": record.id,
        "run": record.run,
        "step": record.step,
        "checkpoint": content["checkpoint"],
        "checkpoint_hash": content.get("checkpoint_hash"),
        "sampling": json.dumps(content.get("sampling")),
        "seed": content.get("seed"),
        "created_at": datetime.datetime.fromisoformat(record.created_at),
    }
    estimates = ("value", "standard_error", "bias_corrected")
    rows = [
        {"metric": name, **{key: metric.get(key) for key in estimates}, **_measured_on(metric, content), **shared}
        for name, metric in record.metrics.items()
    ]
    return pa.Table.from_pylist(rows, schema=ROWS)


def _measured_on(metric: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """Images, extractor and reference of one metric."""
    features = metric.get("features", "")
    extractor = content.get("extractors", {}).get(features.rpartition("/")[0], {})
    return {
        "num_samples": metric["num_samples"],
        "extractor": extractor.get("name"),
        "extractor_fingerprint": extractor.get("fingerprint"),
        "reference_key": content.get("references", {}).get(features, {}).get("key"),
    }


def find_record(evaluation_path: str, identifier: str) -> Record | None:
    """The record of this id, or None when there is none."""
    path = record_path(evaluation_path, identifier)
    return read_record(path) if storage.exists(path) else None


def read_record(path: str) -> Record:
    """The record in a file, checked against its hash.

    Raises:
        ArtefactError: missing, damaged, or not a record.
    """
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise ArtefactError(
            f"record is {path}, but there is no such file. Name a file under records/ of an evaluation folder."
        ) from None
    except ValueError as error:
        raise ArtefactError(
            f"{path} is damaged ({error}), but it must be JSON. Remove it and evaluate again."
        ) from error
    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or content.get("format_version") != FORMAT_VERSION
    ):
        raise ArtefactError(
            f"{path} is not an evaluation record of format version {FORMAT_VERSION}, but it must be. Remove it and evaluate again."
        )
    found = canonical_hash({name: value for name, value in content.items() if name != "sha256"})
    if found != content.get("sha256"):
        raise ArtefactError(
            f"{path} is damaged: its sha-256 is {content.get('sha256')}, but its fields give {found}. Remove it and evaluate again."
        )
    return Record(path, content)


def list_records(evaluation_path: str, problems: dict[str, str] | None = None) -> list[Record]:
    """All sound records of a history, oldest first. One damaged file does not hide the others.

    Args:
        evaluation_path: folder of the history.
        problems: gets what is wrong with the others, by path; logged in any case.
    """
    found = []
    for path in storage.list_files(storage.join(evaluation_path, "records"), suffix=".json"):
        try:
            found.append(read_record(path))
        except ArtefactError as error:
            logger.error("%s", error)
            if problems is not None:
                problems[path] = str(error)
    return sorted(found, key=lambda record: (record.created_at, record.id))
