"""The live view of a training run: a progress line, JSON lines, TensorBoard and Ray's metrics.

It shows what happens, also what is undone later. What a run has done is said by its commits and their log (`cluster.run_log`).
"""

import json
import logging
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cluster.live_views import JsonLines, LiveView, Mirror, RayMetrics, TensorBoard, is_number
from cluster.step_timer import CHECKPOINT, DATA
from pipeline import storage

logger = logging.getLogger(__name__)

RECENT_STEPS = 100
EXTRA_NUMBERS = ("perceptual", "discriminator", "adversarial_weight", "codebook_usage", "codebook_perplexity")  # of the first stage


class TrainMetrics:
    """Shows each step of a run, on rank 0. Nothing that goes wrong with a view stops training: it is warned about once.

    Local runs have `<run_path>/metrics/<attempt>.jsonl` and `<run_path>/tensorboard/` at every moment, runs on object storage a
    copy of them that is seconds old.

    Args:
        run_path: of the run, local or s3://.
        attempt: name of this attempt at it, which no other has.
        is_writer: whether this rank shows anything; on others every method does nothing.
        num_steps: of the whole run.
        log_every_steps: steps between two progress lines.
        codes_per_step: codes of a global batch; or what else is counted, if `unit` says so.
        flop_per_step: floating-point operations that the model needs per global batch, without any that are computed again.
        peak_flops: peak FLOP/s of all ranks' devices together; without it, no MFU is shown.
        unit: what is counted.
        loss_unit: of the loss, for people.
    """

    def __init__(
        self,
        run_path: str,
        attempt: str,
        *,
        is_writer: bool,
        num_steps: int,
        log_every_steps: int,
        codes_per_step: int,
        flop_per_step: float,
        peak_flops: float | None,
        unit: str = "codes",
        loss_unit: str = "nats/code",
    ):
        self._unit, self._loss_unit = unit, loss_unit
        self._num_steps, self._log_every_steps = num_steps, log_every_steps
        self._codes_per_step, self._flop_per_step, self._peak_flops = codes_per_step, flop_per_step, peak_flops
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_STEPS)
        self._is_writer = is_writer
        self._views: list[LiveView] = []
        if is_writer:
            self._open_views(run_path, attempt)

    def start(self, step: int, seconds: dict[str, float]) -> None:
        """Shows that this attempt is ready to go on from `step`, and what that took: seconds by what they were for."""
        self._tell(lambda view: view.start({"step": step, "time": time.time(), "seconds": seconds}))

    def record(self, record: dict[str, Any], part_seconds: dict[str, float]) -> None:
        """Shows a step that has ended.

        Args:
            record: `step`, `loss`, `learning_rate`, `grad_norm` and any other numbers; what is no number is left out.
            part_seconds: seconds of the step's parts, from `StepTimer.finish`.
        """
        if not self._is_writer:
            return
        seconds = sum(part_seconds.values())
        line = {name: value for name, value in record.items() if is_number(value)}
        line |= {"seconds": seconds, f"{self._unit}_per_second": self._codes_per_step / seconds}
        if self._peak_flops is not None:
            line["mfu"] = self._flop_per_step / seconds / self._peak_flops
        line |= {"time": time.time(), "part_seconds": part_seconds}
        self._recent.append(line)
        self._tell(lambda view: view.step(line))
        num_done = line["step"] + 1
        if num_done % self._log_every_steps == 0 or num_done == self._num_steps:
            logger.info("%s", progress_line(list(self._recent), self._num_steps, self._unit, self._loss_unit))

    def commit(self, step: int, **measured: float) -> None:
        """Shows that the checkpoint after `step` steps was committed, with what was measured on it."""
        self._tell(lambda view: view.commit({"step": step, "time": time.time(), **measured}))

    def rollback(self, step: int) -> None:
        """Shows that the run goes on from `step` and has undone what it did from there on."""
        self._recent.clear()
        self._tell(lambda view: view.rollback({"step": step, "time": time.time()}))

    def close(self) -> None:
        """Flushes every view, and uploads for the last time."""
        self._tell(lambda view: view.close())
        self._views = []

    def _open_views(self, run_path: str, attempt: str) -> None:
        is_local = storage.is_local(run_path)
        folder = run_path if is_local else tempfile.mkdtemp(prefix="tessera-metrics-")
        self._open(lambda: JsonLines(os.path.join(folder, "metrics", f"{attempt}.jsonl")))
        self._open(lambda: TensorBoard(os.path.join(folder, "tensorboard"), attempt))
        if RayMetrics.is_at_hand():
            self._open(lambda: RayMetrics(run_path))
        if not is_local:
            self._open(lambda: Mirror(folder, run_path))  # last, so that it closes after the files that it copies

    def _open(self, build: Callable[[], LiveView]) -> None:
        try:
            self._views.append(build())
        except Exception as error:
            _warn("A live view of the run", error)

    def _tell(self, say: Callable[[LiveView], None]) -> None:
        for view in list(self._views):
            try:
                say(view)
            except Exception as error:  # whatever a view meets, training goes on
                self._views.remove(view)
                _warn(type(view).__name__, error)


def progress_line(
    recent: list[dict[str, Any]], num_steps: int, unit: str = "codes", loss_unit: str = "nats/code"
) -> str:
    """How far a run is and how fast, from the lines of its recent steps, the last one last.

    The rate is that of the median step, so that a pause or a slow start does not bend it; shares are of all recent time.
    """
    last, total = recent[-1], sum(line["seconds"] for line in recent)
    typical = statistics.median(line["seconds"] for line in recent)
    num_done = last["step"] + 1

    def share(part: str) -> str:
        return f"{sum(line['part_seconds'].get(part, 0.0) for line in recent) / total:.1%}"

    words = [f"step {num_done}/{num_steps}", f"loss {last['loss']:.4f} {loss_unit}".rstrip()]
    words += [f"grad norm {last['grad_norm']:.3g}", f"lr {last['learning_rate']:.2e}"]
    words += [f"{last[f'{unit}_per_second'] * last['seconds'] / typical:.0f} {unit}/s"]
    words += [f"{name} {last[name]:.3g}" for name in EXTRA_NUMBERS if name in last]
    if "mfu" in last:
        words.append(f"MFU {last['mfu'] * last['seconds'] / typical:.1%}")
    words += [f"data stall {share(DATA)}", f"checkpoint stall {share(CHECKPOINT)}"]
    return "  ".join([*words, f"ETA {hours((num_steps - num_done) * typical)}"])


def hours(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def read_metrics(run_path: str) -> list[dict[str, Any]]:
    """What every step of a run last reported, over all attempts, in order of step.

    An attempt begins at a commit, so whatever earlier attempts did from its first step on is undone, as is what comes before a
    rollback from that step on. A line that a kill cut off is left out.

    Raises:
        StorageError: the store cannot be read.
    """
    attempts = [_read_lines(path) for path in storage.list_files(storage.join(run_path, "metrics"), ".jsonl")]
    steps: dict[int, dict[str, Any]] = {}
    for lines in sorted((lines for lines in attempts if lines), key=lambda lines: lines[0]["time"]):
        for i, line in enumerate(lines):
            if i == 0 or line.get("event") == "rollback":
                steps = {step: kept for step, kept in steps.items() if step < line["step"]}
            if "event" not in line:
                steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)]


def _read_lines(path: str) -> list[dict[str, Any]]:
    whole_lines = storage.read_bytes(path).split(b"\n")[:-1]
    return [json.loads(line) for line in whole_lines]


def _warn(what: str, error: Exception) -> None:
    text = "%s stops: %s: %s. Training goes on, and its commits are untouched."
    logger.warning(text, what, type(error).__name__, error)
