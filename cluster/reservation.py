"""Ray: devices that are free, reserved in placement groups, with an actor on each; or why they cannot be had."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import ray
import ray._private.worker
import ray.util
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import PlacementFailed
from cluster.hosts import Host, KeptName
from cluster.placement import refusal

_CALLS_AT_ONCE = 8  # of a worker; one more waits for the actor's death
_RELEASE_S = 3.0  # devices of a gang just killed are free again after some 0.2 s
_LOOK_S = 0.05  # between looks at what is free
_CONNECT_S = 3.0


def check_free(count: int, resource: str) -> None:
    """Raises PlacementFailed unless so many devices are free, or get free in 3 s."""
    deadline = time.monotonic() + _RELEASE_S
    while ray.available_resources().get(resource, 0) < count:
        if ray.cluster_resources().get(resource, 0) < count or time.monotonic() > deadline:
            raise refused(count, resource)
        time.sleep(_LOOK_S)


def reserve(name: str, count: int, resource: str, undo: ExitStack, kept: KeptName | None) -> Any:
    """A placement group with one device in each of `count` bundles, as soon as it is placed."""
    title = f"{name}-{secrets.token_hex(2)} of process {os.getpid()} on {socket.gethostname()}"  # unique
    lifetime = None if kept is None else "detached"
    group = ray.util.placement_group(
        [{resource: 1}] * count, strategy="PACK", name=str(kept or title), lifetime=lifetime
    )
    undo.callback(ray.util.remove_placement_group, group)
    return group


def left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def refused(count: int, resource: str) -> PlacementFailed:
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


def spawn(
    group: Any, kept: KeptName | None, count: int, resource: str, environment: Mapping[str, str]
) -> list[Any]:
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
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
            **options,
            **({} if kept is None else kept.of_member(bundle)),
        ).remote()
        for bundle in range(count)
    ]
