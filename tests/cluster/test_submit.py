"""`submit` from a checkout to a real head with token authentication: what travels, what comes back, what goes wrong."""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests
from cluster_support import ROOT, free_port, running_cluster, wait_until
from code_dataset_support import Recipe, files_of, flip_bit
from job_support import write_train_job

import ray_job
from cluster import submit
from stages.errors import ConfigError

SECRET = "sesame-open"
LOCAL_ONLY = (
    ".git",
    ".venv",
    ".env",
    "id_rsa",
    "notes.txt",
    "runs",
    "tests",
    "docs",
    "images",
    "secrets.yaml",
    "weights.ckpt",
)


class Laptop:
    """A checkout with private files around the code, a home folder with the token, and `submit` in it."""

    def __init__(self, folder: Path, cluster):
        self.cluster = cluster
        self.checkout = folder / "checkout"
        self.home = folder / "home"
        shutil.copytree(ROOT, self.checkout, ignore=shutil.ignore_patterns(".?*", "__pycache__", "runs", "demo_output"))
        for name in (".rayignore", ".gitignore"):
            shutil.copy(ROOT / name, self.checkout / name)
        for name in LOCAL_ONLY:
            place = self.checkout / name
            if not place.exists():
                place = place if "." in name[1:] or name == "id_rsa" else place / "file"
                place.parent.mkdir(exist_ok=True)
                place.write_text(SECRET)
        (self.home / ".ray").mkdir(parents=True)
        (self.home / ".ray" / "auth_token").write_text(cluster.token)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        self.environment = {**kept, "HOME": str(self.home)}

    def program(self, name: str, text: str) -> str:
        """An executable to name with --python, for a driver that does as the test wants."""
        path = self.checkout / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def start(self, *arguments: str, address: str | None = None, **variables: str) -> subprocess.Popen:
        command = [sys.executable, "ray_job.py", "submit", "--address", address or self.cluster.dashboard, *arguments]
        return subprocess.Popen(
            command,
            cwd=self.checkout,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
        )

    def run(self, *arguments: str, **options: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a submit."""
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err and self.cluster.token not in out + err, err
        return process.returncode, out, err

    def job(self, name: str) -> dict:
        """What the head tells everyone about a job."""
        headers = {"Authorization": f"Bearer {self.cluster.token}"}
        return requests.get(f"{self.cluster.dashboard}/api/jobs/{name}", headers=headers, timeout=30).json()


@pytest.fixture(scope="module")
def cluster():
    with running_cluster((2,)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def laptop(cluster, tmp_path_factory):
    return Laptop(tmp_path_factory.mktemp("laptop"), cluster)


def summary(out: str) -> dict:
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.ray
class TestJobs:
    def test_a_job_gets_the_code_and_nothing_private_and_ends_as_its_driver_does(self, laptop, tmp_path):
        root = Recipe().write(tmp_path / "codes")
        variables = {
            "AWS_ACCESS_KEY_ID": SECRET,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": "https://store.example",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "321",
        }
        code, out, err = laptop.run("--json", "--", "verify", root, **variables)
        assert code == 0, out + err
        job = summary(out)
        assert job == {"job": job["job"], "status": "SUCCEEDED", "exit_code": 0} and f"{root}: sound" in out
        told = laptop.job(job["job"])
        assert SECRET not in json.dumps(told)
        assert told["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "https://store.example"
        assert told["runtime_env"]["env_vars"]["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "321"
        assert all(name in err for name in ("AWS_ENDPOINT_URL", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"))
        (package,) = Path(laptop.cluster.folder).glob(
            "head/ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"
        )
        uploaded = {
            str(path.relative_to(package)) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"
        }
        assert {"ray_job.py", "configs/demo.yaml", "stages/options/transformer.py", "evaluation/report.html.j2"} <= uploaded
        assert not {name.split("/")[0] for name in uploaded} & set(LOCAL_ONLY)
        assert sum((package / name).stat().st_size for name in uploaded) < 2 << 20
        assert not [name for name in uploaded if SECRET.encode() in (package / name).read_bytes()]

    def test_exit_codes_are_those_of_the_driver(self, laptop, tmp_path):
        root = Recipe().write(tmp_path / "codes")
        flip_bit(next(path for path in files_of(root, "data")), 1000)
        killed = laptop.program("killed.sh", "kill -9 $$")
        jobs = {
            1: (["--", "verify", root], ["problem(s)", "exit code 1"]),
            2: (
                ["--", "plan", "-c", "configs/demo.yaml", "tokenizer.path=/none", "tokenizer.codebook_size=100000"],
                ["codebook_size is 100000"],
            ),
            127: (["--python", "/no/such/python", "--", "verify", "/tmp"], ["--python is /no/such/python"]),
            137: (["--python", killed, "--", "verify", "/tmp"], ["ended by signal 9"]),
        }
        started = {code: laptop.start("--json", *arguments) for code, (arguments, _) in jobs.items()}
        for code, process in started.items():
            out, err = process.communicate(timeout=300)
            assert process.returncode == code == summary(out)["exit_code"] and summary(out)["status"] == "FAILED", err
            assert all(word in out + err for word in jobs[code][1]), out + err

    @pytest.mark.slow
    def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(self, laptop, tmp_path):
        python = laptop.program("slow.sh", f"echo first; while ! [ -e {tmp_path}/go ]; do sleep 0.1; done; printf second")
        process = laptop.start("--python", python, "--job-id", "slow", "--json", "--", "verify", "/tmp")
        seen = ""
        while "first" not in seen:
            seen += process.stdout.readline()
            assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and summary(out) == {"job": "slow", "status": "RUNNING", "exit_code": 130}
        assert "Traceback" not in err and "ray job stop" in out and "second" not in out
        assert laptop.job("slow")["status"] == "RUNNING"
        again = re.search(r"ray_job.py submit (.*)", out).group(1).split()
        (tmp_path / "go").touch()
        code, out, _ = laptop.run(*again, "--json")
        assert code == 0 and out.count("first") == out.count("second") == 1
        assert summary(out)["status"] == "SUCCEEDED", "on a line of its own, though the driver's last line is open"
        code, _, err = laptop.run("--job-id", "slow", "--", "verify", "/tmp")
        assert code == 2 and "error: --job-id is slow, but the cluster has had a job of that name." in err

    def test_a_job_can_be_left_alone_and_stopped(self, laptop):
        python = laptop.program("sleep.sh", "exec sleep 600")
        code, out, _ = laptop.run("--python", python, "--job-id", "sleeper", "--no-wait", "--", "verify", "/tmp")
        assert code == 0 and "--follow sleeper" in out
        wait_until(lambda: laptop.job("sleeper")["status"] == "RUNNING", "the job runs")
        stop = re.search(r"Stop it: +(.*)", out).group(1)
        environment = {**laptop.environment, "PATH": f"{Path(sys.executable).parent}:{laptop.environment['PATH']}"}
        assert subprocess.run(stop, shell=True, env=environment, capture_output=True).returncode == 0
        code, out, err = laptop.run("--follow", "sleeper", "--json")
        assert code == 1 and summary(out) == {"job": "sleeper", "status": "STOPPED", "exit_code": 1}

    @pytest.mark.slow
    def test_training_over_a_connection_that_breaks(self, laptop, tmp_path):
        write_train_job(str(tmp_path), config_path=str(laptop.checkout / "mine.yaml"))
        variables = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "321"}  # which connecting to Ray sets as well
        with Relay(laptop.cluster.dashboard) as relay:
            process = laptop.start(
                "--json", "--", "train", "-c", "mine.yaml", "--json", address=relay.address, **variables
            )
            seen = ""
            while "Connected to Ray cluster" not in seen:
                seen += process.stdout.readline()
                assert process.poll() is None, seen + process.stderr.read()
            relay.cut()
            wait_until(lambda: "Lost the connection" in process.stderr.readline(), "the loss is noticed", process)
            relay.mend()
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        trained = json.loads(out.strip().splitlines()[-2])
        assert trained["step"] == 6 and trained["run"] == f"{tmp_path}/run" and os.path.isdir(trained["checkpoint"])
        assert "Connected to Ray cluster" not in out and "Committed step 6" in out, "the log goes on where it was"


@pytest.mark.ray
class TestConnection:
    @pytest.mark.parametrize(
        "token, variables, words",
        [
            (
                None,
                {},
                ["RAY_AUTH_TOKEN is not set, nor is there ~/.ray/auth_token", "wants a token", "ray get-auth-token"],
            ),
            ("0" * 32, {}, ["~/.ray/auth_token is a token, but not that of"]),
            (None, {"RAY_AUTH_TOKEN": "0" * 32}, ["RAY_AUTH_TOKEN is a token, but not that of"]),
            (None, {"RAY_AUTH_MODE": "token"}, ["RAY_AUTH_TOKEN is not set, nor is there ~/.ray/auth_token"]),
            (None, {"RAY_AUTH_MODE": "disabled"}, ["RAY_AUTH_MODE is disabled", "Unset it"]),
        ],
        ids=["none", "wrong file", "wrong variable", "none in token mode", "disabled"],
    )
    def test_without_the_token_there_is_a_clear_error(self, laptop, tmp_path, token, variables, words):
        (tmp_path / ".ray").mkdir()
        if token:
            (tmp_path / ".ray" / "auth_token").write_text(token)
        code, _, err = laptop.run("--", "verify", "/tmp", HOME=str(tmp_path), **variables)
        assert code == 1 and all(word in err for word in [*words, laptop.cluster.dashboard]), err

    def test_nothing_or_something_else_at_the_address(self, laptop):
        code, _, err = laptop.run("--", "verify", "/tmp", address=f"http://127.0.0.1:{free_port()}")
        assert code == 1 and "no Ray head answers there" in err
        with subprocess.Popen(
            [sys.executable, "-u", "-m", "http.server", "0"], stdout=subprocess.PIPE, text=True
        ) as server:
            port = re.search(r"port (\d+)", server.stdout.readline()).group(1)
            code, _, err = laptop.run("--", "verify", "/tmp", address=f"http://127.0.0.1:{port}")
            server.kill()
        assert code == 1 and "error: --address is" in err

    def test_a_job_that_the_head_does_not_know(self, laptop):
        code, _, err = laptop.run("--follow", "nobody", RAY_API_SERVER_ADDRESS="http://127.0.0.1:9")  # --address wins
        assert code == 1 and f"error: The job is nobody, but the head at {laptop.cluster.dashboard} knows none" in err


@pytest.mark.ray
@pytest.mark.slow
def test_a_head_that_dies_while_it_is_followed(tmp_path):
    with running_cluster((1,)) as cluster:
        laptop = Laptop(tmp_path, cluster)
        python = laptop.program("slow.sh", "echo first; exec sleep 600")
        process = laptop.start("--python", python, "--job-id", "slow", "--retry-seconds", "2", "--", "verify", "/tmp")
        while "first" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        cluster.kill_node(cluster.nodes[0])
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert f"error: --address is {cluster.dashboard}, but the head there has not answered for" in err
    assert "--follow slow" in err


class Relay:
    """A TCP relay to an http address, which can be cut and mended."""

    def __init__(self, target: str):
        self._target = ("127.0.0.1", int(target.rsplit(":", 1)[1]))
        self._port = free_port()
        self._open: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "Relay":
        self.mend()
        return self

    def __exit__(self, *_) -> None:
        self.cut()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        for connection in (self._listener, *self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, far = listener.accept()[0], socket.create_connection(self._target)
            except OSError:
                return
            self._open += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def parsed(*words: str) -> argparse.Namespace:
    return ray_job.parse(ray_job.build_parser(), list(words))


@pytest.mark.parametrize(
    "words, key",
    [
        (["train", "-c", "configs/demo.yaml"], "run.path is demo_output/run"),
        (
            ["train", "-c", "configs/demo.yaml", "run.path=s3://b/run", "tokenizer.path=/t", "codes.path=x/y"],
            "codes.path is x/y",
        ),
        (
            ["train-tokenizer", "-c", "configs/demo.yaml", "tokenizer.path=/t", "tokenizer_train.perceptual_vgg=vgg.pth"],
            "tokenizer_train.perceptual_vgg is vgg.pth",
        ),
        (
            ["train", "-c", "configs/demo.yaml", "run.path=/r", "tokenizer.path=/t", "codes.path=/c", "conditioning.codes_path=x/y"],
            "conditioning.codes_path is x/y",
        ),
        (["verify", "runs/x"], "PATH is runs/x"),
        (["demo"], "--output is demo_output"),
        (["export-transformer", "runs/x", "--format", "compvis", "--output", "s3://b/out"], "checkpoint is runs/x"),
        (["export-transformer", "s3://b/x", "--format", "compvis", "--output", "out"], "--output is out"),
        (["import-tokenizer", "s3://b/f.ckpt", "--output", "s3://b/t", "--config", "my.yaml"], "--config is my.yaml"),
        (["evaluate", "-c", "configs/demo.yaml", "--tokenizer"], "run.path is demo_output/run"),
        (["submit", "--", "plan", "-c", "configs/demo.yaml"], "The command is submit"),
        (["plan", "-c", "configs/demo.yaml"], "tokenizer.path is demo_output/tokenizer"),
        (["plan", "-c", "/etc/hostname.yaml"], "-c is /etc/hostname.yaml"),
        (["plan", "-c", "configs/demo.yaml", "train.no_such_key=1"], "train.no_such_key"),
    ],
)
def test_what_cannot_work_on_the_head_is_refused_before_anything_is_sent(monkeypatch, words, key):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        submit.check_command(words, parsed(*words))
    assert key in str(error.value)


def test_a_configuration_outside_the_checkout_or_left_out_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "CHECKOUT", tmp_path / "checkout")
    for name in ("checkout/runs/my.yaml", "checkout/my.yaml", "my.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("tokenizer: {path: /t}")
    shutil.copy(ROOT / ".rayignore", tmp_path / "checkout")
    for name in ("my.yaml", "checkout/runs/my.yaml"):
        with pytest.raises(ConfigError, match=f"-c is {name}, but only what .rayignore lets through"):
            submit.check_command(["plan", "-c", name], parsed("plan", "-c", name))
    for spelling in (["-c", "checkout/my.yaml"], ["--config=checkout/my.yaml"], ["-ccheckout/my.yaml"]):
        words = submit.check_command(["plan", *spelling], parsed("plan", *spelling))
        assert parsed(*words).config == ["my.yaml"]


@pytest.mark.parametrize(
    "environment, address, names",
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "x", "AWS_SESSION_TOKEN": "x", "HOME": "/root", "RAY_AUTH_TOKEN": "x"},
            "http://h:1",
            [],
        ),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:8333", "AWS_REGION": "r"}, "http://h:1", ["AWS_REGION"]),
        ({"AWS_ENDPOINT_URL": "http://localhost:8333"}, "http://127.0.0.1:1", ["AWS_ENDPOINT_URL"]),
        ({"AWS_ENDPOINT_URL_S3": "https://me:word@store"}, "http://h:1", []),
        (
            {"NCCL_DEBUG": "INFO", "RAY_TRAIN_X": "1", "RAY_ADDRESS": "auto"},
            "http://h:1",
            ["NCCL_DEBUG", "RAY_TRAIN_X"],
        ),
    ],
)
def test_which_variables_travel(environment, address, names):
    assert sorted(submit.travelling(environment, address)) == names


@pytest.mark.parametrize("address", ["head:8265", "auto", "ray://head:10001"])
def test_an_address_that_is_not_http_is_refused(address, capsys, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    assert ray_job.main(["submit", "--address", address, "--", "verify", "/tmp"]) == 2
    assert f"--address is {address}, but it must be the http:// address" in capsys.readouterr().err
