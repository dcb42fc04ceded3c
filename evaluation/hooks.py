"""What tells people: a command and a webhook, each given the same JSON."""

import http.client
import json
import os
import re
import subprocess
import urllib.error
import urllib.request
from typing import Any

from stages.errors import ConfigError, TesseraError
from stages.options import NightlyOptions

TIMEOUT_SECONDS = 60.0


def hooks_of(options: NightlyOptions) -> dict[str, str]:
    """The hooks that are set, by name: command, webhook."""
    hooks = {"command": options.command, "webhook": options.webhook}
    return {name: setting for name, setting in hooks.items() if setting}


def check_hooks(options: NightlyOptions) -> None:
    """Refuses a webhook that nothing can be posted to, before there is anything to tell.

    Raises:
        ConfigError: its address names variables that are not set, or is none of http.
    """
    url = options.webhook
    if not url:
        return
    unset = [name for name in re.findall(r"\$\{?(\w+)", url) if name not in os.environ]
    if unset:
        raise ConfigError(
            f"nightly.webhook is {url}, but where nightly runs there is no {', '.join(unset)} in the environment. Set it there: for a job "
            f"on a cluster, on its head node."
        )
    if not os.path.expandvars(url).startswith(("http://", "https://")):
        raise ConfigError(f"nightly.webhook is {url}, but it must be an address that begins with http:// or https://. Write it whole.")


def notify(name: str, setting: str, message: dict[str, Any]) -> None:
    """Gives a message to one hook of `hooks_of`: runs the command, or posts to the webhook. Raises TesseraError: that fails."""
    call = {"command": _run, "webhook": _post}[name]
    try:
        call(setting, json.dumps(message).encode())
    except (subprocess.SubprocessError, urllib.error.URLError, TimeoutError) as error:
        raise TesseraError(f"nightly.{name} is {setting}, but it fails ({error}). Mend it; it is tried again.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Their text may hold the address as it is, with what the environment put into it.
        kind = type(error).__name__
        raise TesseraError(f"nightly.{name} is {setting}, but it fails ({kind}). Mend it; it is tried again.") from None


def _run(command: str, data: bytes) -> None:
    subprocess.run(command, shell=True, input=data, check=True, timeout=TIMEOUT_SECONDS)


def _post(url: str, data: bytes) -> None:
    request = urllib.request.Request(os.path.expandvars(url), data, {"Content-Type": "application/json"})
    urllib.request.build_opener(_RefusesRedirects).open(request, timeout=TIMEOUT_SECONDS).close()


class _RefusesRedirects(urllib.request.HTTPRedirectHandler):
    """urllib follows a redirect with a GET: nobody gets the message, and it looks as if somebody had."""

    def redirect_request(self, request: Any, response: Any, code: int, reason: str, headers: Any, target: str) -> None:
        # Not the target: its text may hold what the environment put into the address.
        raise urllib.error.HTTPError(request.full_url, code, "it redirects; name the address that it leads to", headers, response)
