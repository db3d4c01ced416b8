"""The one narrow seam between the coordinator and what generates tokens: submit, abort, steps, load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec

from cluster.channel import Address, AsyncReader
from cluster.errors import GangDied
from cluster.gang import Gang
from orchestrator.request import Request, Token
from orchestrator.scheduler import Load


class Replica(Protocol):
    async def submit(self, requests: Sequence[Request]) -> None:
        """Take requests over; their tokens come out of `steps`."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; tokens already on their way may still come."""

    def steps(self) -> AsyncIterator[list[Token]]:
        """Tokens, a list a step, for as long as the replica lives. Raises GangDied when it does not."""

    async def load(self) -> Load: ...


class GangReplica:
    """A gang of workers. Control goes by actor calls to the leader; tokens come by a socket of its own."""

    def __init__(self, gang: Gang, tokens: Address) -> None:
        self._gang = gang
        self._tokens = tokens

    async def submit(self, requests: Sequence[Request]) -> None:
        await self._gang.call(0, "submit", list(requests))

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._gang.call(0, "abort", list(request_ids))

    async def load(self) -> Load:
        load: Load = await self._gang.call(0, "current_load")
        return load

    async def steps(self) -> AsyncIterator[list[Token]]:
        reader = await AsyncReader.open(self._tokens)
        died = asyncio.ensure_future(self._gang.died())
        decoder = msgspec.msgpack.Decoder(list[Token])
        try:
            while True:
                message = asyncio.ensure_future(reader.recv())
                await asyncio.wait({message, died}, return_when=asyncio.FIRST_COMPLETED)
                if died.done():
                    message.cancel()
                    raise GangDied(str(died.result()))
                yield decoder.decode(message.result())
        finally:
            died.cancel()
            reader.close()
