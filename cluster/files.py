"""Small files that other processes read while they are written, and read back: whatever is in them by then."""

from __future__ import annotations

import errno
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")
LOG = logging.getLogger("shardwise")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
DAMAGED = (OSError, ValueError, RecursionError)
"""What reading and parsing a file can raise: msgspec's errors, json's and those of UTF-8 are ValueErrors."""


def write_whole(content: bytes, path: Path) -> None:
    """The file is there whole or not at all, also for a second process. Nothing is left where it cannot be written."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def keep_whole(content: bytes, path: Path) -> None:
    """The same for what can be made again: where it cannot be kept, that is told in a line."""
    try:
        write_whole(content, path)
    except OSError as error:
        LOG.warning("%s cannot be kept (%s): it will be made anew the next time", path, error.strerror)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Of this file is an OSError that names none, as those of writing do."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def no_room(error: OSError) -> str | None:
    """In a line, where it is a disk's state that its user must change; None: it is something else."""
    if error.errno not in _NO_ROOM:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; make room there, or give another place that can be written"


def read_back(path: Path, kind: type[T]) -> T | None:
    """A JSON file of ours. None where there is none, or, told in a line, where it is not what was written."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except DAMAGED as error:
        tell_damaged(path, error)
        return None


def tell_damaged(path: Path, error: Exception) -> None:
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    _tell(path, (why.splitlines() or [type(error).__name__])[0][:200])


@functools.cache  # once, however often it is looked at
def _tell(path: Path, why: str) -> None:
    LOG.warning("%s is damaged (%s): it counts as missing", path, why)
