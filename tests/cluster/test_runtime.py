"""Errors that travel through Ray reach the user as themselves; processes see the GPUs that Ray gave them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.runtime import HIDE_GPUS, find_user_error, user_errors
from stages.errors import ArtefactError, ConfigError

ROOT = Path(__file__).parent.parent.parent

# Prints what an actor without a GPU and one with a GPU see of a GPU that Ray believes in.
LOOK = """
import functools, json, os, subprocess, sys
import ray
if sys.argv[1] == "cluster":
    ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False)
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    sys.exit(subprocess.run([sys.executable, "-c", os.environ["LOOK"], "member"], env=environment).returncode)
if sys.argv[1] == "local":
    ray.init = functools.partial(ray.init, num_gpus=1)
from cluster.runtime import connected
with connected(num_cpus=1 if sys.argv[1] == "local" else None):
    @ray.remote(num_cpus=0)
    class Eyes:
        def see(self):
            return os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [ray.get(Eyes.options(num_gpus=count).remote().see.remote()) for count in (0, 1)]
print(json.dumps(seen))
"""


@pytest.mark.ray
@pytest.mark.parametrize("whose", ["local", "cluster"])
def test_a_process_sees_no_gpu_but_those_that_ray_gave_it(whose):
    hidden = ("CUDA_VISIBLE_DEVICES", HIDE_GPUS)
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"LOOK": LOOK}
    done = subprocess.run([sys.executable, "-c", LOOK, whose], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["", "0"]


@pytest.mark.ray
def test_a_users_error_in_a_task_is_raised_as_itself(ray_cluster):
    @ray.remote
    def fail():
        raise ConfigError("codes.path is x, but y. Do z.")

    with pytest.raises(ConfigError) as caught, user_errors():
        ray.get(fail.remote())
    assert str(caught.value) == "codes.path is x, but y. Do z.", "and not Ray's text around it"


@pytest.mark.ray
def test_a_defect_in_a_task_keeps_its_traceback(ray_cluster):
    @ray.remote
    def fail():
        raise ZeroDivisionError("a defect")

    with pytest.raises(ray.exceptions.RayTaskError, match="a defect"), user_errors():
        ray.get(fail.remote())


@pytest.mark.ray
def test_a_users_error_in_the_constructor_of_an_actor_is_raised_as_itself(ray_cluster):
    @ray.remote
    class Failing:
        def __init__(self):
            raise ConfigError("evaluation.weights_path is x, but y. Do z.")

        def answer(self):
            return 42

    with pytest.raises(ConfigError, match="^evaluation.weights_path is x, but y. Do z.$"), user_errors():
        ray.get(Failing.remote().answer.remote())


def test_a_users_error_of_a_training_worker_is_found():
    inner = ArtefactError("run.path is x, but y. Do z.")
    error = WorkerGroupError("training failed", {0: RuntimeError("other"), 1: inner})
    assert find_user_error(error) is inner
    assert find_user_error(RuntimeError("a defect")) is None
