"""The one narrow seam between the coordinator and what generates tokens: submit, abort, steps, load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec

from cluster.channel import Address, AsyncReader
from cluster.errors import GangDied, ShardwiseError
from cluster.gang import Call, Gang
from orchestrator.request import Request, Token
from orchestrator.scheduler import Load

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


class GangReplica:
    """A gang of workers. Control goes by calls to the leader; tokens come by a socket of its own."""

    def __init__(self, gang: Gang, leader: int, tokens: Address, loops: Sequence[Call]) -> None:
        """`leader` is its member index, `tokens` where its tokens come from, `loops` the ranks' running loops."""
        self._gang, self._leader, self._tokens, self._loops = gang, leader, tokens, loops

    async def submit(self, requests: Sequence[Request]) -> None:
        await self._gang.call(self._leader, "submit", list(requests))

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._gang.call(self._leader, "abort", list(request_ids))

    async def load(self) -> Load:
        load: Load = await self._gang.call(self._leader, "current_load")
        return load

    async def steps(self) -> AsyncIterator[list[Token]]:
        reader = await AsyncReader.open(self._tokens)
        ended = asyncio.ensure_future(self._end())
        decoder = msgspec.msgpack.Decoder(list[Token])
        message: asyncio.Future[bytes] | None = None
        try:
            while True:
                message = asyncio.ensure_future(reader.recv())
                await asyncio.wait({message, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not message.done():
                    raise ended.result()
                yield decoder.decode(message.result())
        finally:
            ended.cancel()
            if message is not None:
                message.cancel()  # cancelled here, we may leave it before it has begun: not on a closed socket
            reader.close()

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
