"""Streams of a device's work, as far as their order goes: the seam at which a test may do it in any order allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

Mark = Any  # of a queue: all that it was given so far


class Queue(Protocol):
    """Does what it is given in turn; beside other queues, unless it waits."""

    def do(self, work: Callable[[], object]) -> None: ...

    def mark(self) -> Mark: ...

    def wait(self, mark: Mark) -> None:
        """What it is given from now on comes after another queue's mark."""


class AtOnce:
    """A CPU's (satisfies Queue)."""

    def do(self, work: Callable[[], object]) -> None:
        work()

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        pass


class CudaQueue:
    """A stream, or whatever is the current one (satisfies Queue)."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream

    def do(self, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream or torch.cuda.current_stream())
        return event

    def wait(self, mark: Mark) -> None:
        (self._stream or torch.cuda.current_stream()).wait_event(mark)


def queues(device: torch.device) -> tuple[Queue, Queue, Queue]:
    """The one that steps run on, and two beside it."""
    if device.type != "cuda":
        return AtOnce(), AtOnce(), AtOnce()
    out, into = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return CudaQueue(), CudaQueue(out), CudaQueue(into)
