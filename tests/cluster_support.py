"""Real Ray clusters on one machine, with token authentication: a head and nodes with addresses and folders of their own.

Every process of a cluster is started, found and ended by this module; no other Ray on the machine is touched, and none is joined.

    with running_cluster(num_cpus=(0, 2, 2)) as cluster:  # the head, and two nodes to lose
        driver = cluster.start("ray_job.py", "train", "-c", config)
        cluster.train_worker(rank=1).kill()               # psutil.Process: kill(), suspend(), resume()
        cluster.kill_node(cluster.nodes[2])
        cluster.add_node(num_cpus=2)
        driver.wait(timeout=300)
"""

import itertools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

ROOT = Path(__file__).resolve().parents[1]
NODE = "TESSERA_TEST_NODE"  # environment variable: the folder of the node that a process belongs to
OBJECT_STORE_BYTES = 100 << 20
# The head takes a node for lost after five checks without an answer: some seconds instead of Ray's fifteen and more.
HEALTH_CHECKS = {"RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "1000"}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A raylet and what belongs to it.

    Attributes:
        folder: Ray's temporary folder of this node; its TMPDIR is `folder/tmp`.
        ip: its address.
        process: `ray start --block`, the leader of a process group.
    """

    folder: str
    ip: str
    process: subprocess.Popen

    def processes(self) -> list[psutil.Process]:
        """Every living process of the node, workers too."""
        return find_processes(self.folder, {self.process.pid})

    @property
    def raylet(self) -> psutil.Process:
        """The process whose death Ray takes for that of the node."""
        return next(process for process in self.processes() if process.name() == "raylet")


class Cluster:
    """A running cluster.

    Attributes:
        folder: everything the cluster writes.
        address: for RAY_ADDRESS.
        dashboard: http address for `submit`.
        token: what the dashboard and all nodes want to see.
        nodes: the living ones in the order they joined; the head first.
        environment: what a driver needs in order to use the cluster.
    """

    def __init__(self, folder: str, environment: dict[str, str]):
        self.folder = folder
        self.token = secrets.token_hex(16)
        self.nodes: list[Node] = []
        self._sessions: set[int] = set()
        self._ports = [free_port() for _ in range(3)]
        self._numbers = itertools.count(1)
        self.address = f"{own_ip()}:{self._ports[0]}"
        self.dashboard = f"http://127.0.0.1:{self._ports[1]}"
        home = os.path.join(folder, "home")
        os.makedirs(os.path.join(home, ".ray"))
        Path(home, ".ray", "auth_token").write_text(self.token)
        dropped = ("RAY_AUTH_MODE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
        self._base = {name: value for name, value in {**os.environ, **environment}.items() if name not in dropped} | {
            "HOME": home,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": os.path.join(folder, "head"),
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            **HEALTH_CHECKS,
        }
        self.environment = {**self._base, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": self.address}

    def start_head(self, num_cpus: float) -> Node:
        """Starts the head, as its users do: a token lies in the home folder, so Ray turns authentication on by itself."""
        gcs, dashboard, client = map(str, self._ports)
        options = ["--head", "--port", gcs, "--dashboard-port", dashboard, "--ray-client-server-port", client]
        node = self._start_node("head", own_ip(), num_cpus, [*options, "--dashboard-host", "127.0.0.1"], self._base)
        wait_until(lambda: bool(self._alive()), "the head is up", node.process)
        return node

    def add_node(self, num_cpus: float = 2, ip: str | None = None) -> Node:
        """Starts a node at an address of its own (127.0.0.2 and up) and waits until the cluster has it."""
        number = next(self._numbers)
        options = ["--address", self.address, "--temp-dir", os.path.join(self.folder, f"n{number}")]
        node = self._start_node(f"n{number}", ip or f"127.0.0.{number + 1}", num_cpus, options, self.environment)
        wait_until(lambda: node.ip in self._alive(), f"node {node.ip} joins", node.process)
        return node

    def _start_node(self, name: str, ip: str, num_cpus: float, options: list[str], environment: dict[str, str]) -> Node:
        folder = os.path.join(self.folder, name)
        os.makedirs(os.path.join(folder, "tmp"))
        os.makedirs(os.path.join(folder, "ray"))
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--node-ip-address", ip, *options]
        command += ["--num-cpus", str(num_cpus), "--object-store-memory", str(OBJECT_STORE_BYTES)]
        command += [
            "--dashboard-agent-listen-port",
            str(free_port()),
            "--min-worker-port",
            "0",
            "--max-worker-port",
            "0",
        ]
        with open(f"{folder}.log", "w") as log:
            process = subprocess.Popen(
                command,
                env={**environment, NODE: folder, "TMPDIR": os.path.join(folder, "tmp")},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._sessions.add(process.pid)
        node = Node(folder=folder, ip=ip, process=process)
        self.nodes.append(node)
        return node

    def _alive(self) -> set[str]:
        """Addresses of the nodes that the head takes for living; one that was killed is among them until its checks fail."""
        return {node["node_ip"] for node in self.state("nodes") if node["state"] == "ALIVE"}

    def state(self, kind: str) -> list[dict[str, Any]]:
        """What the head knows of its `nodes`, `actors`, `placement_groups` …; nothing while it does not answer."""
        try:
            headers = {"Authorization": f"Bearer {self.token}"}
            answer = requests.get(f"{self.dashboard}/api/v0/{kind}", headers=headers, timeout=10)
            return answer.json()["data"]["result"]["result"] if answer.ok else []
        except (requests.RequestException, TypeError, ValueError):
            return []

    def remove_node(self, node: Node) -> None:
        """Ends a node as a machine that is shut down does: SIGTERM, and SIGKILL for what stays."""
        node.process.terminate()
        try:
            node.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            pass
        self.kill_node(node)

    def announce_preemption(self, node: Node, seconds: int) -> None:
        """Tells the cluster, as a cloud does, that a node will be taken away after so many seconds; that it is, is up to the caller."""
        (node_id,) = (found["node_id"] for found in self.state("nodes") if found["node_ip"] == node.ip)
        command = [
            str(Path(sys.executable).parent / "ray"),
            "drain-node",
            "--address",
            self.address,
            "--node-id",
            node_id,
        ]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot instance is reclaimed"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def kill_node(self, node: Node) -> None:
        """Loses a machine: SIGKILL for all of its processes at once."""
        self.nodes.remove(node)
        kill(node.processes())
        node.process.wait()

    def kill_raylet(self, node: Node) -> None:
        """SIGKILL for the raylet only; its workers notice, and leave by themselves."""
        self.nodes.remove(node)
        kill([node.raylet])
        node.process.wait()

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen:
        """`python ARGUMENTS` in the repository, as a driver beside the head that leads a process group.

        Its output comes as text through `stdout` and `stderr`.
        """
        folder = os.path.join(self.folder, "driver")
        os.makedirs(folder, exist_ok=True)
        environment = {**self.environment, NODE: folder, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **variables}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes)

    def processes(self) -> list[psutil.Process]:
        """Every living process of the cluster and of its drivers, also of nodes that were removed."""
        return find_processes(self.folder, self._sessions)

    def train_workers(self) -> dict[int, psutil.Process]:
        """The living workers of Ray Train by rank.

        A worker's rank stands in every record of the log that it holds open.
        """
        found = {}
        for process in self.processes():
            for path in open_files(process):
                if "/logs/train/ray-train-sys-worker-" in path and (first := Path(path).read_text().partition("\n")[0]):
                    found[json.loads(first)["world_rank"]] = process
        return found

    def train_worker(self, rank: int, seconds: float = 120) -> psutil.Process:
        """The worker of Ray Train that has a rank, as soon as there is one."""
        wait_until(lambda: rank in self.train_workers(), f"a worker of rank {rank} runs", seconds=seconds)
        return self.train_workers()[rank]

    def end(self) -> None:
        """Ends every process of the cluster, and waits until none is left."""
        while left := self.processes():
            kill(left)
        for node in self.nodes:
            node.process.wait()


@contextmanager
def running_cluster(num_cpus: tuple[float, ...] = (2,), **variables: str) -> Iterator[Cluster]:
    """A cluster of one node per number of CPUs, the head first; nothing of it stays behind.

    Args:
        num_cpus: of every node. With 0 for the head, all workers are on nodes that can be lost.
        variables: environment variables of every process, drivers too.
    """
    folder = tempfile.mkdtemp(prefix="rc", dir="/tmp")  # short: the names of Unix sockets are limited
    cluster = Cluster(folder, variables)
    try:
        cluster.start_head(num_cpus[0])
        for count in num_cpus[1:]:
            cluster.add_node(count)
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def find_processes(folder: str, sessions: set[int]) -> list[psutil.Process]:
    """Every living process of the nodes whose folder is this one or below it.

    Args:
        folder: what the environment of most processes names.
        sessions: of the nodes' leaders. Ray's agents write over their environment, the drivers of jobs leave the session.
    """
    found = []
    for process in psutil.process_iter():
        try:
            place = process.environ().get(NODE, "")
            is_ours = place == folder or place.startswith(folder + "/") or os.getsid(process.pid) in sessions
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            pass
    return found


def open_files(process: psutil.Process) -> list[str]:
    """Paths of the regular files that a process holds open; none if it is gone."""
    try:
        return [file.path for file in process.open_files()]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL for all, and waits until they are gone."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(processes, timeout=10)


def wait_until(
    condition: Callable[[], bool], what: str, process: subprocess.Popen | None = None, seconds: float = 60
) -> None:
    """Waits for a condition; fails when it takes too long or the process it depends on ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def own_ip() -> str:
    """The address that Ray gives a head which is told to use the loopback device."""
    import ray.util

    return ray.util.get_node_ip_address()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
