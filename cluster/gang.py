"""A gang: processes, one for each device, that live and die together; the seam between orders and hosts.

Two forms satisfy it: actors of Ray (cluster/actors.py), and plain processes of this host (tests/fakes.py).
Each process hosts one object of a plain class, made with no arguments, and calls its methods by name,
several at once, in threads.

What a worker raises comes back: our own errors as themselves, anything else as WorkerFailed; both carry the
remote traceback as a note. When a process dies, every call in flight fails with the same GangDied, which
ends with the dead one's last words, and the rest of the gang is killed.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent import futures
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster import errors
from cluster.errors import GangDied, ShardwiseError, WorkerFailed

_LAST_WORDS_LINES = 16
_LAST_WORDS_BYTES = 64 * 1024
_FATAL = "Fatal Python error"  # what faulthandler writes first, before the stacks of all threads
_RAY_MARKS = (":job_id:", ":actor_name:", ":task_name:")  # lines that Ray writes for its own log reader


@dataclass(frozen=True, slots=True)
class Member:
    index: int
    node: str  # IP address: what sockets bind to when another node is involved
    node_id: str  # equal on members that can share memory
    pid: int
    device: int  # index among the GPUs that the process sees; 0 on CPU
    log: str  # path, on its node, of the file that its standard error goes to
    machine: str = ""  # cluster.life.machine(): its pid is one of ours where this is equal

    def __str__(self) -> str:
        return f"worker {self.index} (pid {self.pid} on {self.node})"


class Gang(Protocol):
    @property
    def members(self) -> tuple[Member, ...]: ...

    def call(self, index: int, method: str, *args: object) -> Call:
        """Start `method` of the object that member `index` hosts."""

    def call_all(self, method: str, per_member_args: Sequence[Sequence[object]] | None = None) -> list[Call]:
        """Start `method` everywhere, member i with `per_member_args[i]`."""

    async def died(self) -> GangDied:
        """Returns, once and for every waiter, when a member has died or `kill` was called."""

    def watch(self, on_death: Callable[[GangDied], None]) -> None:
        """The same for code without a loop: `on_death` is called from a thread of the gang."""

    def kill(self) -> None:
        """Kill every process and free its devices; returns when they are gone. May be called again."""


@dataclass(frozen=True, slots=True)
class Failure:
    type_name: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Answer:
    value: object
    failure: Failure | None = None


def attempt(work: Callable[[], object]) -> Answer:
    """Run something where the object lives; what it raises becomes data."""
    try:
        return Answer(work())
    except BaseException as error:  # SystemExit too: only the gang's owner ends its processes
        return failed(error)


def failed(error: BaseException) -> Answer:
    return Answer(None, Failure(type(error).__name__, str(error), "".join(traceback.format_exception(error))))


class Call:
    """A method at work in another process: `await` it, or ask for its `result`."""

    def __init__(self, member: Member, method: str) -> None:
        self._member = member
        self._method = method
        self._future: Future[Any] = _uncancellable()

    def result(self, timeout_s: float | None = None) -> Any:
        """Raises what the worker raised; GangDied when a member has died, or after `timeout_s`."""
        try:
            return self._future.result(timeout_s)
        except TimeoutError:  # ours: a worker's own would have come as WorkerFailed
            raise self.silence(timeout_s or 0) from None

    def silence(self, waited_s: float) -> GangDied:
        """What a call is told as that nobody answers."""
        return GangDied(
            f"{self._member} did not answer {self._method}() in {waited_s:.3g} s: it is stopped or stuck"
        )

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, well or not, within `timeout_s`."""
        return bool(futures.wait([self._future], timeout_s).done)

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self._future).__await__()

    def settle(self, answer: Answer) -> None:
        if answer.failure is None:
            self._future.set_result(answer.value)
        else:
            self.fail(self._error(answer.failure))

    def fail(self, error: BaseException) -> None:
        self._future.set_exception(error)

    def _error(self, failure: Failure) -> ShardwiseError:
        ours = getattr(errors, failure.type_name, None)
        if isinstance(ours, type) and issubclass(ours, ShardwiseError):
            error = ours(failure.message)
        else:
            error = WorkerFailed(
                f"{self._member} failed in {self._method}(): {failure.type_name}: {failure.message}"
            )
        error.add_note(f"In {self._member}:\n{failure.traceback}")
        return error


def results(calls: Sequence[Call], timeout_s: float) -> list[Any]:
    """All results, in order. Raises as soon as any call has failed: its peers may wait for it in vain."""
    futures.wait([call._future for call in calls], timeout_s, return_when=futures.FIRST_EXCEPTION)
    for call in calls:
        if call._future.done():
            call.result()
    for call in calls:
        if not call._future.done():
            raise call.silence(timeout_s)
    return [call.result() for call in calls]


class Fate:
    """What a gang's callers and watchers wait for: answers, or the one end that ends them all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claimed = False
        self._calls: set[Call] = set()  # in flight
        self._end: GangDied | None = None
        self._death: Future[GangDied] = _uncancellable()

    def begin(self, call: Call) -> bool:
        """False, and the call has failed, when the gang has ended."""
        with self._lock:
            if self._end is None:
                self._calls.add(call)
                return True
        call.fail(GangDied(str(self._end)))
        return False

    def answer(self, call: Call, answer: Answer) -> None:
        with self._lock:
            if call not in self._calls:
                return
            self._calls.remove(call)
        call.settle(answer)

    def claim(self) -> bool:
        """True for the first who asks: it must `end`. Members that die later were killed with the gang."""
        with self._lock:
            first, self._claimed = not self._claimed, True
            return first

    def end(self, death: GangDied) -> None:
        with self._lock:
            self._end = death
            calls, self._calls = self._calls, set()
        for call in calls:
            call.fail(GangDied(str(death)))
        self._death.set_result(death)

    @property
    def has_ended(self) -> bool:
        return self._death.done()

    def wait(self, timeout_s: float) -> None:
        """Returns when it has ended, or after `timeout_s`."""
        wait([self._death], timeout_s)

    def watch(self, on_death: Callable[[GangDied], None]) -> None:
        self._death.add_done_callback(lambda future: on_death(future.result()))

    async def died(self) -> GangDied:
        return await asyncio.wrap_future(self._death)


def _uncancellable() -> Future[Any]:
    """A future that a cancelled waiter does not cancel for the others."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def obituary(member: Member, how: str, words: str) -> GangDied:
    said = f"Its last words:\n{words}" if words else "It wrote nothing to its standard error."
    death = GangDied(f"{member} died: {how}. {said}")
    death.was_killed = "SIGKILL" in how and _FATAL not in words
    return death


def read_last_words(path: str) -> str | None:
    """The end of a worker's standard error; None where the file is not on this host."""
    try:
        with Path(path).open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - _LAST_WORDS_BYTES))
            return last_words(log.read().decode(errors="replace"))
    except OSError:
        return None


def last_words(log: str) -> str:
    """The last lines; of a crash in native code, the lines that say which."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip() and not line.startswith(_RAY_MARKS)]
    fatal = [number for number, line in enumerate(lines) if line.startswith(_FATAL)]
    start = fatal[-1] if fatal else max(0, len(lines) - _LAST_WORDS_LINES)
    return "\n".join(lines[start : start + _LAST_WORDS_LINES])
