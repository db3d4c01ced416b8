"""Ray: reserve devices, host one object on each, see who dies, leave nothing behind.

Which modules import ray, and no others, stands in pyproject.toml.

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
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.worker
import ray.exceptions
import ray.util

from cluster import reservation
from cluster.errors import GangDied, PlacementFailed
from cluster.gang import (
    Call,
    Fate,
    Member,
    failed,
    last_words,
    obituary,
    read_last_words,
    results,
)
from cluster.hosts import GANG, Facts, KeptName, actor_environment
from cluster.life import Life, machine
from cluster.ray_server import NAMESPACE, PrivateRay, join

_KILL_S = 5.0
_ADOPT_S = 10.0
_PLACE_S = 60.0  # what is free is placed in a second
_RENEWALS = 6  # of a lease
_RESOURCE = {"cpu": "CPU", "cuda": "GPU"}


@dataclass(frozen=True, slots=True)
class Kept:
    """Gangs outlive their owner by a lease, so that its successor finds them again by name."""

    name: str
    lease_s: float = 90.0  # longer than a successor needs to ask for them


class Cluster:
    """A Ray cluster, ours or somebody's. One at a time in a process; open it in the main thread."""

    def __init__(self, own: PrivateRay | None, keeping: Kept | None = None) -> None:
        """`own`: what was started for it; None where it is somebody's."""
        self._own, self._keeping = own, keeping
        self._gangs: list[RayGang] = []
        self._terms = ""  # on which a successor may have them
        self._closed = threading.Event()
        self._renewing: threading.Thread | None = None

    @classmethod
    def embedded(cls, num_cpu_devices: int, num_gpus: int | None = None) -> Cluster:
        """Start a private cluster on this host, gone when this process is. Takes about 4 s.

        A CPU device is a slot for one rank, not a core. num_gpus: None for those that are here.
        """
        return cls(PrivateRay(num_cpu_devices, num_gpus))

    @classmethod
    def connect(cls, address: str, keeping: Kept | None = None) -> Cluster:
        """Join a cluster that runs: "HOST:PORT" of its head, or "auto" on one of its nodes.

        Raises PlacementFailed, in seconds, when there is none or it does not let us in.
        """
        join(address)
        return cls(None, keeping)

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
        others hold them, after `timeout_s` when workers do not start: what they import may lie on a slow disk.

        All start side by side, and this thread alone waits: Ray ends a process that calls it in another thread
        while this one, interrupted, shuts it down.
        """
        deadline = time.monotonic() + timeout_s
        resource = _RESOURCE[device]
        reservation.check_free(sum(sizes), resource)
        with ExitStack() as undo:
            kept = [None if self._keeping is None else KeptName.new(self._keeping.name) for _ in sizes]
            groups = [
                reservation.reserve(worker_class.__name__, size, resource, undo, name)
                for size, name in zip(sizes, kept, strict=True)
            ]
            placed_by = min(deadline, time.monotonic() + _PLACE_S)
            if not all(group.wait(reservation.left(placed_by)) for group in groups):
                raise reservation.refused(sum(sizes), resource)
            environment = actor_environment(device, threads)
            actors = [
                reservation.spawn(*of, resource, environment) for of in zip(groups, kept, sizes, strict=True)
            ]
            facts = [_introduce(gang, deadline, timeout_s) for gang in actors]
            gangs = [RayGang(group, *known) for group, known in zip(groups, facts, strict=True)]
            for gang in gangs:
                undo.callback(gang.kill)
            _host(gangs, worker_class, deadline, timeout_s)
            if self._keeping is not None:
                for gang, name in zip(gangs, kept, strict=True):
                    results(
                        gang.lease(str(name), self._terms, self._keeping.lease_s), reservation.left(deadline)
                    )
            undo.pop_all()
        self._own_now(gangs)
        return gangs

    def left(self, terms: str) -> list[RayGang]:
        """Whole gangs that the last owner of our name left, on the same terms; what else it left is ended.

        Gangs acquired from now on are left on these terms.
        """
        self._terms = terms
        if self._keeping is None:
            return []
        found = []
        for name, actors in _kept_actors(self._keeping.name).items():
            if (gang := _adopted(name, actors, terms)) is None:
                with contextlib.suppress(ValueError):  # it has gone by itself
                    ray.util.remove_placement_group(ray.util.get_placement_group(name))
            else:
                found.append(gang)
        self._own_now(found)
        return found

    def _own_now(self, gangs: Sequence[RayGang]) -> None:
        self._gangs = [gang for gang in self._gangs if not gang.has_ended] + list(gangs)
        if self._keeping is not None and self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, args=(self._keeping.lease_s,), daemon=True)
            self._renewing.start()

    def _renew(self, lease_s: float) -> None:
        while not self._closed.wait(lease_s / _RENEWALS):
            for gang in self._gangs:
                if not gang.has_ended:
                    gang.renew()

    def count(self, device: str) -> int:
        """Devices of all nodes, free or not."""
        return int(ray.cluster_resources().get(_RESOURCE[device], 0))

    def free(self, device: str) -> int:
        """Those that nobody holds."""
        return int(ray.available_resources().get(_RESOURCE[device], 0))

    def close(self) -> None:
        """Kill our gangs; end the cluster if it is ours. Returns when nothing is left; can be repeated."""
        self._closed.set()
        if self._renewing is not None:
            self._renewing.join()  # no thread may be at Ray when it is left
        for gang in self._gangs:
            gang.kill()
        if self._own is None:
            ray.shutdown()
        else:
            self._own.close()


class RayGang:
    """Actors in one placement group: cluster.gang.Gang on Ray."""

    def __init__(self, group: Any, actors: Sequence[Any], facts: Sequence[Facts]) -> None:
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

    def lease(self, name: str, terms: str, lease_s: float) -> list[Call]:
        """From now on it outlives us, by so long."""
        told = name, len(self._actors), terms, lease_s
        return [self._ask(i, "lease", "lease", *told) for i in range(len(self._actors))]

    def renew(self) -> None:
        with contextlib.suppress(Exception):  # who is dead is told of by `wait`
            for actor in self._actors:
                actor.renew.remote()

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


# -- outliving the owner --


def _kept_actors(owner: str) -> dict[str, list[Any]]:
    """By gang, those that live."""
    found: dict[str, list[Any]] = {}
    for name in ray.util.list_named_actors():
        gang, _, _ = name.rpartition(":")
        if gang.rpartition(":")[0] == f"{GANG}{owner}":
            with contextlib.suppress(ValueError):  # it has gone meanwhile
                found.setdefault(gang, []).append(ray.get_actor(name, namespace=NAMESPACE))
    return found


def _adopted(name: str, actors: Sequence[Any], terms: str) -> RayGang | None:
    """None where a member is missing or does not answer, or the terms were others."""
    try:
        leases = ray.get([actor.adopt.remote() for actor in actors], timeout=_ADOPT_S)
        if any(lease is None or (lease.size, lease.terms) != (len(actors), terms) for lease in leases):
            return None
        ordered, facts = _introduce(actors, time.monotonic() + _ADOPT_S, _ADOPT_S)
        return RayGang(ray.util.get_placement_group(name), ordered, facts)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError, PlacementFailed, GangDied, ValueError):
        return None


def _introduce(actors: Sequence[Any], deadline: float, timeout_s: float) -> tuple[list[Any], list[Facts]]:
    """Wait until every actor runs; actors and what they say of themselves, node by node."""
    try:
        facts = ray.get([actor.introduce.remote() for actor in actors], timeout=reservation.left(deadline))
    except ray.exceptions.GetTimeoutError:
        raise PlacementFailed(
            f"{len(actors)} workers were placed, and not all of their processes started in {timeout_s:g} s, the most "
            "that is waited; look at the load of their nodes, or use fewer devices"
        ) from None
    except ray.exceptions.RayError as error:
        raise GangDied(f"an actor died while it started: {_how(error)}") from None
    order = sorted(range(len(actors)), key=lambda i: (facts[i].node_id, facts[i].device, facts[i].pid))
    return [actors[i] for i in order], [facts[i] for i in order]


def _host(gangs: Sequence[RayGang], worker_class: type, deadline: float, timeout_s: float) -> None:
    """Makes the hosted objects, for which every process imports all that they are made of."""
    calls = [call for gang in gangs for call in gang.host(worker_class)]
    try:
        results(calls, reservation.left(deadline))
    except GangDied:
        late = sum(not call.wait(0) for call in calls)
        if not late or time.monotonic() < deadline:
            raise
        module = worker_class.__module__
        raise PlacementFailed(
            f"{late} of {len(calls)} workers did not import {module} in {timeout_s:g} s, the most that is waited; look "
            f"at the load and disk of their nodes: `python -X importtime -c 'import {module}'` tells what takes long"
        ) from None


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
