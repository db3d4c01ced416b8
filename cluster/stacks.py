"""Where the processes of a gang are stuck: the stacks of each, whatever state it is in, in one file.

A process on this host tells by py-spy where that is installed, which reads the memory of a stopped one too. Else each
is asked by a call, which a thread of its own answers. One on this host that does not is told to by a signal, on which
faulthandler needs no lock of Python's, so that a loop in native code is seen. The call comes first because without that
lock faulthandler ends the process (SIGSEGV) where another thread of it is just ending, as threads of calls do.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster.errors import ShardwiseError
from cluster.gang import Call, Gang, Member
from cluster.life import machine

_SIGNAL = signal.SIGUSR1
_SPY_S = 5.0
_ANSWER_S = 2.0  # of all calls together
_TELL_S = 2.0  # to write some kilobytes; a process that needs longer is not going to
_LOOK_S = 0.05
_SAME_LOOKS = 6  # after which it has ended to write: there is no mark at the end
_MOST_BYTES = 256 * 1024  # of one process
_BEGIN = "hread 0x"  # of a thread, or of the current one


def arm() -> None:
    """In each process of a gang: its stacks go to its standard error when it is asked for them."""
    faulthandler.register(_SIGNAL, file=2, all_threads=True)


def own() -> str:
    """Of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def save(gang: Gang, directory: Path, name: str) -> Path:
    """A file with the stacks of every member, which must be `arm`ed. Takes seconds; stopped members are continued."""
    spied = {m.index: _by_spy(m.pid) for m in gang.members if m.machine == machine()}
    asked = {
        m.index: gang.call(m.index, "stacks")
        for m in gang.members
        if not spied.get(m.index) and not _is_stopped(m)
    }
    deadline = time.monotonic() + _ANSWER_S
    parts = []
    for member in gang.members:
        told = _told_by(member, spied.get(member.index), asked.get(member.index), deadline)
        parts.append(f"=== {member} ===\n{told}\n")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{time.strftime('%Y%m%dT%H%M%S')}.txt"
    with path.open("x") as file:  # whoever shares the directory cannot have laid a link there
        file.write("\n".join(parts))
    return path


def is_stopped(gang: Gang) -> bool:
    """Whether a signal stopped a member on this host: nothing that it ran did."""
    return any(_is_stopped(member) for member in gang.members)


def _is_stopped(member: Member) -> bool:
    return member.machine == machine() and (_state(member.pid) or "").startswith("T")


def _told_by(member: Member, spied: str | None, call: Call | None, deadline: float) -> str:
    told, silence = spied, ""
    if call is not None:
        try:
            told = str(call.result(max(0.0, deadline - time.monotonic())))
        except ShardwiseError as error:
            silence = f"(no answer: {error})"
    if member.machine != machine():
        return told or silence
    state = _state(member.pid)
    return "(it has ended)" if state is None else f"state {state}\n{told or _by_signal(member)}"


def _state(pid: int) -> str | None:
    """As in proc(5): R (running), S (sleeping), T (stopped), …"""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.removeprefix("State:").strip()
    return None


def py_spy() -> str | None:
    """Beside the Python that runs too: an environment need not be activated."""
    return shutil.which("py-spy") or shutil.which("py-spy", path=os.path.dirname(sys.executable))


def _by_spy(pid: int) -> str | None:
    """None where it is not installed, or may not look."""
    program = py_spy()
    if program is None:
        return None
    argv = [program, "dump", "--nonblocking", "--pid", str(pid)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SPY_S, check=True)
        return done.stdout
    return None


def _by_signal(member: Member) -> str:
    """What it adds to its standard error. A stopped one acts on signals only once it is continued."""
    log = Path(member.log)
    try:
        before = log.stat().st_size
        os.kill(member.pid, _SIGNAL)
        os.kill(member.pid, signal.SIGCONT)
    except OSError as error:
        return f"(cannot be asked: {error.strerror})"
    told, same, deadline = "", 0, time.monotonic() + _TELL_S
    while time.monotonic() < deadline and same < _SAME_LOOKS:
        time.sleep(_LOOK_S)
        with contextlib.suppress(OSError):
            with log.open("rb") as file:
                file.seek(before)
                new = file.read(_MOST_BYTES).decode(errors="replace")
            same = same + 1 if new == told and _BEGIN in new and new.endswith("\n") else 0
            told = new
    return told or f"(it wrote nothing in {_TELL_S:g} s)"
