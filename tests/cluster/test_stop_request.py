"""SIGTERM to a driver is a request first and an end after that."""

import os
import signal

import pytest
import ray
from cluster_support import wait_until

from cluster.stop_request import StopRequest


@pytest.mark.ray
def test_a_first_sigterm_asks_and_a_second_ends(ray_cluster):
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    try:
        request = StopRequest()
        with request.on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.is_made and not ended
            wait_until(lambda: ray.get(request._actor.is_made.remote()), "the workers can see it")
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended
    finally:
        signal.signal(signal.SIGTERM, before)
