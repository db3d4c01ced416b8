"""What `up` brought up: on this machine, kept by a process; or in a Ray cluster, kept by a detached actor.

A directory each under $XDG_STATE_HOME/shardwise/up tells of both kinds, so that `down NAME` needs no address.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import UserError
from cluster.files import read_back, write_whole
from cluster.life import Life
from launch.batch_client import BatchClient, ServerGone
from launch.keeper import ORDER, OVER, SHARDWISE, STATE, State, started
from launch.keeper_log import Cursor, read_log
from launch.live import Live, live_of, told_by
from launch.state import state_directory, up_directory
from launch.version import our_version

if TYPE_CHECKING:
    from cluster.detached import Detached

DEAD = "dead"  # its keeper was killed, or the machine was started again
UNREADABLE = "running, but what it wrote of itself is lost"
KEEPER = "launch.keeper"
CALL_S = 20.0
_KILL_S = 10.0


class Deployment(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def where(self) -> str:
        """For people."""

    def describe(self) -> dict[str, Any]:
        """launch.keeper.State's fields; "order": what it was brought up with."""

    def live(self) -> Live | None:
        """None where it does not serve now."""

    def log(self, cursor: Cursor | None, last_lines: int) -> tuple[Cursor, bytes]: ...

    def stop(self) -> None:
        """It drains; asked again, it ends. Returns at once."""

    def forget(self) -> None:
        """Whatever is left of it goes, and its name is free."""


@dataclass(frozen=True, slots=True)
class Here:
    """Kept by a process of this machine."""

    name: str
    directory: Path

    @property
    def where(self) -> str:
        return "this machine"

    def describe(self) -> dict[str, Any]:
        order = _read(self.directory / ORDER)
        state = self._state()
        if state["state"] not in OVER and not self._is_kept(state):
            state = {**state, "state": DEAD, "server_pid": None, "url": None}
        return {"name": self.name, "version": our_version(), "order": order.get("told", {}), **state}

    def live(self) -> Live | None:
        told = self.describe()
        if told.get("url") is None:
            return None
        from launch.gateway import here

        try:
            return live_of(told_by(BatchClient(here(told["url"]), self._key(told["order"]))))
        except (ServerGone, UserError):  # its keys have changed, say
            return None

    def log(self, cursor: Cursor | None, last_lines: int) -> tuple[Cursor, bytes]:
        return read_log(self.directory, cursor, last_lines=last_lines)

    def stop(self) -> None:
        state = self.describe()
        if state["state"] not in (*OVER, DEAD):
            with contextlib.suppress(ProcessLookupError):
                os.kill(state["keeper_pid"], signal.SIGTERM)

    def forget(self) -> None:
        state = self._state()
        if self._is_kept(state):
            life = Life(state["keeper_pid"])
            life.kill()  # the server dies with it
            life.wait(_KILL_S)
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self, order: Mapping[str, Any]) -> None:
        """A keeper that outlives this process and its terminal."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (STATE, "log", "log.1"):
            (self.directory / name).unlink(missing_ok=True)
        write_whole(json.dumps({"program": SHARDWISE, **order}).encode(), self.directory / ORDER)
        ours = str(Path(__file__).resolve().parents[1])  # these packages, wherever they were imported from
        path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
        with (self.directory / "keeper.err").open("ab") as errors:
            keeper = subprocess.Popen(
                [sys.executable, "-m", KEEPER, str(self.directory)],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        begun = State(keeper_pid=keeper.pid, keeper_started=started(keeper.pid) or "", since_s=time.time())
        new = self.directory / f"{STATE}.begun"
        new.write_text(json.dumps(asdict(begun)), encoding="utf-8")
        with contextlib.suppress(FileExistsError):  # the keeper was faster
            os.link(new, self.directory / STATE)  # whole, for who reads meanwhile
        new.unlink()

    def _state(self) -> dict[str, Any]:
        """As of one that nobody keeps, where none was written or it is damaged; but a keeper is found all the same."""
        state = {**asdict(State()), **_read(self.directory / STATE)}
        if not state["keeper_pid"] and (pid := keepers().get(self.directory)) is not None:
            since = started(pid) or ""
            state |= {"state": UNREADABLE, "keeper_pid": pid, "keeper_started": since}
        return state

    def _is_kept(self, state: Mapping[str, Any]) -> bool:
        since = started(state["keeper_pid"]) if state["keeper_pid"] else None
        return since is not None and since == state["keeper_started"]

    def _key(self, order: Mapping[str, Any]) -> str | None:
        from launch.keys import own_key

        path = order.get("key_file")
        return own_key(Path(path)) if path else None


@dataclass(frozen=True, slots=True)
class There:
    """Kept by an actor of a Ray cluster that this process has joined."""

    name: str
    address: str
    actor: Detached

    @property
    def where(self) -> str:
        return self.address

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = self.actor.call("describe", timeout_s=CALL_S)
        return found

    def live(self) -> Live | None:
        from cluster.errors import WorkerFailed

        try:
            return live_of(self.actor.call("live", timeout_s=CALL_S))
        except WorkerFailed:  # the server is starting, or has gone
            return None

    def log(self, cursor: Cursor | None, last_lines: int) -> tuple[Cursor, bytes]:
        found: tuple[Cursor, bytes] = self.actor.call("log", cursor, last_lines, timeout_s=CALL_S)
        return found

    def stop(self) -> None:
        self.actor.call("stop", timeout_s=CALL_S)

    def forget(self) -> None:
        self.actor.kill(_KILL_S)
        shutil.rmtree(up_directory(self.name), ignore_errors=True)


# --- all of them --------------------------------------------------------------------------------------------


@contextmanager
def locked() -> Iterator[None]:
    """One `up` at a time: each looks for what is free."""
    root = state_directory() / "up"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def recorded() -> dict[str, str | None]:
    """Names that were brought up from this machine, and the clusters that they are in."""
    root = state_directory() / "up"
    found = {path.parent for path in root.glob(f"*/{ORDER}")}
    found |= {directory for directory in keepers() if directory.parent == root}  # though it was removed
    return {path.name: _read(path / ORDER).get("address") for path in sorted(found)}


def keepers() -> dict[Path, int]:
    """Directory → the process that keeps the deployment, as the kernel tells our own processes' command lines."""
    found: dict[Path, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            argv = (process / "cmdline").read_bytes().split(b"\0")
            if argv[1:3] == [b"-m", KEEPER.encode()] and process.stat().st_uid == os.getuid():
                found[Path(os.fsdecode(argv[3]))] = int(process.name)
    return found


def record_there(name: str, address: str) -> None:
    directory = up_directory(name)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_whole(json.dumps({"address": address}).encode(), directory / ORDER)


@contextmanager
def opened(names: Sequence[str], address: str | None) -> Iterator[list[Deployment]]:
    """Those of these names, or all. `address`: those of that cluster. Raises UserError where one is not up."""
    known = recorded()
    with ExitStack() as joined_to:
        if address is not None:
            yield _of_cluster(names, address, joined_to)
            return
        asked = list(names) or list(known)
        for name in asked:
            if name not in known:
                told = ", ".join(known) or "nothing"
                raise UserError(
                    f"{name} is not up; up from this machine: {told}. Give --address for a cluster's"
                )
        addresses = {known[name] for name in asked} - {None}
        if len(addresses) > 1:
            clusters = ", ".join(map(str, addresses))
            raise UserError(f"these are in {len(addresses)} clusters; give --address, one of {clusters}")
        here: list[Deployment] = [Here(n, up_directory(n)) for n in asked if known[n] is None]
        there = [name for name in asked if known[name] is not None]
        if there:
            here += _of_cluster(there, str(addresses.pop()), joined_to)
        yield here


def _of_cluster(names: Sequence[str], address: str, joined_to: ExitStack) -> list[Deployment]:
    from launch.head import CLIENT, adopt, check_head, client_address

    address = client_address(address) if address.startswith(CLIENT) else address
    adopt(check_head(address))
    from cluster import detached

    joined_to.enter_context(detached.joined(address))
    found: list[Deployment] = []
    for name in names or detached.names():
        actor = detached.find(name)
        if actor is None:
            if recorded().get(name) == address:
                shutil.rmtree(up_directory(name))
            others = ", ".join(detached.names()) or "nothing"
            raise UserError(f"{name} is not up in {address}; up there: {others}")
        found.append(There(name, address, actor))
    return found


def _read(path: Path) -> dict[str, Any]:
    """Empty where it is missing, or damaged: the keeper that may write it does not wait for a disk."""
    return read_back(path, dict[str, Any]) or {}
