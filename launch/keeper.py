"""Keeps a server running: starts it, starts it again when it dies, writes its log, says how it is.

`shardwise up` runs one as a process of its own on this machine (`python -m launch.keeper DIRECTORY`), or as a detached
actor of a Ray cluster (launch/gateway.py). It imports the standard library alone: it must outlive what it keeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

from launch.keeper_log import Log

STARTING, READY, WAITING, STOPPING = "starting", "ready", "waiting to start again", "stopping"
ENDED, FAILED = "ended", "failed"
OVER = (ENDED, FAILED)
ORDER, STATE = "order.json", "state.json"
PID = "{pid}"  # stands for the keeper's
SHARDWISE = (sys.executable, "-m", "launch.bound", PID)

_SERVING = re.compile(r"· +[\d.]+ s  serving (.+) on (http://\S+)$")  # launch/api/server.py
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_SERVED_WELL_S = 600.0  # after so long in service, the next death is the first again
_WORDS = 8  # lines that a dead server leaves
_FAILURES = 20


@dataclass(frozen=True, slots=True)
class Failure:
    at_s: float  # of the epoch
    code: int
    words: Sequence[str]


@dataclass(frozen=True, slots=True)
class State:
    """What `status` tells of it."""

    state: str = STARTING
    keeper_pid: int = 0
    keeper_started: str = ""  # in the kernel's ticks: a pid may become another process's
    server_pid: int | None = None
    url: str | None = None
    port: str | None = None  # on which it served last, though it may not serve now
    restarts: int = 0
    since_s: float = 0.0  # of the epoch
    exit_code: int | None = None
    failures: Sequence[Failure] = ()


class Keeper:
    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str | None],
        directory: Path,
        *,
        port: str | None = None,
        program: Sequence[str] = SHARDWISE,
    ) -> None:
        """`argv` of `program`; `environment`: changes to ours, None to unset; `port`, on which an earlier keeper of it
        served.

        A start that fails is tried again if it has served before; else what was asked cannot be.
        """
        self._argv, self._directory = on_port(argv, port or "0"), directory
        self._program = [word.replace(PID, str(os.getpid())) for word in program]
        self._environment = dict(os.environ)
        for name, value in environment.items():
            self._environment.pop(name, None)
            if value is not None:
                self._environment[name] = value
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._server: subprocess.Popen[str] | None = None
        self._log = Log(directory)
        self._state = State(keeper_pid=os.getpid(), keeper_started=started(os.getpid()) or "", port=port)

    def state(self) -> State:
        return self._state

    def run(self) -> int:
        """Until it is stopped, or its first start fails: the server's exit code. Its thread must live as long."""
        deaths = 0
        while True:
            code, words, served_s = self._serve_once()
            deaths = 1 if (served_s or 0.0) > _SERVED_WELL_S else deaths + 1
            if self._stop.is_set() or code == 0:
                return self._end(ENDED, code)
            failures = [*self._state.failures, Failure(time.time(), code, words)][-_FAILURES:]
            self._tell(failures=failures)
            if self._state.port is None:
                return self._end(FAILED, code)
            pause_s = _BACKOFF_S[min(deaths, len(_BACKOFF_S)) - 1]
            self._log.write(f"shardwise: the server ended ({how(code)}); starting it again in {pause_s:g} s")
            self._tell(state=WAITING, server_pid=None, url=None, exit_code=code)
            if self._stop.wait(pause_s):
                return self._end(ENDED, code)
            self._tell(state=STARTING, restarts=self._state.restarts + 1)

    def stop(self) -> None:
        """The server drains; asked again, it ends now. Returns at once."""
        with self._lock:
            self._stop.set()
            if self._server is not None and self._server.poll() is None:
                self._server.send_signal(signal.SIGTERM)
        self._tell(state=STOPPING)

    def kill(self) -> None:
        with self._lock:
            self._stop.set()
            if self._server is not None:
                self._server.kill()

    def _serve_once(self) -> tuple[int, list[str], float | None]:
        """→ exit code, its last lines, for how long it served (None: it never did)."""
        with self._lock:
            if self._stop.is_set():
                return 0, [], None
            self._server = subprocess.Popen(
                [*self._program, *self._argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=self._environment,
                start_new_session=True,
            )
        self._tell(server_pid=self._server.pid)
        words: deque[str] = deque(maxlen=_WORDS)
        assert self._server.stdout is not None
        ready_s = self._follow(self._server.stdout, words)
        code = self._server.wait()
        return code, list(words), None if ready_s is None else time.monotonic() - ready_s

    def _follow(self, lines: IO[str], words: deque[str]) -> float | None:
        """To its end. → when it began to serve."""
        ready_s = None
        for line in lines:
            text = line.rstrip("\n")
            self._log.write(text)
            if text.strip() and not text.startswith("· "):
                words.append(text)
            if (found := _SERVING.match(text)) is not None:
                ready_s = time.monotonic()
                port = found[2].rpartition(":")[2]
                self._argv = on_port(self._argv, port)
                self._tell(state=READY, url=found[2], port=port)
        return ready_s

    def _end(self, state: str, code: int) -> int:
        self._tell(state=state, exit_code=code, server_pid=None, url=None)
        return code

    def _tell(self, **changes: Any) -> None:
        with self._lock:
            if self._state.state in OVER:  # whoever stops it came too late
                return
            if "state" in changes and changes["state"] != self._state.state:
                changes["since_s"] = time.time()
            state, new = replace(self._state, **changes), self._directory / f"{STATE}.new"
            with contextlib.suppress(OSError):  # a full disk must not end what serves
                new.write_text(json.dumps(asdict(state)), encoding="utf-8")
                new.replace(self._directory / STATE)
            self._state = state  # what we say of it stands in the file by then


def on_port(argv: Sequence[str], port: str) -> list[str]:
    """With this port in place of any that is free: started again, it is where it was."""
    at = argv.index("--port") + 1 if "--port" in argv else 0
    return [port if at and i == at and word == "0" else word for i, word in enumerate(argv)]


def how(code: int) -> str:
    """A process ended."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks since boot; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # proc(5): the name before may hold anything
    return None if fields[0] == "Z" else fields[19]


def main(directory: Path) -> int:
    order = json.loads((directory / ORDER).read_text(encoding="utf-8"))
    program = order.get("program", SHARDWISE)
    keeper = Keeper(order["argv"], order["environment"], directory, program=program)

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=keeper.stop).start()  # it takes a lock that this thread may hold

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the shell that started us may go
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
