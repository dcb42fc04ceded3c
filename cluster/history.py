"""What a training run of either stage has done, as one rank keeps it between commits and as a commit tells it."""

import os
from typing import Any

from cluster import checkpoints, run_log
from cluster.spikes import NUM_STEPS_BEFORE
from pipeline.order import batch_index, skip_batches


class History:
    """Steps made, batches left out and faults undone.

    Args:
        run_path: of the run.
        skip_batches: global batches up to an offending one that are left out.
        facts: what else a commit says that does not change from step to step; with a `sampler`, to which step and gaps are added.

    Attributes:
        step: optimizer steps made.
        parent: the newest commit.
        skipped: half-open ranges of global batches that the run leaves out.
        events: faults that were undone: step, batch, fault, back_to (step) and skips (a range).
        records: log records of the steps since the last checkpoint was started.
        recent_losses: of the last steps, for telling a spike.
    """

    def __init__(self, run_path: str, skip_batches: int, facts: dict[str, Any]):
        self._run_path, self._skip_batches, self._facts = run_path, skip_batches, facts
        self.step = 0
        self.parent: checkpoints.Commit | None = None
        self.skipped: tuple[tuple[int, int], ...] = ()
        self.events: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.recent_losses: list[float] = []

    def restore(self, commit: checkpoints.Commit) -> None:
        """Goes to where a commit was."""
        content = commit.content
        self.step, self.parent, self.records = commit.step, commit, []
        self.skipped = tuple((start, stop) for start, stop in content["sampler"]["skipped"])
        self.events = content["events"]
        log = run_log.read_tail(self._run_path, content["log"], NUM_STEPS_BEFORE)
        self.recent_losses = [record["loss"] for record in log]

    @property
    def last_fault(self) -> int:
        """The highest step that a fault was found in; -1 when none was."""
        return max((event["step"] for event in self.events), default=-1)

    def append(self, record: dict[str, Any]) -> None:
        """One more step."""
        self.step += 1
        self.records.append(record)
        self.recent_losses = [*self.recent_losses, record["loss"]][-NUM_STEPS_BEFORE:]

    def take_records(self) -> list[dict[str, Any]]:
        """The records since the last checkpoint, for the one that is started now."""
        records, self.records = self.records, []
        return records

    def undo(self, commit: checkpoints.Commit, record: dict[str, Any], fault: str) -> dict[str, Any]:
        """Goes back to a commit and leaves out the batches up to the one of a faulty step. Returns the event."""
        skipped, events = self.skipped, self.events
        stop = record["batch"] + 1
        start = max(batch_index(commit.step, skipped), stop - self._skip_batches)
        event = {"step": record["step"], "batch": record["batch"], "fault": fault, "back_to": commit.step}
        event["skips"] = [start, stop]
        self.restore(commit)
        self.skipped, self.events = skip_batches(skipped, start, stop), [*events, event]
        return event

    def commit_content(
        self,
        step: int,
        attempt: str,
        records: list[dict[str, Any]],
        measured: dict[str, float],
        files: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """What COMMIT.json says of the checkpoint after `step` steps, of which `records` are new; stores their log segment."""
        facts, parent = self._facts, self.parent
        previous = run_log.EMPTY_HASH if parent is None else parent.content["sample_log_hash"]
        segment = run_log.write_segment(self._run_path, f"step-{step:09d}-{attempt}", records)
        return {
            **facts,
            "step": step,
            "attempt": attempt,
            "parent": None if parent is None else os.path.basename(parent.path),
            "train_loss": records[-1]["loss"],
            "measured": measured,
            "events": self.events,
            "sampler": {**facts["sampler"], "step": step, "skipped": [list(batches) for batches in self.skipped]},
            "log": ([] if parent is None else parent.content["log"]) + [segment],
            "sample_log_hash": run_log.chain(previous, records),
            "files": files,
        }
