"""Guidance that a checkpoint cannot give is told before anything is drawn."""

import pytest

from cluster.checkpoints import Commit
from cluster.sampler_actor import warn_of_guidance
from stages.options import SamplingOptions


def commit(conditioning, **options):
    return Commit("run/checkpoints/step-1", {"transformer": {"conditioning": conditioning}, **options}, hash="")


TRAINED = {"options": {"conditioning": {"cond_drop_prob": 0.1}}}


@pytest.mark.parametrize(
    "given, scale, words",
    [
        (commit("none", **TRAINED), 2.0, "step-1 has no condition: its samples are drawn without guidance"),
        (commit("class", options={"conditioning": {"cond_drop_prob": 0.0}}), 2.0, "never saw the null condition"),
        (commit("class", options={"conditioning": {"cond_drop_prob": 0.0}}), 1.0, None),
        (commit("class", **TRAINED), 2.0, None),
        (commit("class"), 2.0, None),  # an imported one
    ],
)
def test_guidance_without_a_null_condition_is_warned_of(caplog, given, scale, words):
    warn_of_guidance(given, SamplingOptions(cfg_scale=scale))
    assert words in caplog.text if words else not caplog.text
