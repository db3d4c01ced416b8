"""Manifests in deploy/: against validators where they are here, and what each must say to work with the rest."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import batch, ray_serve, serve
from launch.up_recipe import Wanted, read_wanted

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RELEASE = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
DRAIN_S = 300  # serve's --drain-timeout

# Fields of ray.io/v1, from KubeRay's API reference (docs.ray.io/en/master/cluster/kubernetes/references/api.html).
RAY_SERVICE = {
    "serveConfigV2",
    "rayClusterConfig",
    "upgradeStrategy",
    "serveService",
    "excludeHeadPodFromServeSvc",
}
RAY_JOB = {
    "entrypoint",
    "submissionMode",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
    "activeDeadlineSeconds",
}
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
HEAD_GROUP = {"rayStartParams", "template", "serviceType", "headService"}
WORKER_GROUP = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "rayStartParams",
    "template",
    "numOfHosts",
}
SERVE_CONFIG = {"http_options", "applications"}
APPLICATION = {"name", "import_path", "route_prefix", "args"}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay" / name).read_text()))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    [found] = [document for document in documents(name) if document["kind"] == kind]
    return found


def clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "rayservice.yaml", of_kind("rayservice.yaml", "RayService")["spec"]["rayClusterConfig"]
    yield "rayjob.yaml", of_kind("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"]


def pods(cluster: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **g["template"]} for g in groups]


def read(tmp_path: Path, text: str, **asked: Any) -> Wanted:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_wanted(path, asked)


def test_kuberay_documents_have_fields_that_kuberay_knows() -> None:
    assert set(of_kind("rayservice.yaml", "RayService")["spec"]) <= RAY_SERVICE
    assert set(of_kind("rayjob.yaml", "RayJob")["spec"]) <= RAY_JOB
    for _, cluster in clusters():
        assert set(cluster) <= RAY_CLUSTER
        assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
        assert all(set(group) <= WORKER_GROUP for group in cluster["workerGroupSpecs"])
        params = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        assert all(type(value) is str for group in params for value in group["rayStartParams"].values())


def test_kuberay_clusters_ask_for_a_token_and_run_the_ray_that_is_pinned() -> None:
    for _, cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "shardwise-ray"}
        assert cluster["rayVersion"] == PINS["ray"]


def test_pods_mount_what_they_declare_and_run_this_release() -> None:
    assert RELEASE is not None
    for _, cluster in clusters():
        for pod in pods(cluster):
            [container] = pod["spec"]["containers"]
            assert container["image"] == f"shardwise:{RELEASE[1]}"
            declared = {volume["name"] for volume in pod["spec"]["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == declared
            assert len({port["containerPort"] for port in container.get("ports", [])}) == len(
                container.get("ports", [])
            )


def test_the_services_application_is_ours_and_its_recipe_is_mounted(tmp_path: Path) -> None:
    spec = of_kind("rayservice.yaml", "RayService")["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    assert set(config) <= SERVE_CONFIG
    [application] = config["applications"]
    assert set(application) <= APPLICATION
    module, _, name = application["import_path"].partition(":")
    assert (module, getattr(ray_serve, name)) == ("launch.ray_serve", ray_serve.app)
    container = pods(spec["rayClusterConfig"])[0]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["serve"] == config["http_options"]["port"], "KubeRay's probes ask at the port of this name"
    data = of_kind("rayservice.yaml", "ConfigMap")["data"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    recipe = Path(application["args"]["recipe"])
    assert str(recipe.parent) == mounts["recipe"]
    wanted = read(tmp_path, data[recipe.name], address="auto")
    flags = dict(zip(wanted.flags[::2], wanted.flags[1::2], strict=True))
    assert int(flags["--port"]) == ports["openai"]
    assert flags["--host"] == "0.0.0.0"
    assert str(wanted.key_file) == f"{mounts['keys']}/keys.txt"
    assert (
        spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        > DRAIN_S
    )


def test_the_jobs_entrypoint_is_a_command_of_ours() -> None:
    words = shlex.split(of_kind("rayjob.yaml", "RayJob")["spec"]["entrypoint"])
    assert words[:2] == ["shardwise", "batch"]
    parser = argparse.ArgumentParser()
    batch.add_arguments(parser)
    args = parser.parse_args(words[2:])
    assert (args.verb, args.address, args.device) == ("run", "auto", "cuda")
    head = dict(clusters())["rayjob.yaml"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    mounted = tuple(mount["mountPath"] for mount in head["volumeMounts"])
    assert all(str(path).startswith(mounted) for path in (args.model, args.file, args.output, args.job_dir))


@pytest.mark.slow
def test_kubernetes_knows_the_pods_and_the_rest() -> None:
    """By its own schemas: pip install kubernetes-validate (17,000 files, so not among what every check installs)."""
    validator = pytest.importorskip("kubernetes_validate")
    ours = [
        d for name in ("rayservice.yaml", "rayjob.yaml") for d in documents(name) if d["apiVersion"] == "v1"
    ]
    for document in [*ours, *(pod for _, cluster in clusters() for pod in pods(cluster))]:
        validator.validate(document, "1.37", strict=True)


# --- containers ---------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_copies_what_is_there_and_runs_as_nobody_special() -> None:
    told = instructions()
    assert told[0][0] == "FROM"
    known = {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL"}
    assert {name for name, _ in told} <= known | {"HEALTHCHECK", "ENTRYPOINT", "CMD"}
    copied = [source for name, words in told if name == "COPY" for source in words.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == set(copied)
    assert {"cluster", "strategies", "orchestrator", "launch"} <= let_in
    names = [name for name, _ in told]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert ("ENTRYPOINT", '["shardwise"]') in told


def test_compose_runs_a_recipe_that_is_there(tmp_path: Path) -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"]["shardwise"]
    assert RELEASE is not None
    assert service["image"] == f"shardwise:{RELEASE[1]}"
    assert (
        DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]
    ).resolve() == DEPLOY / "Dockerfile"
    command, recipe, *flags = service["command"]
    assert (command, flags[:2]) == ("up", ["--foreground", "--model"])
    assert recipe == "/recipes/${RECIPE:-container}.yaml"
    text = (DEPLOY / "recipes" / "container.yaml").read_text()
    wanted = read(tmp_path, text, model="/models/x")
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(
        wanted.arguments(device=None, key_file=wanted.key_file, address=None, batch_dir=None)
    )
    assert (args.host, args.port) == ("0.0.0.0", 8000)
    assert service["ports"] == ["${BIND:-127.0.0.1}:${PORT:-8000}:8000"]
    assert str(args.api_key_file) == "/run/secrets/" + service["secrets"][0]
    assert set(service["secrets"]) == set(compose["secrets"])
    named = {volume.split(":")[0] for volume in service["volumes"]}
    assert set(compose["volumes"]) <= named
    assert int(service["stop_grace_period"].rstrip("s")) > wanted.drain_s


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode,
    reason="docker compose is not here",
)
def test_docker_reads_the_compose_file() -> None:
    environment = {**os.environ, "MODEL": "/models/x"}
    command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- systemd and Slurm --------------------------------------------------------------------------------------


def unit() -> str:
    return (DEPLOY / "systemd" / "shardwise@.service").read_text()


def test_the_unit_waits_for_the_drain_and_leaves_mistakes_alone() -> None:
    told = dict(
        line.split("=", 1) for line in unit().splitlines() if "=" in line and not line.startswith("#")
    )
    assert int(told["TimeoutStopSec"]) > DRAIN_S
    assert (
        told["RestartPreventExitStatus"] == "2 3"
    )  # README.md: a mistake in what was asked, no feasible plan
    assert told["ExecStart"].split()[1:] == ["up", "/etc/shardwise/%i.yaml", "--foreground"]
    assert "XDG_STATE_HOME=/var/lib " in told["Environment"]
    assert told["StateDirectory"] == "shardwise"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_knows_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "shardwise@.service"
    path.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit(), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


STUBS = {
    "srun": 'echo "srun $*" >> "$CALLS"; until [ "$1" = ray ] || [ "$1" = shardwise ]; do shift; done; "$@"',
    "scontrol": "printf 'a1\\na2\\n'",
    "getent": "echo '10.0.0.1 STREAM a1'",
    "ray": 'case "$1 $2" in "list nodes") printf \'"node_id"\\n"node_id"\\n\';; '
    '*) echo "ray $* auth=$RAY_AUTH_MODE token=${#RAY_AUTH_TOKEN}" >> "$CALLS";; esac',
    "shardwise": 'echo "shardwise $*" >> "$CALLS"',
}


@pytest.mark.parametrize(("nodes", "calls"), [(1, 2), (2, 6)])
def test_the_slurm_script_brings_up_what_the_job_has(nodes: int, calls: int, tmp_path: Path) -> None:
    for name, body in STUBS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    log = tmp_path / "calls"
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "VENV": str(tmp_path),
        "CALLS": str(log),
        "RECIPE": "/shared/llama.yaml",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NODELIST": "a[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    script = DEPLOY / "slurm" / "serve.sbatch"
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    told, serves = log.read_text().splitlines(), "shardwise up /shared/llama.yaml --foreground"
    if nodes == 1:
        assert told == [f"srun --ntasks=1 {serves}", serves]
    else:
        assert "shardwise up /shared/llama.yaml --address 10.0.0.1:22345" in told
        assert told[-1] == "shardwise down --all"
        started = [line for line in told if line.startswith("ray start")]
        assert len(started) == 2
        assert all(line.endswith("auth=token token=64") for line in started)
        assert (
            "srun --nodes=1 --ntasks=1 --exclude=a1 ray start --address=10.0.0.1:22345 --block --num-gpus=8"
            in told
        )
    assert len(told) == calls
    missing = {name: value for name, value in environment.items() if name != "RECIPE"}
    done = subprocess.run(["bash", str(script)], env=missing, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "the recipe to bring up" in done.stderr
