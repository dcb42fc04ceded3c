"""Errors that travel through Ray reach the user as themselves."""

import pytest
import ray
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster.runtime import find_user_error, user_errors
from stages.errors import ArtefactError, ConfigError


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
