"""Cleans up after a private Ray cluster when its owner ends, however it ends.

Ray's servers die with their owner; its agents, its workers (for seconds) and its directory do not. So the
owner starts `python guard.py OWNER_PID DIRECTORY`, which sleeps until the owner is dead or writes a line to
it, then kills every process whose standard output or error lies in DIRECTORY, and removes DIRECTORY. It
imports the standard library alone, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

_PATIENCE_S = 10.0  # killed processes are gone in milliseconds; after this long they cannot be killed


class Guard:
    """The owner's side."""

    def __init__(self, directory: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for the owner
        )

    def finish(self) -> None:
        """Clean up now. May be called again."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.communicate(b"\n", timeout=2 * _PATIENCE_S)


def main(owner: int, directory: str) -> None:
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # sent to all: the owner ends by it, then we do
        signal.signal(number, signal.SIG_IGN)
    _wait(owner)
    deadline = time.monotonic() + _PATIENCE_S
    while (pids := list(_members(directory))) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(directory, ignore_errors=True)


def _wait(owner: int) -> None:
    try:
        life = os.pidfd_open(owner)
    except ProcessLookupError:
        return
    if os.getppid() == owner:  # else it died before we looked, and its number may be somebody else's
        poll = select.poll()
        poll.register(life, select.POLLIN)
        poll.register(sys.stdin.fileno(), select.POLLIN)
        poll.poll()


def _members(directory: str) -> Iterator[int]:
    """Who writes its output to the directory; a reader of logs has them elsewhere than at 1 and 2."""
    for name in os.listdir("/proc"):
        if name.isdecimal() and any(_target(name, fd).startswith(directory + "/") for fd in (1, 2)):
            yield int(name)


def _target(pid: str, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}")
    except OSError:  # it has ended, or is not ours
        return ""


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
