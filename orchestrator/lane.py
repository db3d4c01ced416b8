"""What goes to one replica: requests and aborts, and the account of what it has not finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from cluster.errors import GangDied, ShardwiseError, WorkerFailed
from orchestrator.replica import Replica
from orchestrator.request import Request
from orchestrator.router import Outstanding

OnRefused = Callable[[Sequence[Request], ShardwiseError], None]


class Lane:
    """Requests of one turn of the loop travel in one call, and so do those that come while a call is under way.

    256 at once took a call each, a millisecond of the host apiece, while the replica began its first steps half empty.
    """

    def __init__(self, number: int, replica: Replica, on_refused: OnRefused) -> None:
        """`on_refused` hears of requests that the replica did not take though it lives."""
        self.number, self.replica, self._on_refused = number, replica, on_refused
        self.error: ShardwiseError | None = None  # why it is dead
        self.has_served = False  # in this life of the replica
        self._clear_account()
        self._new: dict[str, Request] = {}
        self._unwanted: list[str] = []
        self.sending: asyncio.Task[None] | None = None  # while something is on its way

    def die(self, error: ShardwiseError) -> set[str]:
        """Its account is closed. → requests that never left for the replica."""
        self.error = error
        self._clear_account()
        unsent, self._new, self._unwanted = set(self._new), {}, []
        return unsent

    def revive(self, replica: Replica) -> None:
        self.replica, self.error, self.has_served = replica, None, False

    def _clear_account(self) -> None:
        self.requests = self.tokens = self.unstarted = self.unstarted_tokens = 0

    @property
    def outstanding(self) -> Outstanding:
        return Outstanding(self.number, self.requests, self.tokens, self.unstarted, self.unstarted_tokens)

    # -- the account --

    def give(self, prompt_tokens: int, tokens_left: int) -> None:
        self.requests += 1
        self.tokens += tokens_left
        self.unstarted += 1
        self.unstarted_tokens += prompt_tokens

    def begin(self, prompt_tokens: int) -> None:
        """Its first token is here."""
        self.tokens -= prompt_tokens
        self._started(prompt_tokens)

    def end(self, prompt_tokens: int, tokens_left: int, *, is_begun: bool) -> None:
        self.requests -= 1
        self.tokens -= tokens_left
        if not is_begun:
            self._started(prompt_tokens)

    def _started(self, prompt_tokens: int) -> None:
        self.unstarted -= 1
        self.unstarted_tokens -= prompt_tokens

    # -- the wire --

    def submit(self, request: Request) -> None:
        self._new[request.id] = request
        self._wake()

    def abort(self, request_id: str) -> None:
        """One that has not left yet stays here."""
        if self._new.pop(request_id, None) is None and self.error is None:
            self._unwanted.append(request_id)
            self._wake()

    def _wake(self) -> None:
        if self.sending is None:
            self.sending = asyncio.create_task(self._send())

    async def _send(self) -> None:
        await asyncio.sleep(0)  # whoever else asks in this turn
        while self._new or self._unwanted:
            await self._send_new()
            await self._send_unwanted()
        self.sending = None

    async def _send_new(self) -> None:
        new, self._new = list(self._new.values()), {}
        if not new:
            return
        try:
            await self.replica.submit(new)
        except GangDied:  # its stream says so too, and what becomes of them
            return
        except ShardwiseError as error:
            self._on_refused(new, error)
        except Exception as error:  # ours to mend, but nobody may wait for ever because of it
            self._on_refused(new, WorkerFailed(f"replica {self.number} takes no requests: {error!r}"))

    async def _send_unwanted(self) -> None:
        unwanted, self._unwanted = self._unwanted, []
        if not unwanted:
            return
        try:
            await self.replica.abort(unwanted)
        except Exception:  # it is dead, and its stream says so: then they are dropped already
            return
