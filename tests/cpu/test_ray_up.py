"""A deployment in a real Ray cluster with a token: up, two at once, batches through Ray's client, deaths, down.

The cluster is one node on this host, of ray start; what is asked of it is asked by commands, as users do.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.loopback import free_port
from launch.batch_client import BatchClient
from tests.hosts import ROOT
from tests.tiny import make_model

pytestmark = pytest.mark.slow
PATIENCE_S = 120.0
CPUS = 3
LINES = 300


@dataclass(frozen=True)
class Head:
    gcs: str
    client: str
    dashboard: str
    environment: dict[str, str]
    pid: int

    def run(self, *argv: str, token: str | None = None, expect: int = 0) -> subprocess.CompletedProcess[str]:
        environment = self.environment if token is None else {**self.environment, "RAY_AUTH_TOKEN": token}
        done = subprocess.run(
            [sys.executable, "-m", "launch", *argv],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == expect, done.stderr
        return done

    def batch(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("batch", *argv, "--address", self.client, "--dashboard", self.dashboard, **options)

    def processes(self, word: str) -> list[psutil.Process]:
        """Of the cluster, whose command line has this word in it."""
        found = psutil.Process(self.pid).children(recursive=True)
        return [process for process in found if word in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    gcs, client, dashboard = (free_port() for _ in range(3))
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as scratch:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_STATE_HOME": f"{scratch}/state",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [
            "--node-ip-address",
            "127.0.0.1",
            "--port",
            str(gcs),
            "--ray-client-server-port",
            str(client),
        ]
        command += ["--dashboard-port", str(dashboard), "--num-cpus", str(CPUS), "--num-gpus", "0"]
        command += ["--temp-dir", scratch, "--object-store-memory", str(80 * 2**20)]
        with open(f"{scratch}/out", "wb") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            url = f"http://127.0.0.1:{dashboard}"
            wait_for(lambda: answers(url, environment["RAY_AUTH_TOKEN"]))
            yield Head(f"127.0.0.1:{gcs}", f"ray://127.0.0.1:{client}", url, environment, process.pid)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def answers(dashboard: str, token: str) -> bool:
    try:
        return "ray_version" in BatchClient(dashboard, token).get("/api/version", timeout_s=1)
    except Exception:
        return False


def wait_for(right: Any) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not right():
        assert time.monotonic() < end_s
        time.sleep(0.1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, head: Head) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_model(directory, "llama", max_position_embeddings=8192)
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"model: {{name: {directory}, max_model_len: 512}}\n"
        f"serve: {{layout: tp1, port: 0, address: '{head.gcs}', max_num_seqs: 8}}\n"
    )
    return path


def lines_file(path: Path, count: int, tokens: int) -> Path:
    with path.open("w") as file:
        for i in range(count):
            body = {"prompt": [1 + i % 50, 2, 3], "max_tokens": tokens, "ignore_eos": True}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def test_the_life_of_a_deployment(head: Head, recipe: Path, tmp_path: Path) -> None:
    url = head.run("up", str(recipe)).stdout.strip()
    assert url.startswith("http://127.0.0.1:")
    again = head.run("up", str(recipe))
    assert again.stdout.strip() == url
    assert "tiny is up already: ready" in again.stderr

    # Another beside it, whose layout is the planner's for what is free.
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("layout: tp1, ", ""))
    head.run("up", str(other))
    [tiny, second] = sorted(status(head), key=lambda told: told["name"], reverse=True)
    assert (tiny["name"], tiny["state"], tiny["url"], tiny["live"]["layout"]) == ("tiny", "ready", url, "tp1")
    assert (second["name"], second["state"], second["live"]["replicas_alive"]) == ("other", "ready", [True])
    assert "serving" in head.run("logs", "other").stdout
    head.run("down", "other")
    assert [told["name"] for told in status(head)] == ["tiny"]

    # A batch by Ray's client, its coordinator killed amid it.
    source = lines_file(tmp_path / "in.jsonl", LINES, 16)
    job = head.batch("submit", str(source), "--name", "tiny").stdout.strip()
    server = BatchClient(url, None)
    wait_for(lambda: server.get(f"/v1/batches/{job}")["request_counts"]["completed"] > 20)
    before = server.get(f"/v1/batches/{job}")["request_counts"]["completed"]
    assert before < LINES, "it was done before it was killed"
    [kept] = head.processes("launch.bound")
    parent = kept.parent()
    assert parent is not None
    os.kill(parent.pid, signal.SIGKILL)
    done = head.batch("wait", job, "--json")
    assert json.loads(done.stdout)["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    head.batch("results", job, "-o", str(tmp_path / "out.jsonl"))
    told = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert Counter(told) == Counter(f"r{i}" for i in range(LINES))
    assert [one["url"] for one in status(head)] == [url], "it is where it was"

    # From Python.
    script = (
        "import sys, json\nfrom launch.client import Client\n"
        f"with Client({head.client!r}, dashboard={head.dashboard!r}) as client:\n"
        "    job = client.submit([{'prompt_token_ids': [1, 2], 'ignore_eos': True}] * 3, max_tokens=4)\n"
        "    print(client.wait(job)['status'], len(list(client.list())))\n"
        "    print(json.dumps([r['custom_id'] for r in client.results(job)]))\n"
    )
    command = [sys.executable, "-c", script]
    ran = subprocess.run(
        command, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ran.returncode == 0, ran.stderr
    ended, ids = ran.stdout.splitlines()
    assert ended == "completed 2"
    assert sorted(json.loads(ids)) == ["row-1", "row-2", "row-3"]

    head.run("down", "tiny")
    assert status(head) == []
    wait_for(lambda: not head.processes("launch.bound") and not head.processes("ray::Host"))


def status(head: Head) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(head.run("status", "--json", "--address", head.gcs).stdout)[
        "deployments"
    ]
    return found


def test_what_does_not_let_us_in_is_told_within_two_seconds(head: Head) -> None:
    for token, says in (
        ("wrong" * 8, "refuses the token in RAY_AUTH_TOKEN"),
        ("", "wants a token, and none is here"),
    ):
        begun_s = time.monotonic()
        done = head.batch("list", token=token, expect=2)
        assert time.monotonic() - begun_s < 2
        assert done.stderr.count("\n") == 1
        assert says in done.stderr


def test_ray_job_submit_runs_a_batch(head: Head, recipe: Path, tmp_path: Path) -> None:
    model = recipe.read_text().split("name: ")[1].split(",")[0]
    source, output = lines_file(tmp_path / "in.jsonl", 8, 4), tmp_path / "out.jsonl"
    entry = [sys.executable, "-m", "launch", "batch", "run", model, str(source), "-o", str(output)]
    entry += ["--device", "cpu", "--layout", "tp1", "--address", "auto", "--max-model-len", "512"]
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "job",
        "submit",
        "--address",
        head.dashboard,
        "--",
        *entry,
    ]
    done = subprocess.run(
        command, cwd="/", env=head.environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line)["custom_id"] for line in output.read_text().splitlines()]
    assert sorted(told) == sorted(f"r{i}" for i in range(8))


def test_ray_serve_tells_rayservice_that_it_is_well(head: Head, recipe: Path) -> None:
    """As KubeRay's operator deploys it: by the dashboard's API."""
    pytest.importorskip("grpc_reflection", reason='pip install "ray[serve]"')
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "shardwise",
                "import_path": "launch.ray_serve:app",
                "route_prefix": "/",
                "args": {"recipe": str(recipe), "name": "kept"},
            }
        ],
    }
    asked = urllib.request.Request(
        f"{head.dashboard}/api/serve/applications/", json.dumps(config).encode(), method="PUT"
    )
    asked.add_header("content-type", "application/json")
    asked.add_header("authorization", f"Bearer {head.environment['RAY_AUTH_TOKEN']}")
    urllib.request.urlopen(asked, timeout=PATIENCE_S).close()
    dashboard = BatchClient(head.dashboard, head.environment["RAY_AUTH_TOKEN"])

    def state() -> str:
        return str(dashboard.get("/api/serve/applications/")["applications"]["shardwise"]["status"])

    wait_for(lambda: state() in ("RUNNING", "DEPLOY_FAILED"))
    assert state() == "RUNNING"
    told = BatchClient(f"http://127.0.0.1:{port}", None).get("/")
    assert (told["name"], told["state"]) == ("kept", "ready")
    assert BatchClient(told["url"], None).get("/v1/models")["object"] == "list"
    head.run("down", "kept", "--address", head.gcs)
