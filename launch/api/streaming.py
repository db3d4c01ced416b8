"""Server-sent events, and what to do when whoever listened has left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import ShardwiseError
from launch.api.errors import ApiError, api_error
from orchestrator.answer import Answers, Mailbox, Update

CLIENT_LEFT = 499  # nginx's; nobody sees it
RAW_SEND = "raw_send"  # in a request's state: the server's own `send`
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
        """To be made in the turn of the loop in which the answers were asked for."""
        super().__init__(status_code=200, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._answers, self._events, self._mailbox = answers, events, Mailbox()
        for number, one in enumerate(answers):
            one.listen(self._mailbox, number)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = watched(receive, self._answers)
        # In a task of its own: a token else wakes every layer of the application between here and the socket.
        telling = asyncio.create_task(self._tell(scope, receive, send))
        try:
            await telling
        finally:
            telling.cancel()
            watch.cancel()
            for one in self._answers:
                one.drop()

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        mailbox, update = self._mailbox, self._events.update
        is_begun, last = False, b""
        try:
            while (said := mailbox.take()) or mailbox.senders:
                if not said:
                    await mailbox.more()
                    continue
                if not is_begun:
                    is_begun = True
                    start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                    await send(start)
                    send = scope["state"].get(
                        RAW_SEND, send
                    )  # once begun, nothing on the way has a say in it
                if body := b"".join([update(number, one) for number, one in said]):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            if error := next((one.error for one in self._answers if one.error is not None), None):
                raise error
            last = self._events.end()
        except ShardwiseError as error:
            if not is_begun:
                await api_error(error).response()(scope, receive, send)
                return
            last = b"data: " + api_error(error).body + b"\n\n"
        await send({"type": "http.response.body", "body": last + DONE, "more_body": False})


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
