"""A kept server: told when it serves, started again when it dies, its words kept; with stand-ins for the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch import keeper as keeping
from launch.keeper import ENDED, FAILED, READY, STATE, WAITING, Keeper, on_port, started
from launch.keeper_log import Log, read_log

PATIENCE_S = 20.0
SERVING = "print('·   0.1 s  serving tiny on http://127.0.0.1:4321', flush=True)"


@contextmanager
def kept(
    directory: Path, script: str, *argv: str, port: str | None = None
) -> Iterator[tuple[Keeper, Callable[[], int]]]:
    """A keeper at work in a thread, and a wait for its exit code."""
    program = (sys.executable, "-c", script)
    keeper = Keeper(argv, {}, directory, program=program, port=port)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(keeper.run()))
    thread.start()

    def ended() -> int:
        thread.join(PATIENCE_S)
        return codes[0]

    try:
        yield keeper, ended
    finally:
        keeper.kill()
        thread.join(PATIENCE_S)


def until(keeper: Keeper, right: Callable[[keeping.State], bool]) -> keeping.State:
    end_s = time.monotonic() + PATIENCE_S
    while not right(keeper.state()):
        assert time.monotonic() < end_s, keeper.state()
        time.sleep(0.01)
    return keeper.state()


def test_it_tells_where_is_served_and_ends_with_the_server(tmp_path: Path) -> None:
    with kept(tmp_path, f"{SERVING}; import time; time.sleep(60)") as (keeper, ended):
        state = until(keeper, lambda state: state.state == READY)
        assert state.url == "http://127.0.0.1:4321"
        told = json.loads((tmp_path / STATE).read_text())
        assert (told["state"], told["keeper_pid"]) == (READY, os.getpid())
        assert started(told["server_pid"]) is not None
        keeper.stop()
        assert ended() == -signal.SIGTERM
    assert keeper.state().state == ENDED
    assert keeper.state().url is None
    _, log = read_log(tmp_path, None, last_lines=9)
    assert log.decode().rstrip().endswith("serving tiny on http://127.0.0.1:4321")


def test_a_first_start_that_fails_is_told_with_its_words_and_not_tried_again(tmp_path: Path) -> None:
    with kept(tmp_path, "import sys; sys.exit('shardwise serve: no such model')") as (keeper, ended):
        assert ended() == 1
    state = keeper.state()
    assert (state.state, state.exit_code, state.restarts) == (FAILED, 1, 0)
    [failure] = state.failures
    assert list(failure.words) == ["shardwise serve: no such model"]


def test_a_server_that_served_and_died_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_BACKOFF_S", (0.01,))
    with kept(tmp_path, f"{SERVING}; import time; time.sleep(60)", "--port", "0") as (keeper, ended):
        first = until(keeper, lambda state: state.state == READY).server_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        state = until(keeper, lambda state: state.state == READY and state.server_pid != first)
        assert state.restarts == 1
        assert [failure.code for failure in state.failures] == [-signal.SIGKILL]
        assert state.server_pid is not None
        argv = Path(f"/proc/{state.server_pid}/cmdline").read_bytes().split(b"\0")
        assert argv[-3:-1] == [b"--port", b"4321"], "it is where it was"
        keeper.stop()
        assert ended() == -signal.SIGTERM
    assert b"killed by SIGKILL); starting it again" in read_log(tmp_path, None, last_lines=99)[1]


def test_what_served_before_is_tried_until_it_serves_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_BACKOFF_S", (0.01, 0.02, 60.0))
    with kept(tmp_path, "raise SystemExit(2)", port="4321") as (keeper, ended):
        state = until(keeper, lambda state: state.restarts == 2 and state.state == WAITING)
        assert len(state.failures) == 3
        told = json.loads((tmp_path / STATE).read_text())
        assert (told["url"], told["port"]) == (None, "4321"), "for a keeper that comes after"
        keeper.stop()
        assert ended() == 2


def test_a_server_dies_with_its_keeper(tmp_path: Path) -> None:
    script = f"{SERVING}; import time; time.sleep(60)"
    program = [sys.executable, "-c", f"from launch.bound import bound; bound(int({keeping.PID!r})); {script}"]
    order = {"argv": [], "environment": {}, "program": program}
    (tmp_path / keeping.ORDER).write_text(json.dumps(order))
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-m", "launch.keeper", str(tmp_path)], cwd=root)
    end_s = time.monotonic() + PATIENCE_S
    told = {"state": ""}
    while told["state"] != READY:
        assert time.monotonic() < end_s
        time.sleep(0.01)
        told = json.loads((tmp_path / STATE).read_text()) if (tmp_path / STATE).exists() else told
    process.kill()
    process.wait()
    while started(int(told["server_pid"])) is not None:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_full_disk_ends_no_server(tmp_path: Path) -> None:
    for name in ("log", f"{STATE}.new"):
        (tmp_path / name).symlink_to("/dev/full")
    with kept(tmp_path, f"{SERVING}; import time; time.sleep(60)") as (keeper, ended):
        assert until(keeper, lambda state: state.state == READY).url == "http://127.0.0.1:4321"
        keeper.stop()
        ended()
        assert keeper.state().state == ENDED


def test_a_stop_that_comes_too_late_changes_nothing(tmp_path: Path) -> None:
    with kept(tmp_path, SERVING) as (keeper, ended):
        assert ended() == 0
        keeper.stop()
        assert keeper.state().state == ENDED


def test_only_a_free_port_is_replaced() -> None:
    assert on_port(["a", "--port", "0", "--n", "0"], "81") == ["a", "--port", "81", "--n", "0"]
    assert on_port(["a", "--port", "80"], "81") == ["a", "--port", "80"]
    assert on_port(["a"], "81") == ["a"]


def test_a_log_is_read_on_from_where_one_was_though_it_was_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.keeper_log.MOST_BYTES", 120)
    log = Log(tmp_path)
    for number in range(3):
        log.write(f"line {number}")
    cursor, text = read_log(tmp_path, None, last_lines=2)
    assert [line.split()[-1] for line in text.decode().splitlines()] == ["1", "2"]
    for number in range(3, 7):
        log.write(f"line {number}")
    assert (tmp_path / "log.1").exists()
    seen = b""
    while True:
        cursor, text = read_log(tmp_path, cursor)
        if not text:
            break
        seen += text
    assert [line.split()[-1] for line in seen.decode().splitlines()] == ["3", "4", "5", "6"]
    assert read_log(tmp_path / "none", None) == ((0, 0), b"")


@pytest.mark.parametrize("amid", [1, 2])
def test_a_log_that_is_set_aside_amid_a_look_loses_no_line(
    amid: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just before the look opens its first file, or its second."""
    monkeypatch.setattr("launch.keeper_log.MOST_BYTES", 200)
    log = Log(tmp_path)
    for number in range(3):
        log.write(f"line {number}")
    cursor, _ = read_log(tmp_path, None)
    opens, open_file = 0, Path.open

    def opening(path: Path, *how: Any) -> Any:
        nonlocal opens
        opens += 1
        if opens == amid:
            for number in range(3, 9):
                log.write(f"line {number}")
            assert (tmp_path / "log.1").exists()
        return open_file(path, *how)

    monkeypatch.setattr(Path, "open", opening)
    seen = b""
    for _ in range(4):
        cursor, text = read_log(tmp_path, cursor)
        seen += text
    assert [int(line.split()[-1]) for line in seen.decode().splitlines()] == [3, 4, 5, 6, 7, 8]


def test_a_log_begun_anew_under_the_same_number_is_read_from_its_beginning(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.write("of the server before")
    (inode, offset), _ = read_log(tmp_path, None)
    os.truncate(tmp_path / "log", 0)
    log.write("new")
    assert read_log(tmp_path, (inode, offset))[1].endswith(b"new\n")
