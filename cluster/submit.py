"""`ray job submit` with the right working directory and the driver's real exit code."""

import logging
import os
import shlex
import time
from typing import Any

from stages.errors import ConfigError, TesseraError

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
EXCLUDES = [".git", ".venv", "demo_output", "runs", "docs", "tests"]


def submit(address: str | None, command_line: list[str]) -> dict[str, Any]:
    """Submits `python ray_job.py COMMAND …` from this checkout, follows its log, and waits for its end.

    Args:
        address: the cluster's dashboard, e.g. http://head:8265.
        command_line: the command and its arguments; a leading "--" is dropped.

    Returns:
        job (submission id), status, exit_code: that of the driver, which `ray job submit` itself does not pass on.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    words = command_line[1:] if command_line[:1] == ["--"] else command_line
    if not words:
        raise ConfigError(
            "The command is empty, but submit runs another command. Write e.g. submit -- train -c configs/demo.yaml."
        )
    if not address:
        raise ConfigError(
            "--address is not set, but submit needs a cluster. Give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS."
        )
    try:
        client = JobSubmissionClient(address)
    except ConnectionError as error:
        raise TesseraError(
            f"--address is {address}, but no cluster answers there ({error}). Check the address and the token."
        ) from None
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    job = client.submit_job(
        entrypoint=shlex.join(["python", "ray_job.py", *words]),
        runtime_env={"working_dir": root, "excludes": EXCLUDES},
        metadata={"command": words[0]},
    )
    logger.info("Submitted %s", job)
    printed = 0
    while True:
        status = client.get_job_status(job)
        log = client.get_job_logs(job)
        print(log[printed:], end="", flush=True)
        printed = len(log)
        if status.is_terminal():
            break
        time.sleep(POLL_SECONDS)
    code = client.get_job_info(job).driver_exit_code
    failed = status != JobStatus.SUCCEEDED
    return {"job": job, "status": status.value, "exit_code": code if code is not None else int(failed)}
