"""Claims on work, so that two nightlies do not do the same evaluation; a dead one's claim runs out.

A claim is a chain of files `claims/<id>/000000.json`, `000001.json` …, each made put-if-absent. The last one counts: its
owner renews the time in it. When that is too old, or the owner has given it back, whoever makes the next file has the
claim. Claims only save work: should two owners believe in the same one (a process that was stopped for long, clocks that
disagree), both evaluate, and the record, itself put-if-absent, is still written once.
"""

import json
import logging
import os
import platform
import threading
import time
from typing import Any

from pipeline import storage
from stages.errors import StorageError

logger = logging.getLogger(__name__)

NUM_RENEWALS = 5  # within claim_seconds


class Claim:
    """A claim that is held; renewed by a thread until `release`. From `take_claim`."""

    def __init__(self, path: str, claim_seconds: float):
        self._path = path
        self._interval = claim_seconds / NUM_RENEWALS
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the claim back: another may take it at once."""
        self._released.set()
        self._thread.join()
        storage.replace(self._path, _content(is_released=True))

    def _renew(self) -> None:
        while not self._released.wait(self._interval):
            try:
                storage.replace(self._path, _content())
            except (OSError, StorageError) as error:  # the work goes on: at worst it is done twice
                logger.warning("%s could not be renewed: %s", self._path, error)


def take_claim(folder: str, identifier: str, claim_seconds: float) -> Claim | None:
    """The claim on a piece of work, or None while another process holds it.

    Args:
        folder: of all claims.
        identifier: of the work.
        claim_seconds: how long a claim counts that is not renewed. The clocks of all machines must agree to within it.
    """
    chain = storage.list_files(storage.join(folder, identifier), suffix=".json")
    if chain and is_live(chain[-1], claim_seconds):
        return None
    number = int(os.path.basename(chain[-1]).removesuffix(".json")) + 1 if chain else 0
    path = storage.join(folder, identifier, f"{number:06d}.json")
    return Claim(path, claim_seconds) if storage.put_if_absent(path, _content()) else None


def is_live(path: str, claim_seconds: float) -> bool:
    """Whether the claim in a file still counts."""
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return False
    return not content["is_released"] and time.time() - content["renewed_at"] < claim_seconds


def _content(is_released: bool = False) -> bytes:
    content: dict[str, Any] = {
        "owner": f"{platform.node()}:{os.getpid()}",
        "renewed_at": time.time(),
        "is_released": is_released,
    }
    return json.dumps(content).encode()
