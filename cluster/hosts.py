"""What runs in each actor: one object, its methods called by name, and a lease that outlives the owner."""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.util

from cluster.gang import Answer, attempt
from cluster.life import machine
from cluster.ray_server import NAMESPACE

GANG = "shardwise-gang:"
_SPINS = "7000"
"""How long threads of a matrix product spin for each other, and for the next product, before they sleep. Where another
program wants a core, libgomp's default (for ever, nearly) let a decode step take 800 ms. Four sequences of SmolLM2 on
two cores (AMD EPYC, 2026-11-23), ms a step, and with one core wanted: 3000 52, 105; 7000 43, 145; 30000 38, 370."""


class Host:
    """What each actor runs: one object, its methods called by name."""

    def __init__(self) -> None:
        self._owner_left = threading.Event()
        self._leased: Lease | None = None

    def introduce(self) -> Facts:
        context = ray.get_runtime_context()
        return Facts(
            node=ray.util.get_node_ip_address(),
            node_id=context.get_node_id(),
            machine=machine(),
            pid=os.getpid(),
            device=local_index(context.get_accelerator_ids().get("GPU", [])),
            log=os.readlink("/proc/self/fd/2"),
        )

    def start(self, worker_class: type) -> Answer:
        made = attempt(worker_class)
        self._worker = made.value
        return Answer(None, made.failure)

    def call(self, method: str, args: Sequence[object]) -> Answer:
        return attempt(lambda: getattr(self._worker, method)(*args))

    def wait(self) -> None:
        """Returns when there is another owner: that the call fails tells it that this process is gone."""
        self._owner_left.wait()

    def lease(self, *told: Any) -> Answer:
        self._leased = Lease(*told)
        self.renew()
        threading.Thread(target=self._leave_in_time, args=(self._leased.seconds,), daemon=True).start()
        return Answer(None)

    def renew(self) -> None:
        self._renewed_s = time.monotonic()

    def adopt(self) -> Lease | None:
        """By another owner, whom the next `wait` is of."""
        before, self._owner_left = self._owner_left, threading.Event()
        before.set()
        self.renew()
        return self._leased

    def _leave_in_time(self, lease_s: float) -> None:
        """Nobody renews the lease: the gang goes, and gives its devices back."""
        while (left_s := self._renewed_s + lease_s - time.monotonic()) > 0:
            time.sleep(left_s)
        with contextlib.suppress(Exception):  # another member was faster
            ray.util.remove_placement_group(ray.util.get_current_placement_group())
        os._exit(0)


@dataclass(frozen=True, slots=True)
class Lease:
    """What a member remembers of its gang, for who finds it."""

    group: str  # the placement group's name
    size: int
    terms: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Facts:
    """What an actor says of where it is."""

    node: str
    node_id: str
    machine: str
    pid: int
    device: int
    log: str


def local_index(gpus: Sequence[str]) -> int:
    """Ray names a GPU as its node does; the process counts among those that it was left to see."""
    if not gpus:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",").index(gpus[0]) if visible else int(gpus[0])


@dataclass(frozen=True, slots=True)
class KeptName:
    """Of a gang that outlives its owner: `shardwise-gang:NAME:NUMBER`; its members' end with their own number."""

    owner: str
    number: str

    @staticmethod
    def new(owner: str) -> KeptName:
        return KeptName(owner, secrets.token_hex(4))

    def __str__(self) -> str:
        return f"{GANG}{self.owner}:{self.number}"

    def of_member(self, index: int) -> dict[str, Any]:
        return {"name": f"{self}:{index}", "namespace": NAMESPACE, "lifetime": "detached"}


def actor_environment(device: str, threads: int) -> dict[str, str]:
    ours = str(Path(__file__).resolve().parents[1])  # these packages, wherever they were imported from
    environment = {"PYTHONPATH": f"{ours}:${{PYTHONPATH}}", "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":  # Ray leaves all GPUs visible to an actor that reserved none
        return environment | {"CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": _SPINS}
    return environment | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
