"""The log of a run: one record per step, in immutable segments that commits refer to.

A step's record holds its loss and, per rank, the digest of the rows that rank consumed. Digests add up, so the digest of the whole
global batch is the same for any world size, and `sample_log_hash` chains them over all steps of the run.
"""

import hashlib
import json
from typing import Any

from pipeline import storage
from stages.errors import ArtefactError

EMPTY_HASH = hashlib.sha256(b"").hexdigest()


def step_record(step: int, batch: int, loss: float, digests: list[int], **scalars: float) -> dict[str, Any]:
    """One line of the log: `batch` is the global batch that was consumed, `digests[rank]` are 64-bit row digests, as hexadecimal text."""
    return {"step": step, "batch": batch, "loss": loss, "digests": [f"{digest:016x}" for digest in digests], **scalars}


def global_digest(record: dict[str, Any]) -> int:
    """Digest of the step's whole global batch."""
    return sum(int(digest, 16) for digest in record["digests"]) % 2**64


def chain(previous: str, records: list[dict[str, Any]]) -> str:
    """The sample-log hash after these steps."""
    for record in records:
        previous = hashlib.sha256(f"{previous}{record['step']}:{global_digest(record):016x}".encode()).hexdigest()
    return previous


def write_segment(run_path: str, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Stores one segment and returns the entry by which a commit refers to it. A run that goes back makes the same steps again, so the
    name of the file tells its contents apart, too."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    digest = hashlib.sha256(data).hexdigest()
    path = f"log/{name}-{digest[:12]}.jsonl"
    storage.put_if_absent(storage.join(run_path, path), data)
    return {"path": path, "sha256": digest, "num_steps": len(records)}


def read_log(run_path: str, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All records behind a commit, in order of step.

    Raises:
        ArtefactError: a segment is missing or its hash differs.
    """
    records = []
    for segment in segments:
        path = storage.join(run_path, segment["path"])
        try:
            data = storage.read_bytes(path)
        except FileNotFoundError:
            raise ArtefactError(f"{path} is missing, but a commit refers to it. Restore the file.") from None
        if hashlib.sha256(data).hexdigest() != segment["sha256"]:
            raise ArtefactError(f"{path} is damaged: its sha-256 is not {segment['sha256']}. Restore the file.")
        records += [json.loads(line) for line in data.splitlines()]
    return records


def read_tail(run_path: str, segments: list[dict[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    """The records of the last steps behind a commit, at least `num_steps` of them if there are so many. Raises like `read_log`."""
    start, count = len(segments), 0
    while start > 0 and count < num_steps:
        start -= 1
        count += segments[start]["num_steps"]
    return read_log(run_path, segments[start:])
