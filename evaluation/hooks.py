"""What tells people: a command and a webhook, each given the same JSON."""

import json
import os
import subprocess
import urllib.error
import urllib.request
from typing import Any

from stages.errors import TesseraError
from stages.options import NightlyOptions

TIMEOUT_SECONDS = 60.0


def notify(options: NightlyOptions, message: dict[str, Any]) -> None:
    """Runs `nightly.command` and posts to `nightly.webhook`, where they are set.

    Raises:
        TesseraError: one of them fails; both have been tried.
    """
    data, problems = json.dumps(message).encode(), []
    for call, setting in ((_run, options.command), (_post, options.webhook)):
        if setting:
            try:
                call(setting, data)
            except (OSError, subprocess.SubprocessError, urllib.error.URLError, ValueError) as error:
                name = "command" if call is _run else "webhook"
                problems.append(f"nightly.{name} is {setting}, but it fails ({error}). Mend it; it is tried again.")
    if problems:
        raise TesseraError("\n".join(problems))


def _run(command: str, data: bytes) -> None:
    subprocess.run(command, shell=True, input=data, check=True, timeout=TIMEOUT_SECONDS)


def _post(url: str, data: bytes) -> None:
    request = urllib.request.Request(os.path.expandvars(url), data, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
