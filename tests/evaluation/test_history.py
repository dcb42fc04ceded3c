"""Which record heads the page of an evaluation folder."""

import pytest
from report_support import record

from cluster.checkpoints import Commit
from evaluation.history import choose_headline
from evaluation.prepare import EvaluateOptions, recorded_sampling
from stages.config import select_sections
from stages.options import Config, RunOptions, SamplingOptions

OPTIONS = select_sections(EvaluateOptions, Config(run=RunOptions(path="/runs/a")))
AS_CONFIGURED = recorded_sampling(SamplingOptions())
SEARCHED = {**AS_CONFIGURED, "cfg_scale": 9.0}
COMMIT = Commit(path="/runs/a/checkpoints/step-000000600-x", content={"step": 600}, hash="x")


def of(step, night, run="/runs/a", sampling=AS_CONFIGURED):
    return record(step, 90.0, night=night, run=run, sampling=sampling)


@pytest.mark.parametrize(
    "records, expected",
    [
        ([of(600, 1), of(500, 2)], 0),  # a night measures the best checkpoint after the newest one
        ([of(600, 1), of(600, 2, run="/runs/b")], 0),
        ([of(600, 1), of(600, 2, sampling=SEARCHED)], 0),
        ([of(400, 1), of(500, 2)], 1),
        ([of(600, 1, run="/runs/b"), of(300, 2, run="/runs/c")], 1),
    ],
)
def test_the_page_is_headed_by_the_newest_checkpoint_as_configured(records, expected):
    assert choose_headline(records, OPTIONS, COMMIT) is records[expected]


def test_a_tokenizer_heads_the_page_of_a_run_only_if_there_is_no_commit():
    tokenizer = record(0, 90.0, run="/tokenizer", subject="tokenizer")
    assert choose_headline([tokenizer], OPTIONS, COMMIT) is None
    assert choose_headline([tokenizer], OPTIONS, None) is tokenizer


def test_without_records_nothing_heads_the_page():
    assert choose_headline([], OPTIONS, COMMIT) is None
