"""How long a training job takes to its first step, how long after a kill to its next, and how much of the time it trains under fire.

python benchmarks/restart.py [--minutes 0] [--kill-every 120]

A real Ray cluster of two nodes with one core each, two workers of ZeRO 1, a small transformer. With --minutes it also trains for so long
while a random worker is killed every --kill-every seconds, and prints the goodput beside what a model predicts.
"""

import sys

if not __package__:  # run as a file: this folder would hide Python's own module `tokenize`
    sys.path[0] = sys.path[0].rpartition("/")[0]
sys.path.append(sys.path[0] + "/tests")

import argparse
import glob
import json
import os
import random
import statistics
import tempfile
import time
from typing import Any

from cluster_support import Cluster, running_cluster, wait_until
from job_support import write_train_job

from cluster import checkpoints
from cluster.train_metrics import read_metrics
from pipeline import storage

SECTIONS: dict[str, Any] = {
    "model": {"num_layers": 6, "hidden_size": 256, "num_heads": 4},
    "deepspeed": {"zero_stage": 1},
    "scaling": {"num_workers": 2, "cpus_per_worker": 1, "threads_per_worker": 1, "max_failures": 100},
}
CHECKPOINT_SECONDS = 10.0
UNDER_WAY_SECONDS = 3.0  # after a kill, steps of the group that was hit may still end


def lines(run: str) -> list[dict[str, Any]]:
    """Every line of the newest attempt's live view, in order of time."""
    paths = glob.glob(os.path.join(run, "metrics", "*.jsonl"))
    if not paths:
        return []
    return [json.loads(line) for line in storage.read_bytes(max(paths, key=os.path.getctime)).split(b"\n")[:-1]]


def steps_after(run: str, moment: float) -> list[dict[str, Any]]:
    """Lines of the newest attempt's steps that ended after a moment."""
    return [line for line in lines(run) if "event" not in line and line["time"] > moment]


def wait_for_step(run: str, moment: float) -> float:
    """Waits for a step that ends after a moment, and returns when it ended. Looks rarely, as the workers have all cores."""
    deadline = time.time() + 300
    while not (found := steps_after(run, moment)):
        assert time.time() < deadline, "no step within 300 s"
        time.sleep(0.5)
    return found[0]["time"]


def parts_since(run: str, moment: float, cluster: Cluster) -> dict[str, float]:
    """Seconds from a moment to the first step after it, by part."""
    ready = next(line for line in lines(run) if line.get("event") == "start" and line["time"] > moment)
    first = steps_after(run, ready["time"])[0]
    born = max(process.create_time() for process in cluster.train_workers().values())
    return {
        "until the workers' processes start": born - moment,
        "imports, process group": ready["time"] - sum(ready["seconds"].values()) - born,
        **ready["seconds"],
        "first step": first["time"] - ready["time"],
        "whole": first["time"] - moment,
    }


def show(title: str, parts: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items()), flush=True)


def measure(folder: str, minutes: float, kill_every: float) -> None:
    """Prints the comparison."""
    train = {"num_steps": 10**7, "checkpoint_every_steps": 10**7, "checkpoint_every_seconds": CHECKPOINT_SECONDS}
    config, run = write_train_job(folder, **SECTIONS, train=train), os.path.join(folder, "run")
    with running_cluster((0, 1, 1)) as cluster:
        started = time.time()
        cluster.start("ray_job.py", "train", "-c", config)
        wait_for_step(run, started)
        show("from the command to the first step", parts_since(run, started, cluster))
        for _ in range(3):
            wait_until(lambda: len(checkpoints.list_commits(run)) > 0, "a commit", seconds=300)
            time.sleep(15)
            killed = time.time()
            cluster.train_worker(random.randrange(2)).kill()
            wait_for_step(run, killed + UNDER_WAY_SECONDS)
            show("from a kill to the next step", parts_since(run, killed, cluster))
        if minutes:
            under_fire(cluster, run, minutes, kill_every)


def under_fire(cluster: Cluster, run: str, minutes: float, kill_every: float) -> None:
    """Kills a worker now and then, and prints the share of the time that went into steps that lasted."""
    first, began, waits = len(read_metrics(run)), time.time(), []
    while time.time() - began < 60 * minutes:
        time.sleep(max(0.0, began + kill_every * (len(waits) + 1) - time.time()))
        killed = time.time()
        cluster.train_worker(random.randrange(2)).kill()
        waits.append(wait_for_step(run, killed + UNDER_WAY_SECONDS) - killed)
    seconds, steps = time.time() - began, read_metrics(run)[first:]
    typical = statistics.median(line["seconds"] for line in steps)
    stall = sum(line["part_seconds"]["checkpoint"] for line in steps) / sum(line["seconds"] for line in steps)
    repair, interval = statistics.mean(waits), seconds / len(waits)
    predicted = (interval - repair - CHECKPOINT_SECONDS / 2) / interval * (1 - stall)
    print(
        f"{len(waits)} kills in {seconds / 60:.1f} min: goodput {len(steps) * typical / seconds:.1%}, predicted {predicted:.1%} from "
        f"a repair of {repair:.1f} s, a checkpoint every {CHECKPOINT_SECONDS:.0f} s and a stall of {stall:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--kill-every", type=float, default=120.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(folder, args.minutes, args.kill_every)


if __name__ == "__main__":
    main()
