"""Which record was judged, and who was told what: each hook of each record once, whatever else fails and whoever else looks.

All of it is in the names of files `alerts/<record>.<state>.json`: `fine` or `worse` when a night has judged the record, the latter
with what is to be told; `<hook>.due` when a hook is to be told, and `<hook>` when it was. A night makes due the hooks that it has:
those of another nightly of the same folder keep to their own, and one that is set later is not told what is long past.
"""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from evaluation.compare import standard_errors_text
from evaluation.hooks import hooks_of, notify
from pipeline import storage
from stages.errors import TesseraError
from stages.options import NightlyOptions

logger = logging.getLogger(__name__)

FINE, WORSE = "fine", "worse"
LOG = "log"  # who is told where no hook is set

Found = list[dict[str, Any]]  # of one record, each from `Regression.to_dict`


class Alerts:
    """The alerts of one evaluation folder.

    Args:
        evaluation_path: the folder.
        settings: names the hooks.
        take_claim: whether a piece of work, by name, is ours and not another nightly's.
    """

    def __init__(self, evaluation_path: str, settings: NightlyOptions, take_claim: Callable[[str], bool]):
        self._folder = storage.join(evaluation_path, "alerts")
        self._hooks = hooks_of(settings) or {LOG: ""}
        self._take_claim = take_claim

    def judged(self) -> set[str]:
        """Records, by id, that a night has looked at."""
        records = self._records_by_state()
        return records[FINE] | records[WORSE]

    def note(self, record_id: str, found: Found) -> None:
        """Keeps what a record is judged to be, until it is told: also if this process does not live to tell it."""
        for hook in self._hooks if found else ():
            storage.put_if_absent(self._path(record_id, due(hook)), b"{}")
        storage.put_if_absent(self._path(record_id, WORSE if found else FINE), json.dumps(found).encode())

    def pending(self, record_ids: Collection[str]) -> dict[str, Found]:
        """What was found in these records, by id, that some hook was not told of, nor is another nightly about to."""
        records = self._records_by_state()
        owed = {record_id for hook in self._hooks for record_id in records[due(hook)] - records[hook]}
        untold = sorted(owed & records[WORSE] & set(record_ids))
        return {record_id: json.loads(storage.read_bytes(self._path(record_id, WORSE))) for record_id in untold if self._is_ours(record_id)}

    def tell(self, pending: Mapping[str, Found], page: str) -> None:
        """Tells every hook what it was not told.

        Raises:
            TesseraError: hooks fail; all have been tried.
        """
        for found in pending.values():
            for regression in found:
                _log(regression)
        problems = []
        for hook, setting in self._hooks.items():
            untold = [record_id for record_id in pending if self._is_owed(record_id, hook)]
            message = {"page": page, "regressions": [regression for record_id in untold for regression in pending[record_id]]}
            try:
                if untold and hook != LOG:
                    notify(hook, setting, message)
            except TesseraError as error:
                problems.append(str(error))
                continue
            for record_id in untold:
                storage.put_if_absent(self._path(record_id, hook), b"{}")
        if problems:
            raise TesseraError("\n".join(problems))

    def _is_ours(self, record_id: str) -> bool:
        return self._take_claim(f"alert-{record_id}") and any(self._is_owed(record_id, hook) for hook in self._hooks)

    def _is_owed(self, record_id: str, hook: str) -> bool:
        return storage.exists(self._path(record_id, due(hook))) and not storage.exists(self._path(record_id, hook))

    def _records_by_state(self) -> defaultdict[str, set[str]]:
        """From one listing of the folder."""
        records: defaultdict[str, set[str]] = defaultdict(set)
        for path in storage.list_files(self._folder, suffix=".json"):
            record_id, _, state = os.path.basename(path).removesuffix(".json").partition(".")
            records[state].add(record_id)
        return records

    def _path(self, record_id: str, state: str) -> str:
        return storage.join(self._folder, f"{record_id}.{state}.json")


def due(hook: str) -> str:
    """The state of a record of which a hook is to be told."""
    return f"{hook}.due"


def _log(regression: Mapping[str, Any]) -> None:
    logger.warning(
        "%s of step %d is %.6g, worse than %.6g of step %d by %s (%s)",
        *(regression[name] for name in ("metric", "step", "after", "before", "best_step")),
        standard_errors_text(regression["worse_by"]),
        regression["run"],
    )
