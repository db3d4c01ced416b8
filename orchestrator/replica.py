"""The one narrow seam between the coordinator and what generates tokens: submit, abort, steps, load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from cluster import stacks
from cluster.channel import Address, AsyncReader
from cluster.errors import GangDied, ShardwiseError
from cluster.gang import Call, Gang
from orchestrator.request import Request, Token
from orchestrator.scheduler import Load

LOOKS = 8
"""In so many parts a replica's silence is counted: a machine that slept through all of it has missed one alone."""
OBITUARY_S = 8.0
"""How long a gang may take to say who died: 0.1 s on this host, but last words fetched from another node up to 5 s."""


class Replica(Protocol):
    async def submit(self, requests: Sequence[Request]) -> None:
        """Take requests over; their tokens come out of `steps`."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; tokens already on their way may still come."""

    def steps(self) -> AsyncIterator[list[Token]]:
        """Tokens, a list a step, for as long as the replica lives. Raises GangDied when it does not."""

    async def load(self) -> Load: ...


@dataclass(frozen=True, slots=True)
class Watchdog:
    """A replica that has work, and says nothing for so long, is stuck: its stacks are saved, and it is killed."""

    silence_s: float  # more than its longest step
    directory: Path  # of the stacks


class GangReplica:
    """A gang of workers. Control goes by calls to the leader; tokens come by a socket of its own."""

    def __init__(
        self,
        gang: Gang,
        leader: int,
        tokens: Address,
        loops: Sequence[Call],
        watchdog: Watchdog | None = None,
    ) -> None:
        """`leader` is its member index, `tokens` where its tokens come from, `loops` the ranks' running loops."""
        self._gang, self._leader, self._tokens, self._loops = gang, leader, tokens, loops
        self._watchdog = watchdog
        self._at_work: set[str] = set()  # requests that it must make steps for
        self._compiling: set[str] = set()  # whose grammar may take any time before their first step

    async def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            (self._at_work if request.grammar is None else self._compiling).add(request.id)
        await self._gang.call(self._leader, "submit", list(requests))

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._at_work.difference_update(request_ids)
        self._compiling.difference_update(request_ids)
        await self._gang.call(self._leader, "abort", list(request_ids))

    async def load(self) -> Load:
        load: Load = await self._gang.call(self._leader, "current_load")
        return load

    async def steps(self) -> AsyncIterator[list[Token]]:
        reader = await AsyncReader.open(self._tokens)
        ended = asyncio.ensure_future(self._end())
        decoder = msgspec.msgpack.Decoder(list[Token])
        look_s = self._watchdog.silence_s / LOOKS if self._watchdog is not None else None
        message: asyncio.Future[bytes] | None = None
        looks = 0
        try:
            while True:
                if message is None:
                    message = asyncio.ensure_future(reader.recv())
                waiting: set[asyncio.Future[Any]] = {message, ended}
                await asyncio.wait(waiting, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
                if message.done():
                    tokens, message, looks = decoder.decode(message.result()), None, 0
                    if tokens:  # else a step that gave none
                        self._note(tokens)
                        yield tokens
                    continue
                if ended.done():
                    raise ended.result()
                looks = looks + 1 if self._at_work else 0
                if self._watchdog is not None and looks >= LOOKS:
                    raise await asyncio.to_thread(self._put_down, self._watchdog)
        finally:
            ended.cancel()
            if message is not None:
                message.cancel()  # cancelled here, we may leave it before it has begun: not on a closed socket
            reader.close()

    def _note(self, tokens: Sequence[Token]) -> None:
        for token in tokens:
            if self._compiling and token.request_id in self._compiling:
                self._compiling.remove(token.request_id)
                self._at_work.add(token.request_id)
            if token.finish_reason is not None:
                self._at_work.discard(token.request_id)

    def _put_down(self, watchdog: Watchdog) -> GangDied:
        was_stopped = stacks.is_stopped(self._gang)  # saving stacks sets it going again
        told = f"it made no step for {watchdog.silence_s:g} s with {len(self._at_work)} requests at work"
        try:
            path = stacks.save(self._gang, watchdog.directory, f"stacks-{self._gang.members[0].pid}")
            told += f"; the stacks of its ranks are in {path}"
        except OSError as error:
            told += f"; the stacks of its ranks could not be saved: {error}"
        self._gang.kill()
        death = GangDied(f"the gang of {len(self._gang.members)} was stuck: {told}")
        death.was_killed = was_stopped
        return death

    async def _end(self) -> ShardwiseError:
        """Why the gang ended: a member died, or a rank's loop failed, which the others cannot outlive."""
        died = asyncio.ensure_future(self._gang.died())
        loops = [asyncio.ensure_future(_outcome(loop)) for loop in self._loops]
        await asyncio.wait({died, *loops}, return_when=asyncio.FIRST_COMPLETED)
        error = next((loop.result() for loop in loops if loop.done()), None)
        if isinstance(
            error, GangDied
        ):  # a neighbour's broken wire: the gang is about to say who died, and how
            await asyncio.wait({died}, timeout=OBITUARY_S)
        if error is None or died.done():
            return died.result()
        await asyncio.to_thread(self._gang.kill)
        return error


async def _outcome(loop: Call) -> ShardwiseError:
    try:
        await loop
    except ShardwiseError as error:
        return error
    return GangDied("a rank's loop ended though nobody stopped it")
