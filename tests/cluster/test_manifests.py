"""The manifests of clusters, checked without one: they parse, name the pinned versions, and run commands that exist."""

import configparser
import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

import ray_job
from cluster import submit
from cluster.runtime import START_TIMEOUT
from stages import __version__
from stages.config import load_config

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
PAGE = (ROOT / "docs" / "clusters.md").read_text()
AWS = ROOT / "cluster" / "ray-up" / "aws.yaml"


def requirements() -> str:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"] + setup["options.extras_require"]["train"]


def pinned(package: str) -> str:
    """The version of a package in setup.cfg."""
    return re.search(rf"^{package}(?:\[.*\])?==(\S+)$", requirements(), re.MULTILINE).group(1)


def walk(value):
    """Every mapping inside a YAML value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


def command_lines() -> list[list[str]]:
    """Words of every command of ray_job.py in the manifests and on the page."""
    found = []
    for path in KUBERAY:
        for mapping in walk(yaml.safe_load(path.read_text())):
            found += [shlex.split(mapping["entrypoint"])] if "entrypoint" in mapping else []
            found += [mapping["command"]] if "ray_job.py" in mapping.get("command", []) else []
        found += [
            shlex.split(line) for line in re.findall(r"^# +(python ray_job.py .*)$", path.read_text(), re.MULTILINE)
        ]
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) + re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        found += [shlex.split(line, comments=True)] if "ray_job.py " in line else []
    return [words[next(i for i, word in enumerate(words) if word.endswith("ray_job.py")) + 1 :] for words in found]


def test_commands_are_found_in_every_manifest_that_runs_one_and_on_the_page():
    named = {words[0] for words in command_lines()}
    assert named >= {"tokenize", "train", "submit"} and len(command_lines()) >= 8


@pytest.mark.parametrize("words", command_lines(), ids=lambda words: " ".join(words)[:60])
def test_commands_parse_and_work_on_a_cluster(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word.replace("/opt/tessera/", "") for word in words]
    args = ray_job.parse(ray_job.build_parser(), words)
    if args.command == "submit":
        if args.follow:
            return
        words = args.command_line[1:]
        args = ray_job.parse(ray_job.build_parser(), words)
    assert submit.check_command(words, args) == tuple(words), "paths are shared, the configuration travels"
    if hasattr(args, "config"):
        load_config(args.config, args.overrides)


@pytest.mark.parametrize("path", [*KUBERAY, AWS], ids=lambda path: path.name)
def test_a_run_on_a_range_of_workers_shrinks_as_soon_as_the_page_says(path):
    assert START_TIMEOUT not in path.read_text(), "which would outlast the minute of operations.md"


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kuberay_manifests_name_the_pinned_versions_and_ask_for_a_token(path):
    manifest = yaml.safe_load(path.read_text())
    mappings = list(walk(manifest))
    images = {mapping["image"] for mapping in mappings if "image" in mapping}
    assert images == {f"registry.example.com/tessera:{__version__}"}
    clusters = [mapping for mapping in mappings if "rayVersion" in mapping]
    assert all(cluster["rayVersion"] == pinned("ray") for cluster in clusters)
    if manifest["kind"] == "CronJob":
        (token,) = [mapping for mapping in mappings if mapping.get("name") == "RAY_AUTH_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "tessera", "key": "auth_token"}, "that of raycluster.yaml"
    else:
        assert clusters and all(cluster["authOptions"] == {"mode": "token"} for cluster in clusters)
    assert not [mapping for mapping in mappings if mapping.get("value") and "SECRET" in mapping.get("name", "")]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_volumes_that_are_mounted_are_there(path):
    for pod in walk(yaml.safe_load(path.read_text())):
        if "containers" in pod:
            mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
            assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


def test_the_cron_job_goes_to_the_standing_cluster_and_never_overlaps():
    cron = yaml.safe_load((ROOT / "cluster" / "kuberay" / "cron-nightly.yaml").read_text())
    cluster = yaml.safe_load((ROOT / "cluster" / "kuberay" / "raycluster.yaml").read_text())
    (container,) = [mapping for mapping in walk(cron) if "workingDir" in mapping]
    assert f"http://{cluster['metadata']['name']}-head-svc:8265" in container["command"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid" and container["workingDir"] == "/opt/tessera"


def test_the_ray_cron_job_starts_a_cluster_per_night_and_cleans_up():
    cron = yaml.safe_load((ROOT / "cluster" / "kuberay" / "raycronjob-nightly.yaml").read_text())
    assert (cron["kind"], set(cron["spec"])) == ("RayCronJob", {"schedule", "timeZone", "jobTemplate"})
    job = cron["spec"]["jobTemplate"]
    assert job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] and job["backoffLimit"] == 0
    assert "nightly" in job["entrypoint"].split()


def test_the_lines_for_a_crontab_parse():
    page = (ROOT / "docs" / "nightly.md").read_text()
    (line,) = re.findall(r"```crontab\n(.*?)\n```", page)
    words = shlex.split(line.split("ray_job.py", 1)[1].split(">>")[0])
    assert ray_job.parse(ray_job.build_parser(), words).command == "nightly"
    assert len(line.split()[:5]) == 5 and "%" not in line, "a % ends a line of cron"


def test_ray_up_follows_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load(AWS.read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["docker"]["image"] == f"registry.example.com/tessera:{__version__}"
    assert any(path.endswith(".ray/auth_token") for path in config["file_mounts"])
    starts = [
        text for text in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in text
    ]
    assert len(starts) == 2 and all(shlex.split(text) for text in starts)


def test_the_image_holds_the_pinned_versions_and_demands_a_token():
    for package in ("torch", "ray", "deepspeed"):
        assert re.search(rf"\b{package}(?:\[.*?\])?==(\S+?)[\s\"]", DOCKERFILE).group(1) == pinned(package), package
    assert "ENV RAY_AUTH_MODE=token" in DOCKERFILE
    assert f"tessera:{__version__}" in DOCKERFILE


def test_the_image_gets_what_a_job_takes_along_and_what_installing_needs():
    ignored = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    travels = re.findall(r"^!/(\w[\w.]*)$", (ROOT / ".rayignore").read_text(), re.MULTILINE)
    assert {*travels, "setup.cfg", "pyproject.toml", ".rayignore"} <= kept and ignored[1] == "*"
