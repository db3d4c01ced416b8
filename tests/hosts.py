"""What tests see of this host: workers that are gone, and a second Ray node on it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from cluster.gang import Gang

PATIENCE_S = 60.0
ROOT = Path(__file__).parents[1]  # where `python -m launch` and `tests` are found


def gone(gang: Gang) -> bool:
    """Whether all its processes have ended; one that nobody has reaped yet counts as ended."""
    return not any(os.path.exists(f"/proc/{member.pid}/exe") for member in gang.members)


def head_address() -> str:
    return ray.get_runtime_context().gcs_address


@contextmanager
def second_node(cpu_devices: int) -> Iterator[None]:
    """Another raylet in the Ray cluster that this process is in: a node of its own, as far as Ray can tell."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", head_address(), "--block"]
    command += ["--num-cpus", str(cpu_devices), "--num-gpus", "0", "--object-store-memory", str(80 * 2**20)]
    raylet = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while sum(node["Alive"] for node in ray.nodes()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield
    finally:
        raylet.terminate()
        raylet.wait(PATIENCE_S)
