"""Batch jobs: a file of requests in, a file of answers out, each exactly once; memory does not grow with the file.

What a request is, and how it is answered, is handed in. What was in flight when a process ended is computed again;
nothing else is.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cluster.errors import AttemptsSpent, BadRequest, Draining, NotFinite, ShardwiseError, UserError
from orchestrator.journal import Bits, Journal, line_of

LONGEST_LINE = 4 * 2**20  # bytes
ATTEMPTS = 2  # a request that fails twice goes to the error file


class _Named(msgspec.Struct):
    custom_id: str


@dataclass(frozen=True, slots=True)
class Examined:
    """An input file, looked through."""

    lines: int  # with something in them
    sha256: str
    duplicates: Bits  # numbers of requests whose custom_id was there before


@dataclass(frozen=True, slots=True)
class Answered:
    """What becomes of a request: a response, as the output file's line tells it."""

    custom_id: str | None
    status: int
    body: dict[str, Any]


Answer = Callable[[int, bytes], Awaitable[Answered]]
"""From a request's number and line to its response. Raises ShardwiseError where it may be tried again."""


class Changed(BadRequest):
    """The job was begun under other conditions."""


class Halted(ShardwiseError):
    """The job cannot go on now, and can be resumed."""


def requests_in(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Each line that is not blank, with its number; None in place of one that is too long."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            is_whole = len(line) <= LONGEST_LINE or line.endswith(b"\n")
            while not line.endswith(b"\n") and len(line) > LONGEST_LINE:
                line = file.readline(LONGEST_LINE + 1)
                if not line:
                    break
            if not is_whole:
                yield number, None
            elif line.strip():
                yield number, line.strip()
            else:
                continue
            number += 1


def examine(path: Path) -> Examined:
    """Reads it once: 8 bytes are kept of each line."""
    digest, names = hashlib.sha256(), array("q")
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    decoder = msgspec.json.Decoder(_Named)
    for number, line in requests_in(path):
        try:
            names.append(hash(decoder.decode(line or b"").custom_id))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # told when its turn comes
            names.append(hash((number, None)))
    return Examined(len(names), digest.hexdigest(), _repeated(names))


def _repeated(names: array[int]) -> Bits:
    """Numbers of all but the first of those that are equal."""
    found = Bits()
    values = np.frombuffer(names, dtype=np.int64) if names else np.empty(0, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    equal = values[order][1:] == values[order][:-1]
    for number in order[1:][equal].tolist():
        found.add(number)
    return found


class Job:
    def __init__(
        self, path: Path, examined: Examined, journal: Journal, answer: Answer, *, window: int
    ) -> None:
        """`window`: requests in flight at most."""
        self._path, self._examined, self._journal, self._answer = path, examined, journal, answer
        self._room = asyncio.Semaphore(window)
        self._flying: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._is_stopping = False

    async def run(self) -> None:
        """Until all is answered, or `stop`. Raises Halted, or OSError where the disk is full."""
        try:
            for number, line in requests_in(self._path):
                if number in self._journal:
                    continue
                await self._room.acquire()
                if self._is_stopping or self._error is not None:
                    break
                task = asyncio.create_task(self._do(number, line))
                self._flying.add(task)
                task.add_done_callback(self._landed)
            while self._flying:
                await asyncio.wait(self._flying)
        finally:
            for task in self._flying:
                task.cancel()
            await asyncio.gather(*self._flying, return_exceptions=True)
        if self._error is not None:
            raise self._error

    def stop(self, *, drop: bool) -> None:
        """Begin nothing more. `drop`: what is in flight, too."""
        self._is_stopping = True
        for task in self._flying if drop else ():
            task.cancel()

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._flying.discard(task)
        self._room.release()
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()

    async def _do(self, number: int, line: bytes | None) -> None:
        answered = await self._answered(number, line)
        is_ok = answered.status == 200
        response = {
            "status_code": answered.status,
            "request_id": f"batch_req_{number}",
            "body": answered.body,
        }
        error = None if is_ok else answered.body.get("error")
        written = line_of(number, custom_id=answered.custom_id, response=response, error=error)
        await self._journal.write(number, written, is_ok=is_ok)

    async def _answered(self, number: int, line: bytes | None) -> Answered:
        if line is None:
            return _refused(None, f"line {number + 1} has more than {LONGEST_LINE} bytes")
        if number in self._examined.duplicates:
            name = msgspec.json.decode(line, type=_Named).custom_id
            return _refused(name, f"the custom_id {name[:100]!r} was there before; each must be another")
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._answer(number, line)
            except (Draining, Halted):
                raise Halted("the server is shutting down; the batch goes on when it is back") from None
            except UserError as error:
                return _refused(_name_of(line), str(error))
            except ShardwiseError as error:
                if attempt == ATTEMPTS or isinstance(error, AttemptsSpent | NotFinite):
                    return Answered(_name_of(line), 500, _error(str(error), "server_error"))
        raise AssertionError("unreachable")


def _name_of(line: bytes) -> str | None:
    try:
        return msgspec.json.decode(line, type=_Named).custom_id
    except msgspec.DecodeError:
        return None


def _refused(custom_id: str | None, message: str) -> Answered:
    return Answered(custom_id, 400, _error(message, "invalid_request_error"))


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def check_same(was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises Changed where a job was begun under other conditions."""
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            raise Changed(
                f"the batch was begun with {name} {was.get(name)!r}, and now it is {now.get(name)!r}: "
                "its answers would not fit together. Serve it as it was, or submit it again"
            )
