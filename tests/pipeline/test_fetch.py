"""Storage that fails for a moment is asked again; a file that is not there is the fault of an image."""

import pytest

from pipeline.fetch import fetch
from stages.errors import BadImage


class Flaky:
    """A source whose storage fails a number of times before it answers."""

    class_names = ()

    def __init__(self, *faults):
        self.faults = list(faults)

    def fetch(self, uri):
        if self.faults:
            raise self.faults.pop(0)
        return b"data"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("pipeline.fetch.READ_RETRY_SECONDS", 0.0)


def test_storage_faults_are_retried():
    assert fetch(Flaky(TimeoutError(), PermissionError()), "uri") == b"data"


def test_storage_that_keeps_failing_is_no_bad_image():
    with pytest.raises(PermissionError, match="locked"):
        fetch(Flaky(*[PermissionError("locked")] * 100), "uri")


def test_a_file_that_is_gone_is_a_bad_image():
    with pytest.raises(BadImage) as error:
        fetch(Flaky(FileNotFoundError("gone")), "uri")
    assert error.value.kind == "missing"
