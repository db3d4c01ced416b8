"""Server-sent events, and what to do when whoever listened has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import ShardwiseError
from launch.api.errors import ApiError, api_error
from orchestrator.answer import Answers, Update

CLIENT_LEFT = 499  # nginx's; nobody sees it
DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class Events(Protocol):
    """What a kind of request says as its tokens come, each as a whole event."""

    def update(self, asked: int, update: Update) -> bytes:
        """`asked`: which of the answers' requests it belongs to."""

    def end(self) -> bytes: ...


class EventStream(Response):
    """Begins with the first token: what fails before it has a status of its own."""

    def __init__(self, answers: Sequence[Answers], events: Events, headers: dict[str, str]) -> None:
        super().__init__(status_code=200, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._answers, self._events = answers, events
        self._updates = merged([one.stream() for one in answers])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = watched(receive, self._answers)
        try:
            await self._send(scope, receive, send)
        finally:
            watch.cancel()
            for one in self._answers:
                one.drop()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            said = await anext(self._updates, None)
        except ShardwiseError as error:
            await api_error(error).response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        update, last = self._events.update, b""
        try:
            while said is not None:
                asked, updates = said
                body = b"".join([update(asked, one) for one in updates])
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                said = await anext(self._updates, None)
            last = self._events.end()
        except ShardwiseError as error:
            last = b"data: " + api_error(error).body + b"\n\n"
        await send({"type": "http.response.body", "body": last + DONE, "more_body": False})


async def merged(
    streams: Sequence[AsyncIterator[list[Update]]],
) -> AsyncIterator[tuple[int, list[Update]]]:
    """Several requests' updates as one stream, whichever comes first, each with its request's number."""
    if len(streams) == 1:
        async for updates in streams[0]:
            yield 0, updates
        return
    waits = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
    try:
        while waits:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                i, found = waits.pop(wait), wait.result()
                if found is not None:
                    yield i, found
                    waits[asyncio.ensure_future(anext(streams[i], None))] = i
    finally:
        for wait in waits:
            wait.cancel()


def watched(receive: Receive, answers: Sequence[Answers]) -> asyncio.Task[None]:
    """Drops the answers when the client leaves. To be cancelled once they are given."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for one in answers:
            one.drop()

    return asyncio.create_task(watch())


async def unless_gone(request: Request, answers: Sequence[Answers], work: Callable[[], Awaitable[T]]) -> T:
    """The work's result, unless the client leaves."""
    watch = watched(request.receive, answers)
    try:
        return await work()
    except asyncio.CancelledError:
        if not watch.done():
            raise
        raise ApiError(CLIENT_LEFT, "the client left") from None
    finally:
        watch.cancel()
        for one in answers:
            one.drop()
