"""Workers on a real cluster of two nodes: what they are told about their place, and that tests find the process of a rank."""

import json
import os
from pathlib import Path

import pytest
from cluster_support import running_cluster, wait_until

# Workers are described by value: what a driver defines itself is not importable elsewhere.
DRIVER = """
import json, os, sys, tempfile, time
import ray, ray.train, torch
from cluster.runtime import connected
from cluster.worker_group import run_workers
from stages.options import ScalingOptions

def worker(folder, num_threads):
    context = ray.train.get_context()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    place = {
        "node_rank": context.get_node_rank(), "local_rank": context.get_local_rank(), "pid": os.getpid(),
        "local_world_size": context.get_local_world_size(), "node": ray.get_runtime_context().get_node_id(),
        "temporary_folder": tempfile.gettempdir(), "total": total.item(),
    }
    with open(f"{folder}/new-{context.get_world_rank()}", "w") as file:
        json.dump(place, file)
    os.rename(file.name, f"{folder}/{context.get_world_rank()}.json")
    while not os.path.exists(f"{folder}/go"):
        time.sleep(0.1)

folder = sys.argv[1]
with connected():
    run_workers(worker, folder, ScalingOptions(num_workers=4), f"{folder}/ray")
"""


@pytest.mark.ray
def test_four_workers_on_two_nodes_know_their_place_and_are_found_by_rank(tmp_path):
    with running_cluster((2, 2)) as cluster:
        driver = cluster.start("-c", DRIVER, str(tmp_path))
        paths = [tmp_path / f"{rank}.json" for rank in range(4)]
        wait_until(lambda: all(map(os.path.exists, paths)), "four workers have started", driver, seconds=180)
        places = [json.loads(path.read_text()) for path in paths]
        pids = {rank: process.pid for rank, process in cluster.train_workers().items()}
        on_node = [{process.pid for process in node.processes()} for node in cluster.nodes]
        (tmp_path / "go").touch()
        assert driver.wait(timeout=120) == 0, driver.stderr.read()
    assert [(place["node_rank"], place["local_rank"]) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {(place["local_world_size"], place["total"]) for place in places} == {(2, 4.0)}
    assert pids == {rank: place["pid"] for rank, place in enumerate(places)}
    for key in ("node", "temporary_folder"):
        assert places[0][key] == places[1][key] != places[2][key] == places[3][key]
    assert sorted(len(on & set(pids.values())) for on in on_node) == [2, 2]
    assert not cluster.processes() and not Path(cluster.folder).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_come_and_go(tmp_path):
    with running_cluster((0,)) as cluster:
        removed, killed, beheaded = (cluster.add_node(num_cpus=1) for _ in range(3))
        assert {node.ip for node in cluster.nodes[1:]} == {"127.0.0.2", "127.0.0.3", "127.0.0.4"}
        assert sum(node["state"] == "ALIVE" for node in cluster.state("nodes")) == 4
        cluster.remove_node(removed)
        cluster.kill_node(killed)
        cluster.kill_raylet(beheaded)
        wait_until(
            lambda: sum(node["state"] == "ALIVE" for node in cluster.state("nodes")) == 1, "the head has noticed"
        )
        assert not removed.processes() and not killed.processes()
        cluster.add_node(num_cpus=1)
    assert not cluster.processes()
