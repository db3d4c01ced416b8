"""Processes of this host, held by a descriptor: a number that cannot become another process's."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path


def machine() -> str:
    """Equal for processes that can see and signal each other: the same boot, the same PID namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")


class Life:
    def __init__(self, pid: int) -> None:
        self._descriptor: int | None = None
        with contextlib.suppress(ProcessLookupError):  # gone already
            self._descriptor = os.pidfd_open(pid)

    def kill(self) -> None:
        """Stopped processes die too."""
        if self._descriptor is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        """Returns when the process has ended, or after `timeout_s`. The last use of this object."""
        if self._descriptor is not None:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            poll.poll(timeout_s * 1000)
            os.close(self._descriptor)
            self._descriptor = None
