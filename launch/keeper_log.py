"""A server's log: lines with their time, in a file that is set aside when it is full, and read from where one was."""

from __future__ import annotations

import contextlib
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

LOG, OLDER = "log", "log.1"
MOST_BYTES = 16 * 2**20  # of each of the two
MOST_READ = 2**20
_BLOCK = 2**16

Cursor = tuple[int, int]  # which file, by inode, and how far


class Log:
    """Who writes it. One at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = self._open()

    def write(self, line: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with contextlib.suppress(OSError):  # on a full disk lines are lost; what serves goes on
            self._file.write(f"{stamp} {line}\n".encode(errors="replace"))
        if self._file.tell() > MOST_BYTES:
            self._set_aside()

    def _set_aside(self) -> None:
        """The new file must not get the number of the one that goes, by which readers tell them apart: it is held."""
        log, older = self._directory / LOG, self._directory / OLDER
        with ExitStack() as held, contextlib.suppress(OSError):
            if older.exists():
                held.enter_context(older.open("rb"))
            if log.exists():
                log.replace(older)
            fresh = self._open()
            self._file.close()
            self._file = fresh

    def _open(self) -> BinaryIO:
        descriptor = os.open(self._directory / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.fdopen(descriptor, "ab", buffering=0)


def read_log(directory: Path, cursor: Cursor | None, *, last_lines: int = 0) -> tuple[Cursor, bytes]:
    """What came after `cursor`, or from its beginning the last lines: a piece of it, and where the next begins."""
    with ExitStack() as opened:
        files = _opened(directory, opened)
        if not files:
            return (0, 0), b""
        if cursor is None:
            inode, file = files[-1]
            return _piece(inode, file, _start_of_last(file, last_lines))
        known = [inode for inode, _ in files]
        at = (
            known.index(cursor[0]) if cursor[0] in known else 0
        )  # what was read is gone, and these came after it
        offset = cursor[1] if cursor[0] in known else 0
        while True:
            found, text = _piece(*files[at], offset)
            if text or at == len(files) - 1:
                return found, text
            at, offset = at + 1, 0


def _opened(directory: Path, owner: ExitStack) -> list[tuple[int, BinaryIO]]:
    """The older first, each by its inode. What is open stays what it is while the writer sets the log aside.

    The newer is opened first: set aside between the two, it is found again as the older, and none is missed.
    """
    found: dict[int, BinaryIO] = {}
    for name in (LOG, OLDER):
        with contextlib.suppress(FileNotFoundError):
            file = owner.enter_context((directory / name).open("rb"))
            found.setdefault(os.fstat(file.fileno()).st_ino, file)
    return list(found.items())[::-1]


def _piece(inode: int, file: BinaryIO, offset: int) -> tuple[Cursor, bytes]:
    if offset > file.seek(
        0, os.SEEK_END
    ):  # another file by now, which got the number of one that was removed
        offset = 0
    file.seek(offset)
    text = file.read(MOST_READ)
    return (inode, offset + len(text)), text


def _start_of_last(file: BinaryIO, lines: int) -> int:
    end = at = file.seek(0, os.SEEK_END)
    found = b""
    while at and found.count(b"\n") <= lines:
        start = max(0, at - _BLOCK)
        file.seek(start)
        found = file.read(at - start) + found
        at = start
    kept = b"".join(found.splitlines(keepends=True)[-lines:]) if lines else b""
    return end - len(kept)
