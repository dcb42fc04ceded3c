"""kill -9 of what `python ray_job.py tokenize` consists of: Ray replaces workers, the same command the rest."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from kill_support import MIN_KILLS, half, sound
from tests_support import TINY_TOKENIZER, tiny_config

import ray_job
from pipeline import storage
from pipeline.code_dataset import CodeDataset
from pipeline.tokenizers import store_tokenizer
from stages.config import to_yaml
from stages.first_stage.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
NUM_IMAGES, SHARD_SIZE = 120, 4
TITLES = {"decoder": "decode_shard", "encoder": "ShardEncoder", "raylet": "raylet/raylet"}  # of processes, in part
VICTIMS = (*TITLES, "driver")
FATAL = ("raylet", "driver")  # to the command; the others it survives
QUICK_VICTIMS = ["encoder", "driver"]
KILLS_PER_DATASET = 5
SECONDS_TO_DIE = 120

pytestmark = pytest.mark.timeout(3600)
CASES = [("local", "quick"), *(pytest.param(place, "slow", marks=pytest.mark.slow) for place in ("local", "s3"))]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("tokenizer"))
    store_tokenizer(Tokenizer(TINY_TOKENIZER), path)
    return path


@pytest.fixture(scope="module")
def expected_root_hash(tokenizer, tmp_path_factory, ray_cluster):
    """Of the dataset that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert ray_job.main(["tokenize", "-c", write_config(folder, tokenizer, str(folder / "codes"))]) == 0
    return CodeDataset.open(str(folder / "codes"), verify=True).root_hash


def write_config(folder, tokenizer, root):
    config = tiny_config(
        folder,
        source={"num_images": NUM_IMAGES},
        tokenizer={"path": tokenizer},
        codes={"path": root, "shard_size": SHARD_SIZE, "conditions": ["depth"], "remap_unused": True},
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    return str(folder / "config.yaml")


@pytest.mark.ray
@pytest.mark.parametrize("place, speed", CASES)
def test_killed_processes_lose_and_repeat_nothing(place, speed, request, tokenizer, expected_root_hash, tmp_path):
    base = request.getfixturevalue("s3") if place == "s3" else str(tmp_path)
    choice, num_kills = random.Random(place), 0
    for number in itertools.count():
        victims = choice.choices(VICTIMS, k=KILLS_PER_DATASET) if speed == "slow" else QUICK_VICTIMS
        root = f"{base}/codes-{number}"
        num_kills += tokenize_under_fire(write_config(tmp_path, tokenizer, root), root, victims, choice)
        assert sound(root, expected_root_hash)
        if num_kills >= MIN_KILLS[f"tokenize-{place}"][speed == "slow"]:
            return


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "s3"])
def test_two_jobs_at_once_write_one_dataset(place, request, tokenizer, expected_root_hash, tmp_path):
    root = request.getfixturevalue("s3") if place == "s3" else str(tmp_path / "codes")
    config = write_config(tmp_path, tokenizer, root)
    jobs = [start(config) for _ in range(2)]
    assert [finish(job) for job in jobs] == [expected_root_hash] * 2
    assert sound(root, expected_root_hash)


def tokenize_under_fire(config, root, victims, choice):
    """Runs the command until it succeeds, with each victim killed at some moment of its work; how many were hit."""
    driver, num_kills = start(config), 0
    for number, victim in enumerate(victims):
        if victim != "decoder":  # all is soon decoded
            wait_for_progress(driver, root, choice.randrange(1, 4) + number * NUM_IMAGES // SHARD_SIZE // len(victims))
            time.sleep(choice.random() * 0.2)
        was_hit = kill(driver, victim)
        num_kills += was_hit
        if was_hit and victim in FATAL:
            driver.wait(timeout=SECONDS_TO_DIE)
            assert not half(root)
            driver = start(config)
    finish(driver)
    return num_kills


def start(config):
    """The command as a process with a group of its own, and with files for what it says, which no one reads meanwhile."""
    command = [sys.executable, "ray_job.py", "tokenize", "-c", config, "--json"]
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    driver = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=out, stderr=err)
    driver.out, driver.err = out, err
    return driver


def finish(driver):
    """The root hash that a command which must succeed reports."""
    code = driver.wait()
    for file in (driver.out, driver.err):
        file.seek(0)
    assert code == 0, driver.err.read()[-3000:].decode()
    return json.loads(driver.out.read().splitlines()[-1])["root_hash"]


def wait_for_progress(driver, root, num_receipts):
    """Until so many shards are done, or the job is over."""
    while driver.poll() is None and len(storage.list_files(storage.join(root, "receipts"))) < num_receipts:
        time.sleep(0.02)


def kill(driver, victim):
    """Kills a command's process group, or a process of its own Ray as soon as there is one; whether there was."""
    while driver.poll() is None:
        if victim == "driver":
            os.killpg(driver.pid, signal.SIGKILL)
            return True
        with suppress(psutil.Error):  # a process that is gone by now
            for process in psutil.Process(driver.pid).children(recursive=True):
                if TITLES[victim] in "".join(process.cmdline()[:1]):
                    process.kill()
                    return True
    return False
