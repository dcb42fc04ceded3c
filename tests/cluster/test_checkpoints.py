"""Checkpoints are whole or absent; the latest is the highest step that verifies."""

import json
import os

import pytest

from cluster import checkpoints
from cluster.verify_run import verify_run
from pipeline import storage
from stages.errors import ArtefactError, StorageError


def make(run, step, text="weights", names=("state.pt",), **content):
    """A committed checkpoint with one file, or several."""
    folder = checkpoints.checkpoint_path(run, step, checkpoints.new_attempt())
    os.makedirs(folder)
    for name in names:
        with open(os.path.join(folder, name), "w") as file:
            file.write(text)
    entries = [checkpoints.file_entry(os.path.join(folder, name), name) for name in names]
    required = {"step": step, "files": entries, "root_hash": "r", "train_loss": 1.0}
    return checkpoints.write_commit(folder, required | content)


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


def test_latest_is_the_highest_step(run):
    assert checkpoints.latest_commit(run) is None
    for step in (10, 100, 20):
        make(run, step)
    assert checkpoints.latest_commit(run).step == 100
    assert [commit.step for commit in checkpoints.list_commits(run)] == [10, 20, 100]


def test_what_has_no_commit_does_not_exist(run):
    make(run, 10)
    os.remove(os.path.join(make(run, 20).path, checkpoints.COMMIT))
    assert checkpoints.latest_commit(run).step == 10


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(run, damage, caplog):
    make(run, 10)
    path = os.path.join(make(run, 20).path, "state.pt")
    if damage == "remove":
        os.remove(path)
    else:
        with open(path, "w") as file:
            file.write("weighte" if damage == "flip" else "wei")
    assert checkpoints.latest_commit(run).step == 10
    assert path in caplog.text
    with pytest.raises(ArtefactError, match="damaged"):
        checkpoints.resolve_checkpoint(os.path.dirname(path), run)


DAMAGES = {
    "cut off": lambda text: text[:40],
    "another step": lambda text: text.replace('"step": 20', '"step": 30'),
    "empty": lambda text: "{}",
    "no object": lambda text: "null",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_commit_file_is_passed_over_and_named(run, damage, caplog):
    make(run, 10)
    path = os.path.join(make(run, 20).path, checkpoints.COMMIT)
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(DAMAGES[damage](text))
    assert checkpoints.latest_commit(run).step == checkpoints.newest_commit(run).step == 10
    assert path in caplog.text
    problems = []
    checkpoints.list_commits(run, problems)
    assert len(problems) == 1 and path in problems[0]
    make(run, 40)
    checkpoints.prune(run, checkpoints.Retention(newest=1))
    assert os.path.exists(path), "somebody may mend it"


def spoil(commit):
    with open(os.path.join(commit.path, "state.pt"), "w") as file:
        file.write("damaged")


def test_damaged_commits_after_the_latest_are_set_aside_until_the_run_has_passed_them(run):
    older, latest, damaged = make(run, 10), make(run, 20), make(run, 30)
    for commit in (older, damaged):
        spoil(commit)
    meanwhile = make(run, 40)
    checkpoints.set_aside_damaged(run, latest)
    assert checkpoints.list_commits(run) == [older, latest, meanwhile], "what another process commits is sound"
    assert checkpoints.was_set_aside(damaged) and not checkpoints.was_set_aside(older)
    storage.delete_tree(meanwhile.path)
    checkpoints.prune(run, checkpoints.Retention(newest=1))
    assert sorted(os.listdir(damaged.path)) == [checkpoints.DAMAGED, "state.pt"], "somebody may look at it"
    assert checkpoints.list_commits(run) == [latest]
    make(run, 40)
    checkpoints.prune(run, checkpoints.Retention(newest=1))
    assert not os.path.exists(damaged.path)


def test_a_damaged_commit_of_the_same_step_is_set_aside_too(run):
    latest, again = make(run, 20), make(run, 20)
    spoil(again)
    checkpoints.set_aside_damaged(run, latest)
    assert checkpoints.newest_commit(run) == latest


def test_a_commit_that_is_set_aside_can_be_restored(run):
    latest, damaged = make(run, 20), make(run, 30)
    spoil(damaged)
    checkpoints.set_aside_damaged(run, latest)
    os.rename(os.path.join(damaged.path, checkpoints.DAMAGED), os.path.join(damaged.path, checkpoints.COMMIT))
    with open(os.path.join(damaged.path, "state.pt"), "w") as file:
        file.write("weights")
    assert checkpoints.latest_commit(run) == damaged


def test_commits_without_a_hash_of_their_own_are_read(run):
    commit = make(run, 10)
    content = {name: value for name, value in commit.content.items() if name != "sha256"}
    with open(os.path.join(commit.path, checkpoints.COMMIT), "w") as file:
        json.dump(content, file)
    assert checkpoints.latest_commit(run).content == content


@pytest.mark.parametrize("name", ["state.pt", checkpoints.COMMIT])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(run, name):
    for step in (10, 20):
        with open(os.path.join(make(run, step).path, name), "w") as file:
            file.write("{")
    with pytest.raises(ArtefactError, match="all damaged.*Restore one"):
        checkpoints.latest_commit(run)
    if name == checkpoints.COMMIT:
        assert len(verify_run(run)) == 2, "each is named"


def test_a_checkpoint_that_is_pruned_while_it_is_hashed_is_not_taken_for_damage(run, monkeypatch, caplog):
    make(run, 10)
    real = checkpoints.file_entry

    def prune_first(path, name):
        monkeypatch.setattr(checkpoints, "file_entry", real)
        make(run, 20)
        checkpoints.prune(run, checkpoints.Retention(newest=1))
        return real(path, name)

    monkeypatch.setattr(checkpoints, "file_entry", prune_first)
    assert checkpoints.latest_commit(run).step == 20
    assert "damaged" not in caplog.text


def test_a_damaged_file_that_is_not_needed_does_no_harm(run):
    others = ("transformer.safetensors",)
    make(run, 10)
    path = os.path.join(make(run, 20, names=("state.pt", *others)).path, "state.pt")
    os.remove(path)
    assert checkpoints.latest_commit(run, others).step == checkpoints.resolve_checkpoint("latest", run, others).step == 20
    assert checkpoints.resolve_checkpoint(os.path.dirname(path), run, others).step == 20
    assert checkpoints.latest_commit(run, ("state.pt",)).step == 10


def test_a_folder_is_committed_once(run):
    commit = make(run, 10)
    with pytest.raises(ArtefactError, match="committed already"):
        checkpoints.write_commit(commit.path, {"step": 11, "files": []})
    assert checkpoints.open_commit(commit.path) == commit


@pytest.mark.parametrize(
    "text", ["", "{", json.dumps({"format": "other"}), json.dumps({"format": checkpoints.FORMAT, "format_version": 9})]
)
def test_damaged_and_foreign_commits_are_refused(run, text):
    commit = make(run, 10)
    with open(os.path.join(commit.path, checkpoints.COMMIT), "w") as file:
        file.write(text)
    with pytest.raises(ArtefactError):
        checkpoints.open_commit(commit.path)


def test_pruning_keeps_the_newest_and_removes_dead_attempts(run):
    for step in (10, 20, 30):
        make(run, step)
    dead = checkpoints.checkpoint_path(run, 15, "dead")
    newer = checkpoints.checkpoint_path(run, 40, "being-written")
    for folder in (dead, newer):
        os.makedirs(folder)
        open(os.path.join(folder, "part"), "w").close()
    checkpoints.prune(run, checkpoints.Retention(newest=2))
    assert [commit.step for commit in checkpoints.list_commits(run)] == [20, 30]
    assert not os.path.exists(dead)
    assert os.path.exists(newer), "an attempt that may still commit is not touched"


def test_errors_say_what_to_do(run):
    with pytest.raises(ArtefactError, match="Run train first"):
        checkpoints.resolve_checkpoint("latest", run)
    with pytest.raises(ArtefactError, match="Name a committed checkpoint"):
        checkpoints.resolve_checkpoint(os.path.join(run, "nothing"), run)


def test_a_commit_that_is_pruned_while_commits_are_listed_is_passed_over(run, monkeypatch):
    older, newer = make(run, 10), make(run, 20)
    listed = [f"{commit.path}/{checkpoints.COMMIT}" for commit in (older, newer)]
    monkeypatch.setattr(storage, "list_files", lambda path, suffix="": listed)
    storage.delete(listed[0])
    assert checkpoints.list_commits(run) == [newer]


def test_a_store_that_does_not_answer_is_not_taken_for_damage(run, monkeypatch):
    """Or a run would start anew when it could have been resumed."""
    make(run, 10)

    def fail(path):
        raise StorageError(f"path is {path}, but the store cannot be reached")

    monkeypatch.setattr(storage, "size", fail)
    with pytest.raises(StorageError):
        checkpoints.latest_commit(run)


def test_a_checkpoint_on_s3_is_verified_and_downloaded_without_leaving_copies(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = checkpoints.checkpoint_path(s3, 10, checkpoints.new_attempt())
    for name in ("weights", "optimizer/state"):
        storage.put_if_absent(f"{folder}/{name}", name.encode())
    entries = [checkpoints.file_entry(f"{folder}/{name}", name) for name in ("weights", "optimizer/state")]
    checkpoints.write_commit(folder, {"step": 10, "files": entries})
    commit = checkpoints.latest_commit(s3)
    with checkpoints.local_folder(commit) as copy:
        assert sorted(storage.list_files(copy)) == [f"{copy}/optimizer/state", f"{copy}/weights"]
    with checkpoints.local_folder(commit, ["weights"]) as copy:
        assert os.listdir(copy) == ["weights"]
    assert os.listdir(tmp_path) == []
    storage.replace(f"{folder}/weights", b"weighte")
    with pytest.raises(ArtefactError, match="all damaged"):
        checkpoints.latest_commit(s3)


def test_what_is_kept(run):
    for step, nll in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 5.0)):
        measured = {} if nll is None else {"validation_nll": nll}
        make(run, step, measured=measured)
    commits = checkpoints.list_commits(run)

    def steps(**retention):
        return [commit.step for commit in checkpoints.Retention(**retention).kept(commits)]

    assert steps(newest=1) == [50]
    assert steps(newest=1, every_steps=20) == [20, 40, 50]
    assert steps(newest=1, best=2) == [20, 30, 50]
    assert steps(newest=9) == [10, 20, 30, 40, 50]


def test_commits_of_undone_steps_are_retired(run):
    for step in (10, 20, 30):
        make(run, step)
    checkpoints.retire_after(run, 10)
    assert [commit.step for commit in checkpoints.list_commits(run)] == [10]


def test_a_checkpoint_of_another_kind_of_training_is_refused(run):
    """A tokenizer's, where the transformer's weights are asked for."""
    commit = make(run, 10)
    for checkpoint in ("latest", commit.path):
        with pytest.raises(ArtefactError, match=f"checkpoint is {commit.path}, but it is of another kind of training and has none of"):
            checkpoints.resolve_checkpoint(checkpoint, run, checkpoints.SAMPLED_FROM)
