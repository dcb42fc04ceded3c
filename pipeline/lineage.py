"""Where an artefact comes from, as far as the process that writes it can tell."""

import os
import platform
import subprocess
from typing import Any

import ray

from stages import __version__


def lineage() -> dict[str, Any]:
    """Version and, in a work tree, commit of this code; versions beneath it; the Ray job."""
    context = ray.get_runtime_context() if ray.is_initialized() else None
    return {
        "tessera": __version__,
        "git_sha": _git_sha(),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "ray_job_id": context.get_job_id() if context else None,
    }


def _git_sha() -> str | None:
    if sha := os.environ.get(
        "TESSERA_GIT_SHA"
    ):  # a job works in a copy of a work tree: `submit`, or the image, says of what
        return sha
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
