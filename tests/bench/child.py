"""A program run as a benchmark's child: timed to a piece of its output, ended with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

GRACE_S = 10.0  # from SIGTERM to SIGKILL
LOOK_S = 0.05  # between two looks at its output
LOG_TAIL = 25  # lines of a child that failed


def run_child(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, limit_s: float, *, until: str
) -> tuple[str, float | None]:
    """Everything it wrote, and the seconds until the text `until` was there, None where that never came.

    It is ended with its whole process group: at the limit, and at its own end, for what it may have left.
    """
    began = time.perf_counter()
    seen_s: float | None = None
    with tempfile.TemporaryFile("w+b") as log:
        child = subprocess.Popen(
            command, env=environment, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while child.poll() is None and time.perf_counter() - began < limit_s:
                if seen_s is None and until in _content(log.fileno()):
                    seen_s = time.perf_counter() - began
                with suppress(subprocess.TimeoutExpired):
                    child.wait(LOOK_S)
        finally:
            end(child)
        text = _content(log.fileno())
    if seen_s is None and until in text:
        seen_s = time.perf_counter() - began
    if child.returncode or seen_s is None:
        print(f"-- {' '.join(command)}: exit code {child.returncode}, its last lines:", file=sys.stderr)
        print("\n".join(text.splitlines()[-LOG_TAIL:]), file=sys.stderr, flush=True)
    return text, seen_s


def _content(file: int) -> str:
    """Read at an offset of its own: the child writes at the file's."""
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def end(child: subprocess.Popen[bytes]) -> None:
    """Its group gets SIGTERM, and SIGKILL once it is dead or has had time enough."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
