"""Cleans up after a private Ray cluster when its owner ends, however it ends.

Ray's servers die with their owner; its agents, its workers (for seconds) and its directory do not. So the
owner starts `python guard.py OWNER_PID DIRECTORY`, which sleeps until the owner is dead or writes a line to
it, then kills every process that writes Ray's outputs in DIRECTORY, and removes DIRECTORY. It imports the
standard library alone, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator

_OUTPUTS = (".out", ".err")  # the names that Ray gives to the outputs of what it starts
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
    """Who writes Ray's outputs in the directory: as its own, or, as Ray's agents, beside pipes to the raylet.

    Not who reads them, and not who only logs there, as the owner does and whoever joined its cluster.
    """
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if any(path.startswith(directory + "/") and path.endswith(_OUTPUTS) for path in _written(pid)):
            yield int(pid)


def _written(pid: str) -> Iterator[str]:
    """Paths of the files that a process has open for writing."""
    with contextlib.suppress(OSError):  # it has ended, or is not ours
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if descriptor.stat(follow_symlinks=False).st_mode & stat.S_IWUSR:
                    yield os.readlink(descriptor.path).removesuffix(" (deleted)")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
