"""The first stage's training in real process groups (gloo), without Ray: exact resume, faults that are undone, refusals, proof."""

import copy
import dataclasses
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizer_support import inputs_for, numbers_of, options_for, records_of, train

from cluster import checkpoints, run_log, tokenizer_loop, training_run
from cluster.tokenizer_history import check_resumable
from cluster.tokenizer_loop import RESULT
from cluster.tokenizer_options import settle, training_path
from cluster.verify_run import verify_run
from stages.errors import ArtefactError
from stages.first_stage.import_export import import_tokenizer
from stages.first_stage.training import FirstStageTrainer


def result(commit):
    return load_file(os.path.join(commit.path, RESULT))


# The adversary, dropout, revival and LeCam all have state that a resume must bring back.
EVERYTHING = {
    "tokenizer": {"dropout": 0.1},
    "tokenizer_train": {
        "discriminator_start_samples": 32,
        "lecam_weight": 0.1,
        "r1_weight": 0.1,
        "r1_every_steps": 2,
        "revive_every_steps": 2,
    },
}


@pytest.fixture(scope="module", params=[1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def undisturbed(request, tmp_path_factory):
    """World size, options and latest commit of a training that nobody disturbs."""
    options = options_for(tmp_path_factory.mktemp("undisturbed"), **EVERYTHING)
    return request.param, options, train(options, request.param)


def test_a_training_cut_at_a_commit_goes_on_bitwise(undisturbed, tmp_path):
    world_size, options, whole = undisturbed
    weights = result(whole)
    cut = options_for(tmp_path, **EVERYTHING)
    shutil.copytree(options.tokenizer.path, cut.tokenizer.path)
    checkpoints.retire_after(training_path(cut.tokenizer.path), 3)
    resumed = train(cut, world_size)
    assert resumed.step == whole.step == 6
    assert numbers_of(cut, resumed) == numbers_of(options, whole)
    assert resumed.content["sample_log_hash"] == whole.content["sample_log_hash"]
    again = result(resumed)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert verify_run(training_path(cut.tokenizer.path)) == []


def test_the_weights_of_a_commit_are_not_taken_for_a_published_tokenizer(undisturbed):
    _, _, commit = undisturbed
    with pytest.raises(ArtefactError, match="belong to that training"):
        import_tokenizer(os.path.join(commit.path, RESULT))


def test_rows_and_losses_do_not_depend_on_world_size(tmp_path):
    """All but the k-means start, which looks at rank 0's first images. Adam makes more of the last digits from step to step."""
    train_options = {"num_samples": 48, "kmeans_start": False}
    one, two = (options_for(tmp_path / str(n), tokenizer_train=train_options) for n in (1, 2))
    first, second = train(one, 1), train(two, 2)
    assert first.content["sample_log_hash"] == second.content["sample_log_hash"]
    losses, others = ([r["loss"] for r in records_of(o, c)] for o, c in ((one, first), (two, second)))
    assert losses[0] == pytest.approx(others[0], rel=1e-5)
    assert losses == pytest.approx(others, rel=1e-2)
    usages = ([r["codebook_usage"] for r in records_of(o, c)] for o, c in ((one, first), (two, second)))
    assert next(usages)[0] == next(usages)[0]  # codes of all ranks count, and before the first step they are the same


def test_a_training_goes_on_at_another_world_size(undisturbed, tmp_path):
    world_size, options, whole = undisturbed
    changed = options_for(tmp_path, **EVERYTHING)
    shutil.copytree(options.tokenizer.path, changed.tokenizer.path)
    checkpoints.retire_after(training_path(changed.tokenizer.path), 3)
    other = {1: 2, 2: 1, 4: 2}[world_size]
    commit = train(changed, other)
    assert commit.step == 6 and commit.content["world_size"] == other
    assert commit.content["sample_log_hash"] == whole.content["sample_log_hash"]
    assert verify_run(training_path(changed.tokenizer.path)) == []


def nan_in_batch_4():
    step = tokenizer_loop.TokenizerStage.step

    def poisoned(self, loaded):
        if loaded.batch == 4:
            with torch.no_grad():
                self.trainer.tokenizer.decoder.conv_out.weight.fill_(float("nan"))
        return step(self, loaded)

    tokenizer_loop.TokenizerStage.step = poisoned


def test_nan_is_undone_and_its_batches_are_left_out(tmp_path):
    options = options_for(tmp_path, tokenizer_train={"skip_batches": 1})
    commit = train(options, 1, nan_in_batch_4)
    (event,) = commit.content["events"]
    assert (event["step"], event["batch"], event["back_to"]) == (4, 4, 3) and "nan" in event["fault"]
    records = records_of(options, commit)
    assert [record["batch"] for record in records] == [0, 1, 2, 3, 5, 6]
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in records)
    assert all(torch.isfinite(tensor).all() for tensor in result(commit).values())
    assert verify_run(training_path(options.tokenizer.path)) == []


def nan_in_the_discriminator():
    step = FirstStageTrainer._discriminator_step

    def poisoned(self, *args):
        return step(self, *args) | {"discriminator": torch.tensor(float("nan"))}

    FirstStageTrainer._discriminator_step = poisoned


def test_nan_without_a_way_back_stops_clearly(tmp_path):
    options = options_for(tmp_path)
    with pytest.raises(Exception, match="Step 0 has discriminator nan.*max_rollbacks is 3.*Lower the learning rate"):
        train(options, 1, nan_in_the_discriminator)
    assert checkpoints.list_commits(training_path(options.tokenizer.path)) == []


def look_around_always():
    training_run.LOOK_AROUND_SECONDS = 0.0


def always():
    return True


def test_a_request_to_leave_commits_first(tmp_path):
    options = options_for(tmp_path, tokenizer_train={"num_samples": 16_000, "checkpoint_every_steps": 1000})
    commit = train(options, 1, look_around_always, always)
    assert 0 < commit.step < 1000
    assert verify_run(training_path(options.tokenizer.path)) == []


def test_a_forged_or_altered_training_is_found(undisturbed, tmp_path):
    _, options, commit = undisturbed
    folder = str(tmp_path / "training")
    shutil.copytree(training_path(options.tokenizer.path), folder)
    segment = os.path.join(folder, commit.content["log"][0]["path"])
    with open(segment) as file:
        text = file.read()
    digest = text.split('"digests": ["')[1][:16]
    with open(segment, "w") as file:
        file.write(text.replace(digest, digest[::-1]))
    assert any("damaged" in problem for problem in verify_run(folder))


def test_other_rows_than_prescribed_are_found(undisturbed, monkeypatch):
    _, options, commit = undisturbed
    monkeypatch.setitem(commit.content["sampler"], "seed", 1)
    monkeypatch.setattr(checkpoints, "list_commits", lambda run, problems: [commit])
    problems = verify_run(training_path(options.tokenizer.path))
    assert len(problems) == 6 and "other rows than its images prescribe" in problems[0]


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"run": {"seed": 5}}, ["sampler.seed", "5", "0"]),
        ({"tokenizer_train": {"l2_weight": 1.0}}, ["tokenizer_train.l2_weight", "1.0", "0.0"]),
        ({"tokenizer_train": {"num_samples": 160}}, ["tokenizer_train.num_samples", "160", "96"]),
        ({"tokenizer": {"codebook_size": 64}}, ["tokenizer.codebook_size", "64", "32"]),
        ({"source": {"num_images": 50}}, ["image list"]),
    ],
)
def test_a_training_is_not_continued_with_other_options(undisturbed, tmp_path, sections, words):
    _, _, commit = undisturbed
    merged = {name: {**EVERYTHING.get(name, {}), **sections.get(name, {})} for name in {*EVERYTHING, *sections}}
    if "source" in sections:
        merged["source"] = {"name": "scenes", "num_holdout_images": 24, **sections["source"]}
    options = options_for(tmp_path, **merged)
    with pytest.raises(ArtefactError) as caught:
        check_resumable(commit, options, inputs_for(options))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_changes_no_step_may_change(undisturbed, tmp_path):
    _, _, commit = undisturbed
    train_options = {**EVERYTHING["tokenizer_train"], "checkpoint_every_steps": 1, "keep_checkpoints": 5}
    options = options_for(tmp_path / "elsewhere", tokenizer=EVERYTHING["tokenizer"], tokenizer_train=train_options)
    check_resumable(commit, options, inputs_for(options))


def test_a_training_from_before_an_option_was_there_goes_on_as_it_began(undisturbed, tmp_path):
    _, _, commit = undisturbed
    content = copy.deepcopy(commit.content)
    del content["fixed_options"]["tokenizer"]["num_norm_groups"], content["fixed_options"]["tokenizer_train"]["revive_share"]
    before = dataclasses.replace(commit, content=content)

    def check(commit, num_norm_groups=None):
        options = options_for(tmp_path / "elsewhere", **EVERYTHING)
        tokenizer = dataclasses.replace(options.tokenizer, num_norm_groups=num_norm_groups)
        train_options = dataclasses.replace(options.tokenizer_train, revive_share=None)
        asked = dataclasses.replace(options, tokenizer=tokenizer, tokenizer_train=train_options)
        check_resumable(commit, settle(asked, commit.content["fixed_options"]), inputs_for(asked))

    check(commit)
    check(before)
    check(before, num_norm_groups=32)
    with pytest.raises(ArtefactError, match="num_norm_groups is 8, but .* trained with 32"):
        check(before, num_norm_groups=8)


def test_old_commits_are_pruned_and_the_log_stays_whole(tmp_path):
    options = options_for(tmp_path, tokenizer_train={"checkpoint_every_steps": 1, "keep_checkpoints": 2})
    commit = train(options, 1)
    run_path = training_path(options.tokenizer.path)
    assert [c.step for c in checkpoints.list_commits(run_path)] == [5, 6]
    assert [r["step"] for r in run_log.read_log(run_path, commit.content["log"])] == list(range(6))
