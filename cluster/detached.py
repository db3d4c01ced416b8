"""Named actors that outlive who started them: a detached coordinator, found again by name, from a node or by ray://.

All live in one namespace, as `shardwise:NAME`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.util
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import errors
from cluster.errors import GangDied, PlacementFailed, WorkerFailed
from cluster.ray_server import NAMESPACE, join, leave

CLIENT = "ray://"
_PREFIX = "shardwise:"
_CALLS_AT_ONCE = 32
_HEAD = "node:__internal_head__"  # a resource that Ray gives to the head alone
_LOOK_S = 0.1
_CLIENT_ATTEMPTS = 3
_SLOW_START = (
    "Starting Ray client server failed"  # a head that has much to do starts a client's process too late
)


def _host() -> type:
    """What the actor runs. Answers are of Python's own types: who asks may be of another version.

    A class of a function's own, since Ray then carries it by value: its client's server on the head looks the class up,
    and may not have this package on its path.
    """

    class Host:
        def __init__(self, hosted: type, args: tuple[object, ...]) -> None:
            self._hosted = hosted(*args)

        def call(self, method: str, args: tuple[object, ...]) -> tuple[Any, str, str]:
            """→ what it returned, or the name and message of what it raised."""
            try:
                return getattr(self._hosted, method)(*args), "", ""
            except Exception as error:  # of any kind: it is the caller's to judge
                return None, type(error).__name__, str(error)

    return Host


class Detached:
    """The actor's handle."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name, self._actor = name, actor

    def call(self, method: str, *args: object, timeout_s: float) -> Any:
        """Raises GangDied where it is gone or silent, what it raised of ours, or WorkerFailed."""
        try:
            value, kind, message = ray.get(self._actor.call.remote(method, args), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise GangDied(f"{self.name} did not answer {method}() in {timeout_s:g} s") from None
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise GangDied(f"{self.name} is gone: {str(error).strip().splitlines()[0]}") from None
        if not kind:
            return value
        ours = getattr(errors, kind, None)
        if isinstance(ours, type) and issubclass(ours, errors.UserError):
            raise ours(message)
        raise WorkerFailed(f"{self.name} failed in {method}(): {kind}: {message}")

    def kill(self, timeout_s: float) -> None:
        """It and, since it owns them, its actors. Returns once its name is free."""
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._actor, no_restart=True)
        deadline = time.monotonic() + timeout_s
        while self.name in names() and time.monotonic() < deadline:
            time.sleep(_LOOK_S)


@contextmanager
def joined(address: str) -> Iterator[None]:
    """In the cluster at HOST:PORT, "auto", or through the client at ray://HOST:PORT. Raises PlacementFailed."""
    if address.startswith(CLIENT):
        logging.getLogger("ray.util.client").setLevel(logging.ERROR)
        _join_as_client(address)
    else:
        join(address)
    try:
        yield
    finally:
        leave()


def start(
    name: str, hosted: type, args: tuple[object, ...], *, may_move: bool, told: Mapping[str, str]
) -> Detached:
    """On the head, where it stays unless it `may_move`. It is started again there when it dies.

    `told` is in its environment, which the cluster's dashboard tells who may not have connected yet.
    """
    head = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"])
    ours = str(Path(__file__).resolve().parents[1])  # these packages, wherever they were imported from
    options: Mapping[str, Any] = {
        "name": f"{_PREFIX}{name}",
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": _CALLS_AT_ONCE,
        "runtime_env": {"env_vars": {"PYTHONPATH": f"{ours}:${{PYTHONPATH}}", **told}},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(head, soft=may_move),
    }
    try:
        return Detached(name, ray.remote(_host()).options(**options).remote(hosted, args))
    except ValueError as error:
        raise PlacementFailed(f"{name} is up already: {error}. shardwise down {name} ends it") from None


def names() -> list[str]:
    """Of all that are up, in order."""
    found = ray.util.list_named_actors()
    return sorted(name.removeprefix(_PREFIX) for name in found if name.startswith(_PREFIX))


def find(name: str) -> Detached | None:
    try:
        return Detached(name, ray.get_actor(f"{_PREFIX}{name}", namespace=NAMESPACE))
    except ValueError:
        return None


def has_gpus() -> bool:
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def gcs_address() -> str:
    """HOST:PORT that drivers on its nodes join by."""
    return str(ray.get_runtime_context().gcs_address)


def _join_as_client(address: str) -> None:
    for attempt in range(1, _CLIENT_ATTEMPTS + 1):
        try:
            ray.init(address, namespace=NAMESPACE, logging_level=logging.ERROR, configure_logging=False)
            return
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            ray.shutdown()
            reason = " ".join(str(error).split())
            if _SLOW_START in reason and attempt < _CLIENT_ATTEMPTS:
                continue
            raise PlacementFailed(f"no Ray cluster to join at {address}: {reason}") from None
