"""Reading images from a source whose storage may fail for a moment."""

import logging
import time

from pipeline.sources import Source
from stages.errors import BadImage

logger = logging.getLogger(__name__)

MISSING = "missing"  # kind of a listed image that is not there
READ_ATTEMPTS = 4
READ_RETRY_SECONDS = 1.0


def fetch(source: Source, uri: str) -> bytes:
    """An image's bytes. A file that is not there is that image's fault; other storage faults are retried, then raised.

    Raises:
        BadImage: the listed image does not exist (missing).
        OSError: storage kept failing.
    """
    for attempt in range(READ_ATTEMPTS):
        try:
            return source.fetch(uri)
        except FileNotFoundError as error:
            raise BadImage(MISSING, str(error)) from error
        except OSError as error:
            if attempt == READ_ATTEMPTS - 1:
                raise
            logger.warning("Reading %s failed (%s); trying again", uri, error)
            time.sleep(READ_RETRY_SECONDS * 2**attempt)
    raise AssertionError("unreachable")
