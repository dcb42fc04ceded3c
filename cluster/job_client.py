"""Ray's job server as it is met in practice: locked, out of reach, or gone while a job is followed.

Ray is imported inside functions, after its authentication mode has been chosen: Ray reads that when it is first imported.
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stages.errors import ConfigError, TesseraError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 30.0  # an answer takes milliseconds; a machine that vanished never answers
PING_SECONDS = 5.0  # between two questions whether the head is still there, while its log says nothing
PAUSE_SECONDS = 1.0  # before trying again
DEFAULT_TOKEN_PATH = "~/.ray/auth_token"


def use_cluster(address: str | None) -> str:
    """The address of a head's dashboard; makes Ray's client go there, with a token if there is one, and say less.

    To be called before Ray is imported.

    Raises:
        ConfigError: no address, one that is not http, or a token file that is not there.
    """
    if not address:
        raise ConfigError(
            "--address is not set, but submit needs a cluster. Give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS."
        )
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address is {address}, but it must be the http:// address of the head's dashboard. Write http://HEAD:8265."
        )
    address = address.rstrip("/")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray prefers to the address it is given
    if _token_source() is not None:
        os.environ.setdefault(
            "RAY_AUTH_MODE", "token"
        )  # unlike `ray start`, Ray's client shows a token only if told to
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(
        logging.ERROR
    )  # names folders it leaves out anyway
    return address


def _token_source() -> str | None:
    """Where Ray finds a token, in its own order; None if nowhere."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = named or DEFAULT_TOKEN_PATH
    if os.path.isfile(os.path.expanduser(path)):
        return path
    if named:
        raise ConfigError(
            f"RAY_AUTH_TOKEN_PATH is {named}, but there is no such file. Name the file with the head's token."
        )
    return None


def connect(address: str) -> "JobSubmissionClient":
    """A client of the job server at an address from `use_cluster`.

    Raises:
        TesseraError: nothing answers there, something else than Ray does, or the token is missing or wrong.
    """
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, timeout=REQUEST_SECONDS, **kwargs)

    with explained(address):
        return Client(address)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Raises what goes wrong between here and a job server as a TesseraError that says what to do."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise TesseraError(_refusal(address, is_wrong=error.message.startswith("Authentication failed"))) from None
    except (ConnectionError, requests.RequestException) as error:
        raise TesseraError(
            f"--address is {address}, but no Ray head answers there ({error}). Check the address, and that the head runs with "
            "its dashboard on a host and port that can be reached from here."
        ) from None
    except RuntimeError as error:
        raise TesseraError(
            f"--address is {address}, but what answers there declines: {error} Check that it is a Ray head, and its logs."
        ) from None


def _refusal(address: str, is_wrong: bool) -> str:
    remedy = (
        f"Use the head's: `ray get-auth-token` there prints it; RAY_AUTH_TOKEN or {DEFAULT_TOKEN_PATH} here holds it."
    )
    if is_wrong:
        return f"{_token_source()} is a token, but not that of {address}, which accepts no other. {remedy}"
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return f"RAY_AUTH_MODE is {os.environ['RAY_AUTH_MODE']}, but {address} wants a token. Unset it. {remedy}"
    return f"RAY_AUTH_TOKEN is not set, nor is there {DEFAULT_TOKEN_PATH}, but {address} wants a token. {remedy}"


def follow(client: "JobSubmissionClient", job: str, retry_seconds: float) -> "JobDetails":
    """Prints the log of a job as it comes and returns how it ended, over as many connections as that takes.

    Args:
        client: as `connect` gives it.
        job: its submission id.
        retry_seconds: how long a head may be silent.

    Raises:
        TesseraError: the head was silent for longer, or does not know the job.
    """
    import aiohttp
    import requests

    follower, is_lost, address = _Follower(client, job), False, client.get_address()
    while True:
        try:
            client.get_job_info(job)
            asyncio.run(follower.run())
            info = client.get_job_info(job)
            if info.status.is_terminal():
                follower.end_line()
                return info
            follower.answered, is_lost = time.monotonic(), False
        except BrokenPipeError:  # nobody reads what is printed any more
            raise
        except (OSError, RuntimeError, aiohttp.ClientError, requests.RequestException) as error:
            if "does not exist" in str(error):
                raise TesseraError(
                    f"The job is {job}, but the head at {address} knows none of that name: it is mistyped, or the head was "
                    "started anew. Submit the command again; what is committed is not lost."
                ) from None
            silent = time.monotonic() - follower.answered
            if silent > retry_seconds:
                raise TesseraError(
                    f"--address is {address}, but the head there has not answered for {silent:.0f} s ({error}). If it lives, "
                    f"so does the job: follow it with submit --address {address} --follow {job}. If it is gone, start it anew "
                    "and submit the command again."
                ) from None
            if not is_lost:
                logger.warning("Lost the connection to %s; trying for %.0f s to get it back", address, retry_seconds)
            is_lost = True
        time.sleep(PAUSE_SECONDS)


class _Follower:
    """Prints the log of a job once, though every new connection sends it from the start.

    Attributes:
        answered: when the head was last heard, in seconds of the monotonic clock.
    """

    def __init__(self, client: "JobSubmissionClient", job: str):
        self.answered = time.monotonic()
        self._client, self._job = client, job
        self._num_printed = 0  # characters
        self._is_line_open = False

    async def run(self) -> None:
        """Prints until the log ends. Raises what ended the connection, or why the head is taken for lost."""
        tail, watch = asyncio.create_task(self._print()), asyncio.create_task(self._watch())
        done, _ = await asyncio.wait({tail, watch}, return_when=asyncio.FIRST_COMPLETED)
        await (tail if tail in done else watch)

    async def _print(self) -> None:
        position = 0
        async for text in self._client.tail_job_logs(self._job):
            self.answered = time.monotonic()
            new = text[max(0, self._num_printed - position) :]
            position += len(text)
            if new:
                print(new, end="", flush=True)
                self._num_printed, self._is_line_open = position, not new.endswith("\n")

    def end_line(self) -> None:
        """What is printed next begins a line, also after a driver that was cut off within one."""
        if self._is_line_open:
            print(flush=True)

    async def _watch(self) -> None:
        """A connection to a machine that vanished stays open and silent; a question has to be answered in time."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            await asyncio.to_thread(self._client.get_job_info, self._job)
            self.answered = time.monotonic()
