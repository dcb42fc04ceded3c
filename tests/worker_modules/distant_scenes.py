"""A source of images that lie far away, so that every phase that reads them lasts long enough to be disturbed."""

import time

from pipeline.sources.scenes import Scenes

SECONDS_PER_IMAGE = 0.03


class DistantScenes(Scenes):
    """Scenes that take their time to arrive."""

    def fetch(self, uri: str) -> bytes:
        time.sleep(SECONDS_PER_IMAGE)
        return super().fetch(uri)
