"""Answers of a batch on disk: two append-only files, each line there exactly once, whatever is killed and when.

A line begins with its request's number in the input, so that a reader finds out without parsing what is done. Lines
that come while others are being made durable travel in the next write: one fsync for all of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cluster.files import naming

OUTPUT, ERRORS, MANIFEST = "output.jsonl", "errors.jsonl", "manifest.json"
_NUMBER = re.compile(rb'\{"id":"batch_req_(\d{1,9})"')  # more digits were never written
_BLOCK = 2**16


def line_of(number: int, **fields: Any) -> bytes:
    """Of the output or error file."""
    return msgspec.json.encode({"id": f"batch_req_{number}", **fields}) + b"\n"


class Bits:
    """A set of small whole numbers, a bit each: a million of them take 125 kB."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self.count = 0

    def __contains__(self, number: int) -> bool:
        at = number >> 3
        return at < len(self._bytes) and bool(self._bytes[at] >> (number & 7) & 1)

    def add(self, number: int) -> None:
        if number in self:
            return
        at = number >> 3
        if at >= len(self._bytes):
            self._bytes.extend(bytes(at + 1 - len(self._bytes)))
        self._bytes[at] |= 1 << (number & 7)
        self.count += 1


class Journal:
    """Opened again, it repairs a torn last line and knows what is done."""

    def __init__(self, directory: Path) -> None:
        self._done = Bits()
        self.failed = 0
        self._paths = {True: directory / OUTPUT, False: directory / ERRORS}
        for is_ok, path in self._paths.items():
            _repair(path)
            found = self._read(path)
            self.failed += 0 if is_ok else found
        self._files = {is_ok: path.open("ab", buffering=0) for is_ok, path in self._paths.items()}
        _sync_directory(directory)
        self._waiting: list[tuple[int, bool, bytes]] = []
        self._written: asyncio.Future[None] | None = None  # of those that wait
        self._writing: asyncio.Task[None] | None = None

    def __contains__(self, number: int) -> bool:
        """Whether this request is done."""
        return number in self._done

    @property
    def completed(self) -> int:
        return self._done.count - self.failed

    async def write(self, number: int, line: bytes, *, is_ok: bool) -> None:
        """Returns once the line is durable. Raises OSError."""
        self._waiting.append((number, is_ok, line))
        if self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        written = self._written
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        await asyncio.shield(written)

    async def close(self) -> None:
        """Once all that was given is durable."""
        if self._writing is not None:
            await self._writing
        for file in self._files.values():
            file.close()

    async def _write_all(self) -> None:
        while self._waiting:
            lines, self._waiting = self._waiting, []
            written, self._written = self._written, None
            assert written is not None
            try:
                await asyncio.to_thread(self._append, lines)
            except OSError as error:
                written.set_exception(error)
                written.exception()  # asked here, lest asyncio complain
                continue
            for number, is_ok, _ in lines:
                self._done.add(number)
                self.failed += not is_ok
            written.set_result(None)
        self._writing = None

    def _append(self, lines: Sequence[tuple[int, bool, bytes]]) -> None:
        for is_ok, file in self._files.items():
            mine = b"".join(line for _, ok, line in lines if ok is is_ok)
            if mine:
                with naming(self._paths[is_ok]):
                    view = memoryview(mine)
                    while view:
                        view = view[file.write(view) or 0 :]
                    os.fsync(file.fileno())

    def _read(self, path: Path) -> int:
        """Note what is done. → lines"""
        lines = 0
        with path.open("rb") as file:
            for line in file:
                if found := _NUMBER.match(line):
                    self._done.add(int(found[1]))
                    lines += 1
        return lines


def _repair(path: Path) -> None:
    """Cut off what comes after the last whole line."""
    path.touch()
    with path.open("rb+") as file:
        end = at = file.seek(0, os.SEEK_END)
        while at:
            start = max(0, at - _BLOCK)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            at = start
            end = 0
        file.truncate(end)
        os.fsync(file.fileno())


def write_durably(path: Path, value: Mapping[str, Any]) -> None:
    """A small JSON file: the old one or the new one, never half of it, also after the power went."""
    new = path.with_suffix(".new")
    with naming(path), new.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
