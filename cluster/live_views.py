"""Where the live view of a run goes: JSON lines, TensorBoard, Ray's metrics; and to object storage from a thread.

A view may fail in its own way, and its owner goes on without it: what a run has done is in its commits and their log.
"""

import json
import logging
import math
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

import ray
from ray.util.metrics import Counter, Gauge
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from pipeline import storage

logger = logging.getLogger(__name__)

UPLOAD_SECONDS = 15.0
UPLOAD_SHARE = 0.05  # of the time, at most: files that grow are sent less often
CLOSE_SECONDS = 60.0


class LiveView:
    """One place that shows a run while it trains."""

    def start(self, line: dict[str, Any]) -> None:
        """An attempt at the run goes on from `step`, with the seconds that it took to get ready."""

    def step(self, line: dict[str, Any]) -> None:
        """One step has ended: its number, its time and numbers, and `part_seconds`."""

    def commit(self, line: dict[str, Any]) -> None:
        """A checkpoint after `step` steps was committed, with numbers measured on it."""

    def rollback(self, line: dict[str, Any]) -> None:
        """The run goes on from `step`: what it did from there on is undone."""

    def close(self) -> None:
        """Flushes."""


class JsonLines(LiveView):
    """A file with one line per step and per event, each there as soon as it happened."""

    def __init__(self, path: str):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._file: TextIO = open(path, "a")

    def start(self, line: dict[str, Any]) -> None:
        self._write({"event": "start", **line})

    def step(self, line: dict[str, Any]) -> None:
        self._write(line)

    def commit(self, line: dict[str, Any]) -> None:
        self._write({"event": "commit", **line})

    def rollback(self, line: dict[str, Any]) -> None:
        self._write({"event": "rollback", **line})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        # JSON has no word for what is not finite.
        lost = {name: None for name, value in line.items() if is_number(value) and not math.isfinite(value)}
        self._file.write(json.dumps({**line, **lost}) + "\n")
        self._file.flush()


class TensorBoard(LiveView):
    """One event file of a folder that TensorBoard shows as one run, whatever number of attempts wrote to it.

    Written record by record: tensorboardX's own writer puts a thread between, and a caller waits forever for one that a full disk
    has ended.
    """

    def __init__(self, folder: str, attempt: str):
        os.makedirs(folder, exist_ok=True)
        # TensorBoard reads the files of a folder in order of name.
        self._file = open(os.path.join(folder, f"events.out.tfevents.{int(time.time()):010d}.{attempt}"), "wb")
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._is_first = True

    def step(self, line: dict[str, Any]) -> None:
        if self._is_first:  # earlier attempts may have gone further than the commit that this one started from
            self.rollback(line)
        values = {f"train/{name}": value for name, value in numbers(line)}
        values |= {f"step_seconds/{name}": value for name, value in line["part_seconds"].items()}
        self._write_scalars(line, values)

    def commit(self, line: dict[str, Any]) -> None:
        self._write_scalars(line, {f"commit/{name}": value for name, value in numbers(line)})

    def rollback(self, line: dict[str, Any]) -> None:
        self._is_first = False
        start = SessionLog(status=SessionLog.START)  # by which TensorBoard forgets this step and those after it
        self._write(Event(wall_time=line["time"], step=line["step"], session_log=start))

    def close(self) -> None:
        self._file.close()

    def _write_scalars(self, line: dict[str, Any], values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(wall_time=line["time"], step=line["step"], summary=summary))

    def _write(self, event: Event) -> None:
        """One record of the TFRecord format: length, its checksum, data, its checksum."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        parts = (length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data)))
        self._file.write(b"".join(parts))
        self._file.flush()


class RayMetrics(LiveView):
    """Ray's metrics, which every node of a cluster offers to Prometheus with `ray_` before their names."""

    def __init__(self, run: str):
        def tagged(metric: Any) -> Any:
            return metric.set_default_tags({"run": run})

        keys = ("run",)
        self._gauges = {
            name: tagged(Gauge(f"tessera_train_{name}", description=text, tag_keys=keys))
            for name, text in [
                ("step", "Steps done."),
                ("loss", "Loss of the last step: of a transformer in nats per code."),
                ("grad_norm", "Gradient norm of the last step, before clipping."),
                ("learning_rate", "Learning rate of the last step."),
                ("codes_per_second", "Codes that the last step of a transformer trained on, per second."),
                ("images_per_second", "Images that the last step of a tokenizer trained on, per second."),
                ("mfu", "Model FLOP/s of the last step as a share of the peak of all its devices."),
            ]
        }
        self._counters = {
            name: tagged(Counter(f"tessera_train_{name}", description=text, tag_keys=keys))
            for name, text in [
                ("steps_total", "Steps that this process has done."),
                ("commits_total", "Checkpoints committed."),
                ("rollbacks_total", "Returns to an earlier commit."),
            ]
        }
        # Not a histogram: Ray exports the sum of one as if every value were in the middle of its bucket.
        self._seconds = tagged(
            Counter(
                "tessera_train_step_seconds_total",
                description="Seconds spent in each part of a step; the parts add up to all the time.",
                tag_keys=("run", "part"),
            )
        )

    @staticmethod
    def is_at_hand() -> bool:
        """Whether this process belongs to a Ray cluster."""
        return ray.is_initialized()

    def step(self, line: dict[str, Any]) -> None:
        shown = {**line, "step": line["step"] + 1}
        for name, gauge in self._gauges.items():
            if math.isfinite(shown.get(name, math.nan)):
                gauge.set(shown[name])
        self._counters["steps_total"].inc()
        for part, seconds in line["part_seconds"].items():
            if seconds > 0:
                self._seconds.inc(seconds, tags={"part": part})

    def commit(self, line: dict[str, Any]) -> None:
        self._counters["commits_total"].inc()

    def rollback(self, line: dict[str, Any]) -> None:
        self._counters["rollbacks_total"].inc()


class Mirror(LiveView):
    """Copies a local folder to object storage every so many seconds, from a thread, and once more at the end.

    Object storage cannot append, so a file that grew is sent anew. A store that does not answer is tried again and again, and a
    warning is logged once until it answers. The local folder is deleted at the end.
    """

    def __init__(self, folder: str, target: str):
        self._folder, self._target = folder, target
        self._sent: dict[str, int] = {}
        self._is_failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics-upload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)  # a store that hangs must not keep a finished run
        if self._thread.is_alive():
            raise TimeoutError(f"{self._target} has not taken the last metrics within {CLOSE_SECONDS:g} s")
        shutil.rmtree(self._folder)

    def _run(self) -> None:
        wait = UPLOAD_SECONDS
        while not self._stop.wait(wait):
            started = time.monotonic()
            self._upload()
            wait = max(UPLOAD_SECONDS, (time.monotonic() - started) / UPLOAD_SHARE)
        self._upload()

    def _upload(self) -> None:
        try:
            for path in storage.list_files(self._folder):
                data = storage.read_bytes(path)
                if len(data) != self._sent.get(path):
                    storage.replace(storage.join(self._target, os.path.relpath(path, self._folder)), data)
                    self._sent[path] = len(data)
            self._is_failing = False
        except Exception as error:
            if not self._is_failing:
                logger.warning("Metrics are not uploaded to %s: %s Training goes on.", self._target, error)
            self._is_failing = True


def is_number(value: Any) -> bool:
    """Whether a value is a number, which a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What a line says in numbers, by name, beside its step and time."""
    return ((name, value) for name, value in line.items() if is_number(value) and name not in ("step", "time"))
