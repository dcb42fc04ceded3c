"""The commands as users meet them: the whole job once, tiny, on one Ray; then what bad input gets."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tests_support import tiny_config

import ray_job
from cluster import checkpoints
from pipeline.code_dataset import CodeDataset
from stages.config import to_yaml

ROOT = Path(__file__).parent.parent


WITH_A_GPU = """
import json, ray, ray_job, sys
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False)
sys.exit(max(ray_job.main(command) for command in json.loads(sys.argv[1])))
"""


def run(capsys, *arguments):
    """Exit code, last line of stdout as JSON (or None), and stderr of one command."""
    code = ray_job.main([*arguments])
    out, err = capsys.readouterr()
    last = out.strip().splitlines()[-1] if "--json" in arguments and out.strip() else "null"
    return code, json.loads(last) if code == 0 else None, err


def write_config(folder, **sections):
    path = os.path.join(folder, "config.yaml")
    with open(path, "w") as file:
        file.write(to_yaml(tiny_config(folder, **sections)))
    return path


@pytest.fixture(scope="module")
def job(ray_cluster, tmp_path_factory):
    """Folder and configuration of a finished whole job: tokenizer, code dataset, run of two workers, record."""
    folder = str(tmp_path_factory.mktemp("job"))
    config = write_config(folder, scaling={"num_workers": 2, "cpus_per_worker": 0.5})
    for command in ("train-tokenizer", "tokenize", "train", "evaluate"):
        assert ray_job.main([command, "-c", config]) == 0, command
    return folder, config


@pytest.mark.ray
class TestWholeJob:
    def test_every_artefact_verifies(self, job, capsys):
        folder, _ = job
        record = next(Path(folder, "evaluation", "records").glob("*.json"))
        checkpoint = checkpoints.latest_commit(f"{folder}/run").path
        for path in (f"{folder}/tokenizer", f"{folder}/codes", f"{folder}/run", checkpoint, str(record)):
            code, verdict, _ = run(capsys, "verify", path, "--json")
            assert code == 0 and verdict == {"path": path, "ok": True, "problems": []}

    def test_commands_that_are_done_say_so_again(self, job, capsys):
        _, config = job
        for command, keys in (
            ("train-tokenizer", {"tokenizer", "fingerprint"}),
            ("tokenize", {"dataset", "root_hash", "num_rows", "num_quarantined", "bytes_per_row"}),
            ("train", {"run", "step", "checkpoint", "train_loss", "sample_log_hash"}),
            ("evaluate", {"record", "metrics"}),
        ):
            code, summary, _ = run(capsys, command, "-c", config, "--json")
            assert code == 0 and keys <= set(summary), command

    def test_the_record_holds_three_distances_measured_alike(self, job, capsys):
        _, config = job
        _, summary, _ = run(capsys, "evaluate", "-c", config, "--json")
        metrics = summary["metrics"]
        assert {metrics[name]["num_samples"] for name in ("fd_holdout", "rfd", "gfd")} == {24}
        assert all(metrics[name]["standard_error"] > 0 for name in ("fd_holdout", "rfd", "gfd"))

    def test_samples_are_written_by_index_and_again_the_same(self, job, capsys, tmp_path):
        _, config = job
        contents = []
        for name, count in (("a", 6), ("b", 5)):
            path = str(tmp_path / name)
            overrides = [f"sampling.path={path}", f"sampling.num_samples={count}"]
            code, summary, _ = run(capsys, "sample", "-c", config, *overrides, "--json")
            assert code == 0 and summary["samples"] == path
            contents.append(np.load(f"{path}/samples.npz"))
            assert Path(path, "grid.png").read_bytes().startswith(b"\x89PNG")
            assert yaml.safe_load(Path(path, "config.yaml").read_text())["checkpoint"] == summary["checkpoint"]
        for key in ("codes", "images", "labels"):
            assert np.array_equal(contents[0][key][:5], contents[1][key]), key
        commit = checkpoints.open_commit(summary["checkpoint"])
        assert str(contents[0]["checkpoint_hash"]) == commit.hash
        assert str(contents[0]["tokenizer_fingerprint"]) == commit.tokenizer_fingerprint

    def test_nightly_writes_a_page_that_needs_no_network(self, job, capsys):
        folder, config = job
        code, summary, _ = run(capsys, "nightly", "-c", config, "--json")
        page = Path(summary["page"]).read_text()
        assert code == 0 and 'src="http' not in page and 'href="http' not in page
        assert (
            len(list(Path(folder, "evaluation", "records").glob("*.json"))) == 1
        ), "what is measured is not measured again"

    def test_a_longer_run_goes_on_from_the_last_commit(self, job, capsys, tmp_path):
        folder, config = job
        shutil.copytree(f"{folder}/run", tmp_path / "run")
        overrides = [f"run.path={tmp_path}/run", "train.num_steps=8"]
        code, summary, _ = run(capsys, "train", "-c", config, *overrides, "--json")
        assert code == 0 and summary["step"] == 8
        assert run(capsys, "verify", f"{tmp_path}/run")[0] == 0

    def test_where_there_are_gpus_they_are_asked_for(self, job, tmp_path):
        """Ray takes our word for the GPU; without a real one, what was asked for it computes on CPUs."""
        _, config = job
        paths = {"tokenize": "codes", "sample": "sampling", "evaluate": "evaluation"}
        commands = [
            [command, "-c", config, f"{section}.path={tmp_path}/{section}"] for command, section in paths.items()
        ]
        script = [sys.executable, "-c", WITH_A_GPU, json.dumps(commands)]
        done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    @pytest.mark.parametrize(
        "command, overrides, code, words",
        [
            ("train", ["codes.path={new}/nothing"], 1, ["codes.path is", "nothing", "Run tokenize first"]),
            ("train", ["train.global_batch_size=10"], 2, ["train.global_batch_size is 10", "multiple of"]),
            ("train", ["scaling.num_workers=4", "scaling.cpus_per_worker=1"], 2, ["the cluster has 2 CPUs"]),
            (
                "train",
                ["tokenizer.path={new}/none"],
                1,
                ["tokenizer.path is", "Run train-tokenizer or import-tokenizer"],
            ),
            ("tokenize", ["tokenizer.path={new}/none"], 1, ["tokenizer.path is"]),
            ("tokenize", ["source.name=image-folder", "source.path={new}"], 2, ["source.path is", "no images"]),
            ("tokenize", ["source.name=photos"], 2, ["source.name is photos", "scenes"]),
            ("tokenize", ["images.channels=1"], 2, ["images.channels is 1"]),
            ("tokenize", ["codes.path={job}/codes", "source.num_images=50"], 1, ["codes.path is", "plan"]),
            ("train-tokenizer", ["tokenizer_train.learning_rate=1"], 1, ["tokenizer_train.learning_rate is 1.0"]),
            ("sample", ["run.path={new}/run"], 1, ["run.path is", "Run train first"]),
            ("evaluate", ["run.path={new}/run"], 1, ["run.path is", "no committed checkpoint"]),
        ],
    )
    def test_bad_input_is_named_and_leaves_nothing_behind(self, job, capsys, tmp_path, command, overrides, code, words):
        folder, config = job
        given = [text.format(new=tmp_path, job=folder) for text in overrides]
        fresh = {"train": ["run.path={new}/out"], "tokenize": ["codes.path={new}/out"]}.get(command, [])
        if not any(text.startswith("codes.path={job}") for text in overrides):
            given = [text.format(new=tmp_path) for text in fresh] + given
        result, _, err = run(capsys, command, "-c", config, *given)
        assert result == code, err
        assert all(word in err for word in words) and "Traceback" not in err, err
        assert not list(tmp_path.rglob("*"))

    def test_a_run_refuses_another_code_dataset_and_names_both(self, job, capsys, tmp_path):
        folder, config = job
        overrides = [f"codes.path={tmp_path}/codes", "source.num_images=40"]
        assert run(capsys, "tokenize", "-c", config, *overrides)[0] == 0
        code, _, err = run(capsys, "train", "-c", config, f"codes.path={tmp_path}/codes", "train.num_steps=9")
        hashes = [CodeDataset.open(f"{path}/codes", verify=False).root_hash for path in (folder, tmp_path)]
        assert code == 1 and all(root_hash in err for root_hash in hashes)

    def test_a_damaged_dataset_is_not_trained_on(self, job, capsys, tmp_path):
        folder, config = job
        shutil.copytree(f"{folder}/codes", tmp_path / "codes")
        part = next(Path(tmp_path, "codes", "data").rglob("*.parquet"))
        data = bytearray(part.read_bytes())
        data[len(data) // 3] ^= 4
        part.write_bytes(data)
        code, _, err = run(capsys, "train", "-c", config, f"codes.path={tmp_path}/codes", f"run.path={tmp_path}/run")
        assert code == 1 and str(part) in err and not os.path.exists(tmp_path / "run")
        assert run(capsys, "verify", f"{tmp_path}/codes")[0] == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_killed_in_the_middle_the_same_command_ends_where_an_undisturbed_one_does(job, capsys, tmp_path, zero_stage):
    """SIGKILL of the driver's whole process group after the first commit, then the same command again."""
    _, config = job
    common = [f"deepspeed.zero_stage={zero_stage}", "train.num_steps=30", "train.checkpoint_every_steps=3"]
    code, reference, err = run(capsys, "train", "-c", config, *common, f"run.path={tmp_path}/whole", "--json")
    assert code == 0, err
    command = [sys.executable, "ray_job.py", "train", "-c", config, *common, f"run.path={tmp_path}/cut"]
    driver = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not checkpoints.list_commits(f"{tmp_path}/cut"):
        assert driver.poll() is None, "the driver ended before its first commit"
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(
        5
    )  # workers of a dead driver leave within seconds; until then they may still commit, which loses nothing
    code, resumed, err = run(capsys, "train", "-c", config, *common, f"run.path={tmp_path}/cut", "--json")
    assert code == 0, err
    for key in ("step", "train_loss", "sample_log_hash"):
        assert resumed[key] == reference[key], key
    assert run(capsys, "verify", f"{tmp_path}/cut")[0] == 0


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["plan", "-c", "{config}", "train.no_such_key=1"], 2, ["train.no_such_key", "num_steps"]),
        (["plan", "-c", "{config}", "train.global_batch_size=abc"], 2, ["train.global_batch_size is 'abc'"]),
        (["plan", "-c", "{config}", "source.name=image-folder", "source.path=/no/such/folder"], 2, ["/no/such/folder"]),
        (["plan", "-c", "/no/such.yaml"], 2, ["/no/such.yaml"]),
        (["plan", "-c", "{config}", "tokenizer.codebook_size=100000"], 2, ["codebook_size is 100000", "65536"]),
        (["verify", "/no/such/path"], 1, ["/no/such/path"]),
        (["import-tokenizer", "/no/such.ckpt", "--output", "/tmp/never"], 2, ["/no/such.ckpt"]),
        (["submit"], 2, ["command is empty"]),
        (["submit", "--", "plan"], 2, ["--address"]),
    ],
)
def test_usage_errors(capsys, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = write_config(str(tmp_path))
    result, _, err = run(capsys, *[text.format(config=config) for text in arguments])
    assert result == code and "Traceback" not in err
    assert all(word in err for word in words), err


def test_plan_names_maps_in_a_store_that_is_not_there(s3, capsys, tmp_path):
    maps = "source.label_maps=[segmentation=s3://no-such-bucket/labels]"
    code, _, err = run(capsys, "plan", "-c", write_config(str(tmp_path)), maps)
    assert code == 1 and "source.label_maps[segmentation] is s3://no-such-bucket/labels, but" in err


@pytest.mark.parametrize(
    "arguments, key",
    [
        (["reference", "-c", "{config}", "--output", "{missing}"], "--output"),
        (["nightly", "-c", "{config}", "nightly.runs=[{missing}]"], "nightly.runs[0]"),
        (["inspect", "{missing}"], "PATH"),
        (["inspect", "{folder}/codes", "--output", "{missing}"], "--output"),
        (["inspect", "{folder}/codes", "--output", "{folder}/out", "--tokenizer", "{missing}"], "--tokenizer"),
        (["demo", "--output", "{missing}"], "--output"),
    ],
)
def test_a_store_that_is_not_there_is_named_before_any_work(s3, capsys, tmp_path, arguments, key):
    given = {"config": write_config(str(tmp_path)), "folder": tmp_path, "missing": "s3://no-such-bucket/folder"}
    code, _, err = run(capsys, *[text.format(**given) for text in arguments])
    assert code == 1 and f"error: {key} is s3://no-such-bucket/folder, but" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "arguments, key",
    [
        (["plan", "-c", "{config}", "codes.path={address}"], "codes.path"),
        (["tokenize", "-c", "{config}", "source.path={address}"], "source.path"),
        (["plan", "-c", "{config}", "source.number_maps=[depth={address}]"], "source.number_maps[depth]"),
        (["nightly", "-c", "{config}", "nightly.runs=[{address}]"], "nightly.runs[0]"),
        (["submit", "--address", "http://host:1", "--", "plan", "-c", "configs/demo.yaml", "tokenizer.path={address}"], "tokenizer.path"),
        (["verify", "{address}"], "PATH"),
        (["import-tokenizer", "{address}", "--output", "x"], "file"),
    ],
)
@pytest.mark.parametrize("address", ["gs://bucket/codes", "https://host/codes"])
def test_an_address_of_another_kind_of_store_is_refused_by_its_key(capsys, tmp_path, monkeypatch, arguments, key, address):
    monkeypatch.chdir(ROOT)
    config = write_config(str(tmp_path))
    code, _, err = run(capsys, *[text.format(config=config, address=address) for text in arguments])
    assert code == 2 and f"error: {key} is {address}, but a path is local or begins with s3://" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.ray
@pytest.mark.parametrize("command", ["plan", "train-tokenizer", "tokenize"])
def test_images_that_are_held_out_and_trained_on_are_refused(job, capsys, tmp_path, command):
    folder, _ = job
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    config = write_config(str(tmp_path), source={"name": "image-folder", "path": str(tmp_path), "holdout_path": str(tmp_path)})
    tokenizer = f"tokenizer.path={folder if command == 'tokenize' else tmp_path}/tokenizer"
    code, _, err = run(capsys, command, "-c", config, tokenizer)
    assert code == 2 and f"source.holdout_path is {tmp_path}, but 1 of its images are among" in err and f"{tmp_path}/a.png" in err


def test_plan_prints_what_follows_and_touches_nothing(capsys, tmp_path):
    config = write_config(str(tmp_path))
    code, plan, _ = run(capsys, "plan", "-c", config, "scaling.num_workers=2", "--json")
    assert code == 0
    assert plan["derived"]["code dataset"]["rows"] == 120
    assert plan["derived"]["training"]["gradient accumulation steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("command", ray_job.COMMANDS)
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as caught:
        ray_job.main([command, "--help"])
    assert caught.value.code == 0
    assert f"python ray_job.py {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["no-such-command"], ["train"], ["verify"], ["plan", "-c", "x", "--no-such-flag"]]
)
def test_wrong_usage_exits_with_two(arguments):
    with pytest.raises(SystemExit) as caught:
        ray_job.main(arguments)
    assert caught.value.code == 2
