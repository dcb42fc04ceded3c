"""`submit`: a command as a Ray job, with the right working directory, its log as it comes and the driver's real exit code.

What travels is the checkout, less what .rayignore leaves out, and a few variables (`travelling`). A job's variables are shown
to everyone who may look at the cluster, so nothing secret is among them: credentials belong to the nodes.
"""

import argparse
import ipaddress
import logging
import os
import re
import shlex
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.job_client import connect, explained, follow
from pipeline import storage
from pipeline.job_options import section_paths
from pipeline.sources import SOURCES
from stages.config import load_config
from stages.errors import ConfigError, TesseraError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130  # what a shell gives for a command that Ctrl-C ended
PYTHON_MISSING = 127  # the same for a command that is not there

# Which sections of a configuration a command takes paths from.
SECTIONS = {
    "plan": ("source", "tokenizer"),
    "train-tokenizer": ("source", "tokenizer", "tokenizer_train"),
    "tokenize": ("source", "tokenizer", "codes"),
    "train": ("run", "tokenizer", "codes", "conditioning", "train"),
    "sample": ("run", "tokenizer", "conditioning", "sampling"),
    "evaluate": ("run", "source", "tokenizer", "codes", "conditioning", "evaluation"),
    "reference": ("source", "evaluation"),
    "nightly": ("run", "source", "tokenizer", "codes", "conditioning", "evaluation", "nightly"),
}
# Arguments that are paths, with what the command line calls them.
PATH_ARGUMENTS = {
    "path": "PATH",
    "file": "FILE",
    "output": "--output",
    "tokenizer": "tokenizer",
    "checkpoint": "checkpoint",
    "verify": "--verify",
    "compare": "--compare",
    "condition_tokenizer": "--condition-tokenizer",
}

# Where a store is and how Ray and the collectives behave; who asks is not among them.
VARIABLES = ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
PREFIXES = ("RAY_TRAIN_", "NCCL_", "TORCH_NCCL_", "GLOO_")


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """How a command is run as a Ray job.

    Attributes:
        address: of the head's dashboard, from `cluster.job_client.use_cluster`.
        words: a command of ray_job.py and its arguments; none with `follow`.
        job_id: name of the job; one is made up if not given.
        follow: name of a job to follow instead of submitting one.
        wait: follow the job to its end.
        python: the interpreter on the head.
        retry_seconds: how long a head may be silent while it is followed.
    """

    address: str
    words: tuple[str, ...] = ()
    job_id: str | None = None
    follow: str | None = None
    wait: bool = True
    python: str = "python"
    retry_seconds: float = 60.0


def submit(options: SubmitOptions) -> dict[str, Any]:
    """Runs `python ray_job.py COMMAND …` as a Ray job, or follows one that runs.

    Returns:
        job, status, and exit_code: the driver's (128 + signal if one ended it), None if that is not waited for.

    Raises:
        ConfigError: the name or the checkout cannot be used.
        TesseraError: no way to the head, or none any more.
    """
    if options.job_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", options.job_id):
        raise ConfigError(
            f"--job-id is {options.job_id!r}, but it must be letters, digits, `-`, `_` and `.`. Choose another."
        )
    if options.follow and not options.wait:
        raise ConfigError(f"--no-wait is given, but --follow {options.follow} waits. Leave one of them out.")
    address = options.address
    client = connect(address)
    job = options.follow or _start(client, address, options)
    mode = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""
    hint = (
        f"Follow it: python ray_job.py submit --address {address} --follow {job}\n"
        f"Stop it:   {mode}ray job stop --address {address} {job}"
    )
    if not options.wait:
        print(f"{job} is submitted.\n{hint}", flush=True)
        return {"job": job, "status": "PENDING", "exit_code": None}
    try:
        with explained(address):
            info = follow(client, job, options.retry_seconds)
    except KeyboardInterrupt:
        print(f"\n{job} goes on without being followed.\n{hint}", flush=True)
        return {"job": job, "status": "RUNNING", "exit_code": INTERRUPTED}
    code = _exit_code(info.status.value, info.driver_exit_code)
    if code:
        logger.error("%s: %s", job, _reason(info, options.python))
    return {"job": job, "status": info.status.value, "exit_code": code}


def _start(client: "JobSubmissionClient", address: str, options: SubmitOptions) -> str:
    from pipeline.lineage import lineage

    if not all((CHECKOUT / name).is_file() for name in ("ray_job.py", ".rayignore")):
        raise ConfigError(f"The code is in {CHECKOUT}, but a job takes along a checkout. Run ray_job.py in one.")
    job = options.job_id or f"{options.words[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    variables = travelling(os.environ, address)
    logger.info("%s takes along %s", job, ", ".join(sorted(variables)) or "no variables")
    commit = lineage()["git_sha"]
    try:
        with explained(address):
            client.submit_job(
                entrypoint=shlex.join([options.python, "ray_job.py", *options.words]),
                submission_id=job,
                runtime_env={
                    "working_dir": str(CHECKOUT),
                    "env_vars": variables | ({"TESSERA_GIT_SHA": commit} if commit else {}),
                },
                metadata={"command": options.words[0]},
            )
    except TesseraError as error:
        if "already exists" in str(error):
            raise ConfigError(
                f"--job-id is {job}, but the cluster has had a job of that name. Choose another, or leave it out."
            ) from None
        raise
    logger.info("Submitted %s", job)
    return job


def _exit_code(status: str, driver_exit_code: int | None) -> int:
    if driver_exit_code is None:  # the job was stopped, or never started
        return int(status != "SUCCEEDED")
    return driver_exit_code if driver_exit_code >= 0 else 128 - driver_exit_code


def _reason(info: Any, python: str) -> str:
    """Why a job failed, as far as its log does not say so."""
    if info.driver_exit_code is None:
        return info.message or info.status.value
    if info.driver_exit_code == PYTHON_MISSING:
        return f"--python is {python}, but the head finds no such program. Name its interpreter, e.g. /opt/venv/bin/python."
    code = _exit_code(info.status.value, info.driver_exit_code)
    return f"the driver was ended by signal {code - 128}" if code > 128 else f"the driver ended with exit code {code}"


def travelling(environment: Mapping[str, str], address: str) -> dict[str, str]:
    """Which variables of an environment a job at `address` takes along.

    A store's address stays here if it holds a password, or names this machine while the cluster is another one.
    """
    found = {name: value for name, value in environment.items() if name in VARIABLES or name.startswith(PREFIXES)}
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        url = found.get(name, "")
        if "@" in url or (_is_loopback(url) and not _is_loopback(address)):
            del found[name]
            logger.warning(
                "%s stays here: it is of no use, or too much, to the cluster. Set it where Ray is started.", name
            )
    return found


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_command(words: list[str], parsed: argparse.Namespace) -> tuple[str, ...]:
    """The words of a command as the head is to run them, with the configuration named from the top of the checkout.

    Args:
        words: the command and its arguments.
        parsed: the same as ray_job.py's parser understands it.

    Raises:
        ConfigError: a submit inside submit, a configuration that is wrong or does not travel, or a path that means nothing there.
    """
    if parsed.command == "submit":
        raise ConfigError(
            "The command is submit, but a job cannot be submitted by another. Name the command that is to run."
        )
    given = {key: getattr(parsed, name, None) for name, key in PATH_ARGUMENTS.items()}
    paths = {key: value for key, value in given.items() if isinstance(value, str) and value != "latest"}
    if (source := getattr(parsed, "source", None)) is not None and source not in SOURCES:
        paths["--source"] = source
    config_paths = []
    if parsed.command in SECTIONS:
        config_paths = parsed.config
        config = load_config(config_paths, parsed.overrides)
        for section in SECTIONS[parsed.command]:
            paths |= {f"{section}.{key}": path for key, path in section_paths(getattr(config, section)).items()}
    elif isinstance(getattr(parsed, "config", None), str):  # the project file of a checkpoint
        paths["--config"] = parsed.config
    check_paths(paths)
    inside = {path: _inside_checkout(path) for path in config_paths}
    spellings = {
        f"{flag}{path}": f"{flag}{there}" for path, there in inside.items() for flag in ("", "-c", "--config=")
    }
    return tuple(spellings.get(word, word) for word in words)


def check_paths(paths: Mapping[str, str]) -> None:
    """Refuses what is no path, and relative local paths of a job, by key: its working directory is a copy of the checkout that Ray deletes.

    Raises:
        ConfigError: naming the key.
    """
    for key, path in paths.items():
        if storage.is_local(path, key) and not os.path.isabs(os.path.expanduser(path)):  # ~ is every node's own
            raise ConfigError(
                f"{key} is {path}, but a job works in a copy of the checkout that Ray deletes: what it writes there is lost, and "
                "what lies here is not there. Give s3://… or the absolute path of a folder that all nodes share."
            )


def _inside_checkout(config_path: str) -> Path:
    path = Path(config_path).resolve()
    if not path.is_relative_to(CHECKOUT) or _is_left_out(path):
        raise ConfigError(
            f"-c is {config_path}, but only what .rayignore lets through of {CHECKOUT} reaches the cluster. Put the file into "
            "configs/, or let it through."
        )
    return path.relative_to(CHECKOUT)


def _is_left_out(path: Path) -> bool:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    excludes = get_excludes_from_ignore_files(CHECKOUT, include_gitignore=True)
    above = [parent for parent in path.parents if parent.is_relative_to(CHECKOUT)]
    return any(is_excluded(part) for is_excluded in excludes for part in (path, *above))
