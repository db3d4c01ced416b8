"""Processes of this host that do one job after another, each within a time limit: what hangs or crashes takes nothing
else with it.

A job is a function of a module, called with the child's own arguments. A child is a fresh interpreter, since CUDA
does not survive a fork, with an environment of its own, since NCCL and gloo are told most things there alone. What
it writes goes to a file whose end is told when it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

from cluster.gang import last_words
from cluster.loopback import loopback_interface

T = TypeVar("T")
START_LIMIT_S = 120.0  # a cold import of torch from a slow disk, and a CUDA context on each GPU
REAP_S = 5.0
GRACE_S = 0.5  # between a child's error and the sight of another's death that caused it
MOST_WORDS = 20_000  # bytes of a log that are looked at
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h: a child that hangs never sees its pipe closed


class Failure(StrEnum):
    RAISED = "raised"
    CRASHED = "crashed"
    HUNG = "hung"


class ChildFailed(Exception):
    """One child's failure, by which all of them are ended: they wait for each other."""

    def __init__(self, rank: int, failure: Failure, words: str) -> None:
        super().__init__(f"rank {rank} {failure}: {words}")
        self.rank, self.failure, self.words = rank, failure, words


class Device(Protocol):
    """cluster.probes.Target, which imports torch."""

    def open(self) -> object: ...


class Ranks(Protocol):
    """What measuring and proving need of processes: Children, or a stand-in in the same process."""

    def each(self, job: Callable[..., T], args: Sequence[Sequence[object]], limit_s: float) -> list[T]:
        """`job(*args[rank])` on the first len(args) ranks at once, and what they returned. Raises ChildFailed, also
        where none of them is heard of for `limit_s`."""

    def close(self) -> None: ...


class Children:
    """Satisfies Ranks. The processes start at the first job, and anew at the first after a failure."""

    def __init__(
        self,
        count: int,
        environment: Mapping[str, str],
        said: Callable[[str], None],
        devices: Sequence[tuple[Device]] = (),
    ) -> None:
        """`said` is told what a job says by `say`. `devices` are opened by the ranks beforehand, which on a GPU may
        take longer than the jobs themselves."""
        self._count, self._environment, self._said, self._devices = count, dict(environment), said, devices
        self._children: list[_Child] = []

    def each(self, job: Callable[..., T], args: Sequence[Sequence[object]], limit_s: float) -> list[T]:
        self._start()
        children = self._children[: len(args)]
        for child, own in zip(children, args, strict=True):
            child.send(job, own)
        try:
            return self._gather(children, limit_s)
        except ChildFailed as error:
            cause = self._crashed(children) if error.failure is Failure.RAISED else None
            self.close()
            raise cause or error from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        children, self._children = self._children, []
        for child in children:
            child.process.kill()
        for child in children:
            child.process.join(REAP_S)
            child.pipe.close()
            with contextlib.suppress(OSError):
                os.unlink(child.log)

    def _crashed(self, children: Sequence[_Child]) -> ChildFailed | None:
        """The child whose death another one's error may only tell of."""
        ended = {child.process.sentinel: rank for rank, child in enumerate(children)}
        for sentinel in wait(list(ended), GRACE_S):
            assert isinstance(sentinel, int)
            rank = ended[sentinel]
            return ChildFailed(rank, Failure.CRASHED, children[rank].obituary())
        return None

    def _start(self) -> None:
        if self._children:
            return
        self._children = [_Child(self._environment) for _ in range(self._count)]
        try:
            for child in self._children:
                child.send(_ready, ())
            self._gather(self._children, START_LIMIT_S)
            for child, device in zip(self._children, self._devices, strict=False):
                child.send(_opened, device)
            self._gather(self._children[: len(self._devices)], START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def _gather(self, children: Sequence[_Child], limit_s: float) -> list[Any]:
        deadline = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        while len(answers) < len(children):
            waiting = {c.pipe: rank for rank, c in enumerate(children) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                silent = min(waiting.values())
                raise ChildFailed(silent, Failure.HUNG, f"no sign of life for {limit_s:g} s")
            deadline = time.monotonic() + limit_s
            for pipe in ready:
                assert isinstance(pipe, Connection)
                self._take(children, waiting[pipe], pipe, answers)
        return [answers[rank] for rank in range(len(children))]

    def _take(self, children: Sequence[_Child], rank: int, pipe: Connection, answers: dict[int, Any]) -> None:
        try:
            kind, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            raise ChildFailed(rank, Failure.CRASHED, children[rank].obituary()) from None
        if kind == "alive":
            return
        if kind == "said":
            self._said(value)
        elif kind == "raised":
            raise ChildFailed(rank, Failure.RAISED, value)
        else:
            answers[rank] = value


class _Child:
    def __init__(self, environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        descriptor, self.log = tempfile.mkstemp(prefix=f"shardwise-{os.getpid()}-")
        os.close(descriptor)
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, self.log, dict(environment)), daemon=True
        )
        self.process.start()
        theirs.close()

    def send(self, job: Callable[..., object], args: Sequence[object]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, which is seen when its answer is read
            self.pipe.send((job, tuple(args)))

    def obituary(self) -> str:
        self.process.join(REAP_S)
        code = self.process.exitcode
        how = (
            f"killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exit code {code}"
        )
        with open(self.log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - MOST_WORDS))
            words = last_words(file.read().decode(errors="replace"))
        return f"{how}: {words.splitlines()[-1]}" if words else how


# --- in the child -------------------------------------------------------------------------------------------

_pipe: Connection | None = None


def say(line: str) -> None:
    """Tells the parent how far a job is."""
    if _pipe is not None:
        _pipe.send(("said", line))


def alive() -> None:
    """Tells the parent that a job which takes long has not hung."""
    if _pipe is not None:
        _pipe.send(("alive", None))


def _ready() -> None:
    import torch  # noqa: F401 - the slow part of every job, for which there is time of its own


def _opened(device: Device) -> None:
    import torch

    place = device.open()
    if isinstance(place, torch.device):
        torch.zeros(1, device=place)  # CUDA's context comes with the first use


def _serve(pipe: Connection, log: str, environment: Mapping[str, str]) -> None:
    global _pipe
    _pipe = pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent, which ends us
    with contextlib.suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.environ.update(environment)
    if loopback := loopback_interface():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)  # NCCL writes there, and standard output is for the command's own answer
        os.dup2(file.fileno(), 2)
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:  # the parent is gone
            os._exit(0)
        try:
            answer = ("done", job(*args))
        except Exception as error:  # of any kind: it is the parent's to judge
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            answer = ("raised", lines[0] if lines else type(error).__name__)
        pipe.send(answer)
