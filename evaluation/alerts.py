"""Who was told of which regression: each hook of each record once, whatever else fails and whoever else looks."""

import json
import logging
from collections.abc import Callable, Sequence

from evaluation.compare import Regression
from evaluation.hooks import hooks_of, notify
from pipeline import storage
from stages.errors import TesseraError
from stages.options import NightlyOptions

logger = logging.getLogger(__name__)

LOG = "log"  # who is told where no hook is set


class Alerts:
    """The alerts of one evaluation folder. A file `alerts/<record>.<hook>.json` says that a hook was told.

    Args:
        evaluation_path: the folder.
        settings: names the hooks.
        take_claim: whether a piece of work, by name, is ours and not another nightly's.
    """

    def __init__(self, evaluation_path: str, settings: NightlyOptions, take_claim: Callable[[str], bool]):
        self._folder = storage.join(evaluation_path, "alerts")
        self._hooks = hooks_of(settings) or {LOG: ""}
        self._take_claim = take_claim

    def pending(self, regressions: Sequence[Regression]) -> list[Regression]:
        """Those that some hook was not told of, nor is another nightly about to."""

        def is_ours(record_id: str) -> bool:
            return self._is_pending(record_id) and self._take_claim(f"alert-{record_id}") and self._is_pending(record_id)

        ours = {record_id for record_id in {regression.record.id for regression in regressions} if is_ours(record_id)}
        return [regression for regression in regressions if regression.record.id in ours]

    def tell(self, regressions: Sequence[Regression], page: str) -> None:
        """Tells every hook what it was not told.

        Raises:
            TesseraError: hooks fail; all have been tried.
        """
        for regression in regressions:
            _log(regression)
        problems = []
        for hook, setting in self._hooks.items():
            untold = [regression for regression in regressions if not storage.exists(self._path(regression.record.id, hook))]
            message = {"page": page, "regressions": [regression.to_dict() for regression in untold]}
            try:
                if untold and hook != LOG:
                    notify(hook, setting, message)
            except TesseraError as error:
                problems.append(str(error))
                continue
            for regression in untold:
                storage.put_if_absent(self._path(regression.record.id, hook), json.dumps(message).encode())
        if problems:
            raise TesseraError("\n".join(problems))

    def _is_pending(self, record_id: str) -> bool:
        return not all(storage.exists(self._path(record_id, hook)) for hook in self._hooks)

    def _path(self, record_id: str, hook: str) -> str:
        return storage.join(self._folder, f"{record_id}.{hook}.json")


def _log(regression: Regression) -> None:
    difference = regression.difference
    logger.warning(
        "%s of step %d is %.6g, %.1f standard errors worse than %.6g of step %d (%s)",
        difference.metric,
        regression.record.step,
        difference.after,
        difference.worse_by,
        difference.before,
        regression.best.step,
        regression.record.run,
    )
