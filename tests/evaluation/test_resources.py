"""Room for an evaluation on a Ray that believes in GPUs which are not there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

RESERVE = """
import ray
from evaluation.resources import bundle, reserved
from stages.options import EvaluationOptions
ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False)
for num_actors, share in ((2, 1.0), (3, 0.5), (5, 0.3333), (12, 0.1666)):
    options = EvaluationOptions(num_sampler_actors=num_actors - 1, num_feature_actors=1, start_timeout_seconds=60.0)
    assert bundle(options) == {"CPU": share, "GPU": share}, bundle(options)
    with reserved(options):
        pass
"""


@pytest.mark.ray
def test_any_number_of_actors_shares_the_gpus_and_cpus_that_are_there():
    done = subprocess.run([sys.executable, "-c", RESERVE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
