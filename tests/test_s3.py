"""Every path on S3: the commands as users run them, on a cluster and in processes of their own, against a real server."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster_support import running_cluster
from PIL import Image
from s3_support import BUCKET, FAULTS, break_store
from tests_support import tiny_config

import ray_job
from cluster import checkpoints
from pipeline import storage
from stages.config import to_yaml

RAY_JOB = str(Path(__file__).parent.parent / "ray_job.py")
TRAIN = ("train.num_steps=30", "train.checkpoint_every_steps=3")


class Job:
    """A tiny configuration below one s3:// prefix, and the commands run on it so far."""

    def __init__(self, prefix, folder, environment):
        self.prefix, self.environment = prefix, environment
        self.config = os.path.join(folder, "config.yaml")
        self.working_folder = os.path.join(folder, "empty")
        self.output = ""
        os.mkdir(self.working_folder)
        source = {"name": "image-folder", "path": f"{prefix}/train", "holdout_path": f"{prefix}/holdout"}
        Path(self.config).write_text(to_yaml(tiny_config(prefix, source=source)))

    def start(self, *arguments):
        """A command as the leader of a process group, in a working folder that should stay empty."""
        command = [sys.executable, RAY_JOB, *arguments]
        options = {"cwd": self.working_folder, "start_new_session": True, "text": True}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=self.environment, **options, **pipes)

    def run(self, *arguments):
        """The summary of a command that must succeed."""
        process = self.start(*arguments, "--json")
        out, err = process.communicate()
        self.output += out + err
        assert process.returncode == 0, err
        return json.loads(out.strip().splitlines()[-1])

    def configured(self, command, *overrides):
        return self.run(command, "-c", self.config, *overrides)


@pytest.fixture(scope="module")
def job(s3_server, tmp_path_factory):
    """Tokenizer (from Parquet), code dataset (from an image folder) and a run of 30 steps, all on S3."""
    with running_cluster() as cluster:
        job = Job(f"s3://{BUCKET}/{uuid.uuid4().hex}", str(tmp_path_factory.mktemp("s3-job")), cluster.environment)
        put_images(job.prefix)
        job.configured("train-tokenizer", "source.name=parquet", f"source.path={job.prefix}/parquet")
        job.configured("tokenize")
        job.trained = job.configured("train", *TRAIN)
        yield job


def put_images(prefix):
    """60 training and 24 held-out images of two classes as files, and the training images as Parquet."""
    rng = np.random.default_rng(0)
    rows = {"image": [], "label": []}
    for i in range(84):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
        split = "train" if i < 60 else "holdout"
        storage.put_if_absent(f"{prefix}/{split}/{'ab'[i % 2]}/{i}.png", buffer.getvalue())
        if split == "train":
            rows["image"].append(buffer.getvalue())
            rows["label"].append(i % 2)
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer)
    storage.put_if_absent(f"{prefix}/parquet/images.parquet", buffer.getvalue())


@pytest.mark.ray
def test_all_commands_work_on_s3_and_leave_sound_artefacts(job, s3_server, capsys):
    prefix = job.prefix
    assert job.trained["checkpoint"].startswith(f"{prefix}/run/checkpoints/step-000000030-")
    assert job.configured("sample")["samples"] == f"{prefix}/samples"
    measured, again = job.configured("evaluate"), job.configured("nightly")
    assert again["present"] == {job.trained["checkpoint"]: measured["record"]}, "what is measured is not measured again"
    assert measured["record"].startswith(f"{prefix}/evaluation/records/")
    assert again["page"] == f"{prefix}/evaluation/report.html"
    export = [f"{prefix}/tokenizer", "--format", "diffusers", "--output", f"{prefix}/export"]
    mark = job.run("export-tokenizer", *export)["fingerprint"]
    assert job.run("import-tokenizer", f"{prefix}/export", "--output", f"{prefix}/imported")["fingerprint"] == mark
    artefacts = [f"{prefix}/{name}" for name in ("tokenizer", "imported", "codes", "run")]
    for path in (*artefacts, job.trained["checkpoint"], measured["record"]):
        assert ray_job.main(["verify", path, "--json"]) == 0, path
        out, err = capsys.readouterr()
        job.output += out + err
        assert json.loads(out.strip().splitlines()[-1]) == {"path": path, "ok": True, "problems": []}
    assert os.listdir(job.working_folder) == [], "nothing is written beside S3"
    stored = b"".join(map(storage.read_bytes, storage.list_files(prefix)))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert s3_server[name] not in job.output and s3_server[name].encode() not in stored


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_run_on_s3_ends_where_an_undisturbed_one_does_and_goes_on_from_there(job):
    """SIGKILL of the driver's process group after the first commit; the same command; then one for more steps."""
    run = f"{job.prefix}/cut"
    driver = job.start("train", "-c", job.config, *TRAIN, f"run.path={run}")
    while not checkpoints.list_commits(run):
        assert driver.poll() is None, "the driver ended before its first commit"
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    job.output += "".join(driver.communicate())
    time.sleep(5)  # workers of a dead driver leave within seconds
    assert checkpoints.latest_commit(run).step < 30
    resumed = job.configured("train", *TRAIN, f"run.path={run}")
    for key in ("step", "train_loss", "sample_log_hash"):
        assert resumed[key] == job.trained[key], key
    longer = job.configured("train", "train.num_steps=32", f"run.path={run}")
    assert longer["step"] == 32 and f"Resuming from {resumed['checkpoint']}" in job.output
    assert job.run("verify", run)["ok"]
    assert not storage.list_files(f"{run}/ray"), "Ray's own state is no part of a run"
    assert os.listdir(job.working_folder) == []


KEYS = {"source.path": "tokenize", "tokenizer.path": "tokenize", "codes.path": "train", "run.path": "train"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("key", KEYS)
def test_a_store_that_cannot_be_used_is_named_by_the_key_that_leads_to_it(
    s3_server, capsys, tmp_path, monkeypatch, key, fault
):
    path, words = break_store(monkeypatch, fault)
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_config(str(tmp_path / "local"), source={"name": "image-folder", "path": "/none"})))
    assert ray_job.main([KEYS[key], "-c", str(config), f"{key}={path}"]) == 1
    err = capsys.readouterr().err
    assert f"error: {key} is {path}, but " in err and all(word in err for word in words), err
    assert "Traceback" not in err and os.listdir(tmp_path) == ["config.yaml"]
