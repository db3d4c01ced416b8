"""A log that one process writes and sets aside while another reads it: every line comes once, in its order.

The writer is a process of its own, which sets the log aside at each line of the reader's code in turn: every moment at
which it can happen is tried, and none is left to chance.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from launch import keeper_log
from launch.keeper_log import LOG, OLDER, Cursor, Log, read_log

MOST_BYTES = 200  # some six lines
ASIDE, ON = 9, 2  # lines, of which the first set the log aside once
WRITER = f"""
import sys
from pathlib import Path
from launch import keeper_log
keeper_log.MOST_BYTES = {MOST_BYTES}
logs = {{}}
for asked in sys.stdin:
    directory, first, last = asked.split()
    log = logs.setdefault(directory, keeper_log.Log(Path(directory)))
    for number in range(int(first), int(last)):
        log.write(f"line {{number}}")
    print(log._file.fileno(), flush=True)
"""

Write = Callable[[Path, int, int], None]


@pytest.fixture(scope="module")
def write() -> Iterator[Write]:
    """Has the other process write lines of these numbers; returns when it has."""
    root = Path(__file__).parents[2]
    program = [sys.executable, "-c", WRITER]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        asked, done = writer.stdin, writer.stdout

        def ask(directory: Path, first: int, last: int) -> None:
            print(directory, first, last, file=asked, flush=True)
            assert done.readline()

        yield ask
        asked.close()


@contextmanager
def before_line(number: int, strike: Callable[[], None]) -> Iterator[list[int]]:
    """Strikes once, before the reader comes to its line of this number; counts those it comes to."""
    seen: list[int] = []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != keeper_log.__file__:
            return None
        if event == "line":
            seen.append(frame.f_lineno)
            if len(seen) == number:
                strike()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


def numbers(text: bytes) -> list[int]:
    return [int(line.split()[-1]) for line in text.decode().splitlines()]


def rest(directory: Path, cursor: Cursor) -> bytes:
    """All that is to be had from there on."""
    seen = b""
    while True:
        cursor, text = read_log(directory, cursor)
        if not text:
            return seen
        seen += text


def begun(directory: Path, write: Write, was_set_aside: bool) -> tuple[Cursor, int]:
    """A log that is read to its end: the cursor there, and the next line's number."""
    directory.mkdir()
    lines = ASIDE if was_set_aside else ON
    write(directory, 0, lines)
    assert (directory / OLDER).exists() is was_set_aside
    cursor = read_log(directory, None)[0]
    return cursor, lines


@pytest.mark.parametrize("was_set_aside", [False, True])
def test_no_line_is_lost_or_told_twice_whenever_the_log_is_set_aside(
    was_set_aside: bool, write: Write, tmp_path: Path
) -> None:
    struck = 0
    for number in range(1, 200):
        directory = tmp_path / f"at-{number}"
        cursor, first = begun(directory, write, was_set_aside)
        write(directory, first, first + 1)
        last = first + 1 + (4 if was_set_aside else 6)
        with before_line(number, lambda: write(directory, first + 1, last)) as seen:  # noqa: B023
            cursor, text = read_log(directory, cursor)
        if len(seen) < number:
            break
        struck += 1
        assert numbers(text + rest(directory, cursor)) == list(range(first, last)), f"at line {seen[-1]}"
    assert struck > 20, "the reader has more lines than that"


def test_who_reads_too_slowly_loses_no_more_than_was_thrown_away(write: Write, tmp_path: Path) -> None:
    """Set aside twice between two looks: what was being read is gone, and all that is left comes."""
    cursor, first = begun(tmp_path / "slow", write, False)
    write(tmp_path / "slow", first, 40)
    kept = numbers((tmp_path / "slow" / OLDER).read_bytes() + (tmp_path / "slow" / LOG).read_bytes())
    assert kept[0] > first
    assert numbers(rest(tmp_path / "slow", cursor)) == kept


def test_a_new_file_never_has_the_number_of_the_one_that_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_log, "MOST_BYTES", 1)
    log = Log(tmp_path)
    log.write("0")
    for number in range(1, 20):
        gone = (tmp_path / OLDER).stat().st_ino
        log.write(str(number))
        assert (tmp_path / LOG).stat().st_ino != gone


def test_where_no_new_file_can_be_made_the_old_one_is_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_log, "MOST_BYTES", 1)
    log, full = Log(tmp_path), threading.Event()
    opened = log._open

    def refuse() -> Any:
        if full.is_set():
            raise OSError(28, "No space left on device")
        return opened()

    monkeypatch.setattr(log, "_open", refuse)
    full.set()
    log.write("0")
    log.write("1")
    full.clear()
    log.write("2")
    assert numbers((tmp_path / OLDER).read_bytes()) == [0, 1, 2]
    monkeypatch.setattr(keeper_log, "MOST_BYTES", 100)
    log.write("3")
    assert numbers((tmp_path / LOG).read_bytes()) == [3]
