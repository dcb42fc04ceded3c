"""Ends a process that makes no progress, so that its group restarts instead of waiting without end."""

import faulthandler
import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

EXIT_CODE = 70
MAX_POLL_SECONDS = 5.0


class Watchdog:
    """Ends this process when `feed` was not called for `timeout_seconds`, after printing what every thread was doing.

    In a `with` statement it watches what is inside.

    A rank that hangs keeps all others waiting in a collective; each of them has a watchdog, so the whole group ends. A stopped
    process cannot end itself: Ray finds that it answers no health check.
    """

    def __init__(self, timeout_seconds: float):
        self.timeout_seconds = timeout_seconds
        self._fed_at = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def feed(self) -> None:
        """There was progress."""
        self._fed_at = time.monotonic()

    def stop(self) -> None:
        """Nothing is to be watched any more."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(MAX_POLL_SECONDS, self.timeout_seconds / 4)):
            if time.monotonic() - self._fed_at > self.timeout_seconds:
                logger.error(
                    "No step ended for %.0f s (scaling.hang_timeout_seconds). This process ends, and its group restarts from "
                    "the last commit. What its threads were doing:",
                    self.timeout_seconds,
                )
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(EXIT_CODE)
