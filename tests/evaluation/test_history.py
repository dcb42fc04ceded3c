"""Which record heads the page of an evaluation folder."""

import pytest
from report_support import record

from cluster.checkpoints import WEIGHTS, Commit, checkpoint_path, write_commit
from evaluation.describe import recorded_sampling
from evaluation.history import choose_headline, write_report
from evaluation.prepare import EvaluateOptions
from stages.config import select_sections
from stages.options import Config, EvaluationOptions, RunOptions, SamplingOptions, TokenizerOptions

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


def test_the_page_reads_no_weights(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("run", "evaluation", "tokenizer")}
    entry = {"path": WEIGHTS, "bytes": 1 << 40, "xxh3_128": "0" * 32}  # of a file that is not there
    content = {"step": 4321, "train_loss": 2.345, "log": [], "files": [entry]}
    write_commit(checkpoint_path(paths["run"], 4321, "attempt"), content)
    config = Config(
        run=RunOptions(path=paths["run"]),
        evaluation=EvaluationOptions(path=paths["evaluation"]),
        tokenizer=TokenizerOptions(path=paths["tokenizer"]),
    )
    write_report(select_sections(EvaluateOptions, config), str(tmp_path / "report.html"), "A run")
    page = (tmp_path / "report.html").read_text()
    assert "4,321" in page and "2.345 nats per code" in page
