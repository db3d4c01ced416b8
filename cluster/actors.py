"""Ray: reserve devices, host one object on each, see who dies, leave nothing behind.

With ray_server.py alone in importing ray.

    with Cluster.embedded(num_cpu_devices=2) as cluster:
        (gang,) = cluster.acquire(Worker, [2], "cpu", timeout_s=60)
        gang.call(0, "report").result(timeout_s=10)

An embedded cluster is private: a directory of its own, a random token in memory instead of Ray's file in
the home directory (Ray's ports are open on every interface, and who submits work can run anything), and a
guard (cluster/guard.py) that outlives its owner by as long as cleaning up takes. Of a cluster that we only
connect to, our actors go and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.worker
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import GangDied, PlacementFailed
from cluster.gang import (
    Answer,
    Call,
    Fate,
    Member,
    attempt,
    failed,
    last_words,
    obituary,
    read_last_words,
    results,
)
from cluster.life import Life, machine
from cluster.placement import refusal
from cluster.ray_server import PrivateRay, join

_CALLS_AT_ONCE = 8  # of a worker; one more waits for the actor's death
_RELEASE_S = 3.0  # devices of a gang just killed are free again after some 0.2 s
_LOOK_S = 0.05  # between looks at what is free
_CONNECT_S = 3.0
_KILL_S = 5.0
_RESOURCE = {"cpu": "CPU", "cuda": "GPU"}
_SPINS = "3000"
"""How long threads of a matrix product spin for each other before they sleep. Where another program wants a core,
libgomp's default (for ever, nearly) let a decode step take 800 ms; this, 130; 60 and 64 on idle cores (2, Xeon)."""


class Cluster:
    """A Ray cluster, ours or somebody's. One at a time in a process; open it in the main thread."""

    def __init__(self, own: PrivateRay | None) -> None:
        """`own`: what was started for it; None where it is somebody's."""
        self._own = own
        self._gangs: list[RayGang] = []

    @classmethod
    def embedded(cls, num_cpu_devices: int, num_gpus: int | None = None) -> Cluster:
        """Start a private cluster on this host, gone when this process is. Takes about 4 s.

        A CPU device is a slot for one rank, not a core. num_gpus: None for those that are here.
        """
        return cls(PrivateRay(num_cpu_devices, num_gpus))

    @classmethod
    def connect(cls, address: str) -> Cluster:
        """Join a cluster that runs: "HOST:PORT" of its head, or "auto" on one of its nodes.

        Raises PlacementFailed, in seconds, when there is none or it does not let us in.
        """
        join(address)
        return cls(None)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float, threads: int = 1
    ) -> list[RayGang]:
        """Gangs of these sizes, or none: actors, each on a device of its own, each hosting a `worker_class()`.

        device: "cpu" or "cuda"; threads: OMP_NUM_THREADS of each. Nodes are filled one after the other, and
        members are numbered node by node. Each sees every GPU of its node: peers need that for direct access.
        Raises PlacementFailed (need, have, who holds it) at once when the devices do not exist, in 3 s when
        others hold them, after `timeout_s` when actors do not start.

        All start side by side, and this thread alone waits: Ray ends a process that calls it in another thread
        while this one, interrupted, shuts it down.
        """
        deadline = time.monotonic() + timeout_s
        resource = _RESOURCE[device]
        _check_free(sum(sizes), resource)
        with ExitStack() as undo:
            groups = [_reserve(worker_class.__name__, size, resource, undo) for size in sizes]
            if not all(group.wait(_left(deadline)) for group in groups):
                raise _refusal(sum(sizes), resource)
            environment = _actor_environment(device, threads)
            actors = [_spawn(g, size, resource, environment) for g, size in zip(groups, sizes, strict=True)]
            facts = [_introduce(gang, deadline, timeout_s) for gang in actors]
            gangs = [RayGang(group, *known) for group, known in zip(groups, facts, strict=True)]
            for gang in gangs:
                undo.callback(gang.kill)
            results([call for gang in gangs for call in gang.host(worker_class)], _left(deadline))
            undo.pop_all()
        self._gangs = [gang for gang in self._gangs if not gang.has_ended] + gangs
        return gangs

    def count(self, device: str) -> int:
        """Devices of all nodes, free or not."""
        return int(ray.cluster_resources().get(_RESOURCE[device], 0))

    def free(self, device: str) -> int:
        """Those that nobody holds."""
        return int(ray.available_resources().get(_RESOURCE[device], 0))

    def close(self) -> None:
        """Kill our gangs; end the cluster if it is ours. Returns when nothing is left; can be repeated."""
        for gang in self._gangs:
            gang.kill()
        if self._own is None:
            ray.shutdown()
        else:
            self._own.close()


class RayGang:
    """Actors in one placement group: cluster.gang.Gang on Ray."""

    def __init__(self, group: Any, actors: Sequence[Any], facts: Sequence[_Facts]) -> None:
        self._group = group
        self._actors = actors
        self._members = tuple(
            Member(index, fact.node, fact.node_id, fact.pid, fact.device, fact.log, fact.machine)
            for index, fact in enumerate(facts)
        )
        self._here = [Life(fact.pid) for fact in facts if fact.machine == machine()]
        self._fate = Fate()
        for index, actor in enumerate(actors):
            actor.wait.remote().future().add_done_callback(lambda future, i=index: self._on_end(i, future))

    def host(self, worker_class: type) -> list[Call]:
        """Make the hosted objects: the first calls of all."""
        return [self._ask(i, worker_class.__name__, "start", worker_class) for i in range(len(self._actors))]

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members

    def call(self, index: int, method: str, *args: object) -> Call:
        return self._ask(index, method, "call", method, args)

    def call_all(self, method: str, per_member_args: Sequence[Sequence[object]] | None = None) -> list[Call]:
        given = per_member_args or [()] * len(self._members)
        return [self.call(index, method, *args) for index, args in enumerate(given)]

    @property
    def has_ended(self) -> bool:
        return self._fate.has_ended

    async def died(self) -> GangDied:
        return await self._fate.died()

    def watch(self, on_death: Callable[[GangDied], None]) -> None:
        self._fate.watch(on_death)

    def kill(self) -> None:
        if self._fate.claim():
            self._end(GangDied(f"the gang of {len(self._members)} was stopped"))
        else:  # somebody is at it
            self._fate.wait(2 * _KILL_S)

    def _ask(self, index: int, name: str, what: str, *args: object) -> Call:
        call = Call(self._members[index], name)
        if self._fate.begin(call):
            future = getattr(self._actors[index], what).remote(*args).future()
            future.add_done_callback(lambda future: self._on_answer(call, future))
        return call

    def _on_answer(self, call: Call, future: Any) -> None:
        error = future.exception()
        if not isinstance(error, ray.exceptions.RayActorError):  # else its death is being told by `_on_end`
            self._fate.answer(call, failed(error) if error else future.result())

    def _on_end(self, index: int, future: Any) -> None:
        """An actor's endless call has ended: so has the actor. This is a thread of Ray's: no waiting."""
        if self._fate.claim():
            threading.Thread(target=self._bury, args=(index, future.exception())).start()

    def _bury(self, index: int, error: BaseException) -> None:
        member = self._members[index]
        words = read_last_words(member.log)
        self._end(obituary(member, _how(error), _fetch_last_words(member) if words is None else words))

    def _end(self, death: GangDied) -> None:
        """Members on this host die by our own hand, stopped or not; others with their placement group."""
        for life in self._here:
            life.kill()
        with contextlib.suppress(Exception):  # Ray itself may have gone
            ray.util.remove_placement_group(self._group)
        for life in self._here:
            life.wait(_KILL_S)
        self._fate.end(death)


class Host:
    """What each actor runs: one object, its methods called by name."""

    def introduce(self) -> _Facts:
        context = ray.get_runtime_context()
        return _Facts(
            node=ray.util.get_node_ip_address(),
            node_id=context.get_node_id(),
            machine=machine(),
            pid=os.getpid(),
            device=_local_index(context.get_accelerator_ids().get("GPU", [])),
            log=os.readlink("/proc/self/fd/2"),
        )

    def start(self, worker_class: type) -> Answer:
        made = attempt(worker_class)
        self._worker = made.value
        return Answer(None, made.failure)

    def call(self, method: str, args: Sequence[object]) -> Answer:
        return attempt(lambda: getattr(self._worker, method)(*args))

    def wait(self) -> None:
        """Never returns: that the call fails tells the owner that this process is gone."""
        threading.Event().wait()


@dataclass(frozen=True, slots=True)
class _Facts:
    """What an actor says of where it is."""

    node: str
    node_id: str
    machine: str
    pid: int
    device: int
    log: str


def _local_index(gpus: Sequence[str]) -> int:
    """Ray names a GPU as its node does; the process counts among those that it was left to see."""
    if not gpus:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",").index(gpus[0]) if visible else int(gpus[0])


# -- placing --


def _check_free(count: int, resource: str) -> None:
    """Raises PlacementFailed unless so many devices are free, or get free in 3 s."""
    deadline = time.monotonic() + _RELEASE_S
    while ray.available_resources().get(resource, 0) < count:
        if ray.cluster_resources().get(resource, 0) < count or time.monotonic() > deadline:
            raise _refusal(count, resource)
        time.sleep(_LOOK_S)


def _reserve(name: str, count: int, resource: str, undo: ExitStack) -> Any:
    """A placement group with one device in each of `count` bundles, as soon as it is placed."""
    title = f"{name}-{secrets.token_hex(2)} of process {os.getpid()} on {socket.gethostname()}"  # unique
    group = ray.util.placement_group([{resource: 1}] * count, strategy="PACK", name=title)
    undo.callback(ray.util.remove_placement_group, group)
    return group


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _refusal(count: int, resource: str) -> PlacementFailed:
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes: dict[str, float] = {}
    for node in alive:
        address = node["NodeManagerAddress"]
        nodes[address] = nodes.get(address, 0) + node["Resources"].get(resource, 0)
    return refusal(
        count, resource, nodes, ray.available_resources().get(resource, 0), dict(_holders(resource))
    )


def _holders(resource: str) -> Iterator[tuple[str, float]]:
    """Placement groups, then actors outside of them where a dashboard can list these."""
    for group in ray.util.placement_group_table().values():
        amount = sum(bundle.get(resource, 0) for bundle in group["bundles"].values())
        if group["state"] == "CREATED":
            yield group["name"] or f"placement group {group['placement_group_id']}", amount
    if not ray._private.worker.get_dashboard_url():  # as where it is ours: the groups above still tell most
        return
    with contextlib.suppress(Exception):
        from ray.util.state import list_actors  # takes half a second, and every worker imports this module

        for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=_CONNECT_S):
            if not actor.placement_group_id:
                name = f"actor {actor.name or actor.class_name} of process {actor.pid}"
                yield name, (actor.required_resources or {}).get(resource, 0)


def _spawn(group: Any, count: int, resource: str, environment: Mapping[str, str]) -> list[Any]:
    options = {
        "num_cpus": 1 if resource == "CPU" else 0,
        "num_gpus": 1 if resource == "GPU" else 0,
        "max_restarts": 0,  # a gang lives and dies together
        "max_task_retries": 0,  # a request that kills its worker would kill the next one too
        "max_concurrency": _CALLS_AT_ONCE + 1,
        "runtime_env": {"env_vars": dict(environment)},
    }
    remote = ray.remote(Host)
    return [
        remote.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle), **options
        ).remote()
        for bundle in range(count)
    ]


def _actor_environment(device: str, threads: int) -> dict[str, str]:
    ours = str(Path(__file__).resolve().parents[1])  # these packages, wherever they were imported from
    environment = {"PYTHONPATH": f"{ours}:${{PYTHONPATH}}", "OMP_NUM_THREADS": str(threads)}
    if device == "cpu":  # Ray leaves all GPUs visible to an actor that reserved none
        return environment | {"CUDA_VISIBLE_DEVICES": "", "GOMP_SPINCOUNT": _SPINS}
    return environment | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def _introduce(actors: Sequence[Any], deadline: float, timeout_s: float) -> tuple[list[Any], list[_Facts]]:
    """Wait until every actor runs; actors and what they say of themselves, node by node."""
    try:
        facts = ray.get([actor.introduce.remote() for actor in actors], timeout=_left(deadline))
    except ray.exceptions.GetTimeoutError:
        raise PlacementFailed(
            f"{len(actors)} actors were placed but did not all start within {timeout_s:g} s. "
            "Give it more time, or look at the load of the nodes."
        ) from None
    except ray.exceptions.RayError as error:
        raise GangDied(f"an actor died while it started: {_how(error)}") from None
    order = sorted(range(len(actors)), key=lambda i: (facts[i].node_id, facts[i].device, facts[i].pid))
    return [actors[i] for i in order], [facts[i] for i in order]


# -- dying --


def _how(error: BaseException) -> str:
    """Why an actor died, as far as Ray knows."""
    text = str(error).split("Worker exit detail: ")[-1].split(" Some common causes")[0].strip()
    if "End of file" in text:  # its socket to the raylet closed without a word
        return "killed or crashed (SIGKILL, out of memory, a fault in native code)"
    return text.splitlines()[-1].rstrip(".")


def _fetch_last_words(member: Member) -> str:
    """From another node: the state API reads it where the cluster has a dashboard."""
    with contextlib.suppress(Exception):
        from ray.util.state import get_log

        name = Path(member.log).name
        return last_words("".join(get_log(node_id=member.node_id, filename=name, tail=100, timeout=5)))
    return f"(in {member.log} on {member.node})"
