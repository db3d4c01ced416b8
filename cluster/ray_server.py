"""Ray itself: a private one started and ended, or one of somebody's joined. What runs on it is actors.py's."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import ray
import ray._private.services
import ray._private.utils
import ray._private.worker
import ray.exceptions
from ray._private.node import Node

from cluster.errors import PlacementFailed
from cluster.guard import Guard

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB; tensors never travel through it
_CONNECT_S = 3.0
_LONGEST_TEMP = 24  # characters: Ray's socket paths below it must stay under 108 (sun_path, man 7 unix)
_TOKEN = secrets.token_hex(32)


class PrivateRay:
    """A Ray of this process's own, in a directory of its own, gone when the process is."""

    def __init__(self, num_cpus: int, num_gpus: int | None) -> None:
        """num_gpus: None for those that are here. Takes some 4 s."""
        directory = _private_directory()
        self._guard = Guard(directory)  # first, so that a kill during the start leaves nothing either
        self._restore = _set_environment(_EMBEDDED_ENVIRONMENT)
        try:
            with _only_what_places_actors(), _in_groups_of_their_own():
                _init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=directory,
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Returns when nothing of it is left."""
        ray.shutdown()
        self._guard.finish()
        _set_environment(self._restore)


def join(address: str) -> None:
    """Connect this process to a cluster that runs: "HOST:PORT" of its head, or "auto" on one of its nodes.

    Raises PlacementFailed, in seconds, when there is none or it does not let us in.
    """
    if address.startswith("ray://"):
        raise PlacementFailed(
            f"{address}: Ray's client protocol carries no streams. Run this on a node of the cluster "
            "and give the head's address as HOST:PORT, or auto."
        )
    if address != "auto":
        _knock(address)
    try:
        _init(address=address)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        reason = str(error).strip().splitlines()[0]
        raise PlacementFailed(f"no Ray cluster to join at {address}: {reason}") from None


def leave() -> None:
    """Of a cluster that `join` joined."""
    ray.shutdown()


NAMESPACE = "shardwise"
_QUIET: dict[str, Any] = {
    "namespace": NAMESPACE,
    "log_to_driver": False,
    "configure_logging": False,
    "logging_level": logging.ERROR,
}

_EMBEDDED_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": _TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "600",  # Ray's own import, from a slow disk: its default is 60
    "RAY_prestart_worker_first_driver": "0",  # idle workers, one a slot, that no actor of ours could use:
    "RAY_enable_worker_prestart": "0",  # ours want an environment of their own
}


def _set_environment(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set (or, for None, unset) what Ray's servers inherit and its client reads; returns what was there.

    Ray reads these once, when it is first imported; this makes it read them again, as ray.init does for its
    defaults.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    return before


def _init(**settings: Any) -> None:
    """ray.init that leaves the process its SIGTERM handler all the while, and its standard output to results.

    Ray sets handlers that exit with codes 1 and 15, and prints the news of every dead worker. We raise it.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with patch.object(ray._private.utils, "set_sigterm_handler", lambda handler: None):
            ray.init(**settings, **_QUIET)
    finally:  # also from a Ray that sets it in another way
        signal.signal(signal.SIGTERM, on_sigterm)
    ray._private.worker._worker_logs_enabled = False


@contextmanager
def _only_what_places_actors() -> Iterator[None]:
    """Has Ray start no server for a dashboard, no autoscaler and no reader of logs, and a small agent.

    ray.init waits for the first and the last of these though include_dashboard is False: 7.1 s of a start where
    4.4 do, and 1.6 s of an end where 0.5 do (2 cores of a Xeon, Ray 2.60). Ray has no setting for it.
    """
    with ExitStack() as changed:
        for name in ("start_api_server", "start_monitor", "start_log_monitor"):
            if hasattr(Node, name):  # else this Ray starts other things, and all of them
                changed.enter_context(patch.object(Node, name, lambda node, **_: None))
        if hasattr(ray._private.utils, "get_dashboard_dependency_error"):
            missing = ImportError("nobody asked for a dashboard")
            changed.enter_context(
                patch.object(ray._private.utils, "get_dashboard_dependency_error", lambda: missing)
            )
        yield


@contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Has Ray start its servers outside our process group, so that a signal to all of it ends Ray by us alone.

    `timeout`, and a shell that hangs up, send SIGTERM or SIGHUP to the group: Ray's GCS was gone before we had
    left it, which ray.shutdown then waits for 60 s, and ends the process by. The guard ends them if we cannot.
    """
    popen = ray._private.services.ConsolePopen
    with patch.object(ray._private.services, "ConsolePopen", partial(popen, process_group=0)):
        yield


def _private_directory() -> str:
    """Short, since Ray puts sockets deep below it, and ours alone (mode 0700)."""
    system = tempfile.gettempdir()
    return tempfile.mkdtemp(
        prefix=f"sw-{os.getpid()}-", dir=system if len(system) <= _LONGEST_TEMP else "/tmp"
    )


def _knock(address: str) -> None:
    """Is there anybody? Ray itself would try for half a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise PlacementFailed(
            f"no Ray cluster answers at {address}: {error}. Give HOST:PORT of its head, as ray start says."
        ) from None
