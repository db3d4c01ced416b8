"""`shardwise claims --measure` with the engine at work."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launch import claim_measure, claim_runs
from launch.claim_measure import measure
from launch.claim_runs import Load, Runs
from launch.progress import Progress
from strategies.spec import Workload
from tests.serving import Processes


@contextmanager
def processes(*_: object) -> Iterator[Processes]:
    yield Processes()


@pytest.mark.slow
def test_batches_by_each_rule_are_run_by_the_engine(monkeypatch):
    runs = {"cpu": Runs(Workload(8, 4), Load(20, 4, (1, 6)))}
    monkeypatch.setattr(claim_measure, "RUNS", runs)
    monkeypatch.setattr(claim_runs, "TURNS", 1)
    monkeypatch.setattr(claim_measure, "with_what_is_left", lambda one: one)
    found = measure(["graphs", "adaptive"], "cpu", Progress(quiet=True), processes)
    graphs, batches = found.rows
    assert graphs.verdict == "not measured" and "a CPU has no CUDA graphs" in graphs.why
    assert "20 waiting requests of 4 + 1 to 6 tokens: the rule" in batches.measured
    assert "batches of 4" in batches.measured and "continuous batching" in batches.measured
    assert batches.verdict != "not measured" and found.versions["torch"]


@pytest.mark.slow
def test_all_of_it_on_a_cpu():
    ran = subprocess.run(
        [sys.executable, "-m", "launch", "claims", "--measure", "--device", "cpu", "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(ran.stdout)["measured"]["rows"]
    told = {row["claim"].partition(":")[0]: row["verdict"] for row in rows}
    assert told["CUDA graphs"] == told["pinned memory"] == "not measured"
    assert "not measured" not in {told["pruning 30 %"], told["INT8"], rows[-1]["verdict"]}
    assert "products with pruned weights" in ran.stderr
