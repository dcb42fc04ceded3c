import io
import logging
import sys

import pytest

from pipeline import progress
from pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Progress("shards", 3, logging.getLogger("test"))
    for _ in range(3):
        shown.advance()
    assert "shards" in terminal.getvalue() and "3/3" in terminal.getvalue()


@pytest.mark.parametrize("seconds, expected", [(1e9, ["3 of 3"]), (0.0, ["1 of 3", "3 of 3"])])
def test_a_log_gets_a_line_now_and_then_and_at_the_end(monkeypatch, caplog, seconds, expected):
    monkeypatch.setattr(progress, "LOG_SECONDS", seconds)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO):
        shown = Progress("shards", 3, logging.getLogger("test"))
        shown.advance()
        shown.advance(2)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" shards")[0] for line in lines] == expected
    assert lines[-1].endswith("about 0 s left")
