"""A server's log: lines with their time, in a file that is set aside when it is full, and read from where one was."""

from __future__ import annotations

import contextlib
import os
import time
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
            self._file.close()
            (self._directory / LOG).replace(self._directory / OLDER)
            self._file = self._open()

    def _open(self) -> BinaryIO:
        descriptor = os.open(self._directory / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.fdopen(descriptor, "ab", buffering=0)


def read_log(directory: Path, cursor: Cursor | None, *, last_lines: int = 0) -> tuple[Cursor, bytes]:
    """What came after `cursor`, or from its beginning the last lines: a piece of it, and where the next begins."""
    files = [(_inode(path), path) for path in (directory / OLDER, directory / LOG) if path.exists()]
    if not files:
        return (0, 0), b""
    if cursor is None:
        inode, path = files[-1]
        return _piece(inode, path, _start_of_last(path, last_lines))
    known = [inode for inode, _ in files]
    at = known.index(cursor[0]) if cursor[0] in known else len(files) - 1
    offset = cursor[1] if cursor[0] in known else 0
    while True:
        found, text = _piece(*files[at], offset)
        if text or at == len(files) - 1:
            return found, text
        at, offset = at + 1, 0


def _inode(path: Path) -> int:
    return path.stat().st_ino


def _piece(inode: int, path: Path, offset: int) -> tuple[Cursor, bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read(MOST_READ)
    return (inode, offset + len(text)), text


def _start_of_last(path: Path, lines: int) -> int:
    with path.open("rb") as file:
        end = at = file.seek(0, os.SEEK_END)
        found = b""
        while at and found.count(b"\n") <= lines:
            start = max(0, at - _BLOCK)
            file.seek(start)
            found = file.read(at - start) + found
            at = start
    kept = b"".join(found.splitlines(keepends=True)[-lines:]) if lines else b""
    return end - len(kept)
