"""How far long work is: a bar on a terminal, else a log line every few seconds."""

import logging
import sys
import time

from tqdm import tqdm

LOG_SECONDS = 5.0


class Progress:
    """Counts finished pieces of work.

    Args:
        what: the pieces, in the plural.
        total: how many there are.
        logger: of the caller, for the lines.
    """

    def __init__(self, what: str, total: int, logger: logging.Logger):
        self._what, self._total, self._logger = what, total, logger
        self._done, self._started = 0, time.monotonic()
        self._logged = self._started
        self._bar = tqdm(total=total, desc=what, smoothing=0.1) if sys.stderr.isatty() else None

    def advance(self, count: int = 1) -> None:
        """Counts more pieces as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            if self._done >= self._total:
                self._bar.close()
            return
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS or self._done >= self._total:
            left = (self._total - self._done) * (now - self._started) / self._done
            self._logger.info("%d of %d %s done, about %.0f s left", self._done, self._total, self._what, left)
            self._logged = now
