"""Answers on their way: what the coordinator knows of each, and how whoever asked hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from cluster.errors import BadRequest, NotFinite, ShardwiseError
from orchestrator.request import Completion, FinishReason, Request, Token, TokenLogprobs
from orchestrator.step import NOT_FINITE
from orchestrator.supervisor import Record
from orchestrator.text import AnswerText


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a request is taken."""

    client: str = ""  # whose it is: turns are fair between clients
    is_batch: bool = False  # it may wait for all that are not
    timeout_s: float | None = None  # from admission to the last token


@dataclass(frozen=True, slots=True)
class Update:
    """One token of one answer."""

    choice: int
    token_id: int
    text: str  # that it makes certain: often none, sometimes that of several tokens
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None


OnUpdate = Callable[[Update], None]


class Mailbox:
    """Updates for one reader, of one request or of several. It sleeps and wakes once for all that came meanwhile."""

    def __init__(self) -> None:
        self.senders = 0  # requests that are not over; none where one of them failed
        self._ready: list[tuple[int, Update]] = []
        self._awaited: asyncio.Future[None] | None = None

    def take(self) -> list[tuple[int, Update]]:
        """What has come since the last time, each with its request's number."""
        ready, self._ready = self._ready, []
        return ready

    def more(self) -> asyncio.Future[None]:
        """Done once there is more to take, or something has ended."""
        self._awaited = asyncio.get_running_loop().create_future()
        return self._awaited

    def put(self, number: int, update: Update) -> None:
        self._ready.append((number, update))
        self.wake()

    def leave(self, *, failed: bool) -> None:
        """A request is over."""
        self.senders = 0 if failed else max(0, self.senders - 1)
        self.wake()

    def wake(self) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)


class Answers:
    """The answers to one request: all at the end (`await answers.all()`), or as they come (`listen`)."""

    def __init__(self, n: int, drop: Callable[[Answers], None], on_update: OnUpdate | None) -> None:
        """`drop` is called where somebody no longer wants them."""
        self._drop, self._on_update = drop, on_update
        self._finished: list[Completion | None] = [None] * n
        self._left = n
        self.is_over = False
        self.error: ShardwiseError | None = None  # what ended it
        self._all: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        self._mailbox: Mailbox | None = None
        self.timer: asyncio.TimerHandle | None = None  # the deadline's
        self.ongoing: list[Ongoing] = []

    async def all(self) -> list[Completion]:
        """Cancelling it drops the request from its replica. Raises what ended it."""
        try:
            return await self._all
        finally:
            self.drop()

    def listen(self, mailbox: Mailbox, number: int) -> None:
        """Updates go there. To be called in the turn of the loop in which they were asked for."""
        self._mailbox = mailbox
        mailbox.senders += 1
        self._on_update = partial(mailbox.put, number)

    def drop(self) -> None:
        """Nobody wants the rest."""
        if not self.is_over:
            self._all.cancel()
            self._end()
            self._drop(self)

    # -- told by the coordinator --

    def say(self, update: Update) -> None:
        if self._on_update is not None:
            self._on_update(update)

    def finish(self, choice: int, completion: Completion) -> None:
        self._finished[choice] = completion
        self._left -= 1
        if not self._left and not self.is_over:
            if not self._all.done():  # cancelled, and about to be dropped
                self._all.set_result([done for done in self._finished if done is not None])
            self._end()

    def fail(self, error: ShardwiseError) -> None:
        if self.is_over:
            return
        self.error = error
        if not self._all.done():
            self._all.set_exception(error)
            self._all.exception()  # asked here, lest asyncio complain where nobody waits any more
        self._end()

    def _end(self) -> None:
        self.is_over = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self._mailbox is not None:
            self._mailbox.leave(failed=self.error is not None)


@dataclass(slots=True, eq=False)
class Ongoing:
    """One answer that is not finished."""

    request: Request
    answers: Answers
    choice: int
    terms: Terms
    text: AnswerText | None
    asked_s: float
    replica: int = -1  # -1: it waits for one
    given_s: float = 0.0  # when a replica got it
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    resumed_tokens: int = 0  # of the answer, that were there when this replica got it
    record: Record = field(default_factory=Record)

    @property
    def client(self) -> str:
        return self.terms.client

    @property
    def is_batch(self) -> bool:
        return self.terms.is_batch

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def is_begun(self) -> bool:
        """Whether its replica has given a token."""
        return len(self.token_ids) > self.resumed_tokens

    @property
    def prefill_tokens(self) -> int:
        """That its replica computes before the first new one."""
        return self.prompt_tokens + self.resumed_tokens

    @property
    def tokens_left(self) -> int:
        prefill = 0 if self.is_begun else self.prefill_tokens
        return prefill + self.request.sampling.max_tokens - len(self.token_ids)

    def give(self, replica: int, now_s: float) -> Request:
        """It goes to a replica: as it was asked, or from where another one left it."""
        self.replica, self.given_s, self.resumed_tokens = replica, now_s, len(self.token_ids)
        if not self.token_ids:
            return self.request
        return msgspec.structs.replace(self.request, output_token_ids=list(self.token_ids))

    def refusal(self, token: Token) -> ShardwiseError:
        """Why its replica ends it with this instead of a token."""
        if token.token_id != NOT_FINITE:
            return BadRequest("the answer's grammar allows no token here, or cannot be compiled; change it")
        return NotFinite(
            f"the model's logits after {self.prompt_tokens} prompt tokens and {len(self.token_ids)} of the answer are "
            "NaN: its numbers overflowed, or its weights hold such; change the prompt, or serve with a wider --dtype"
        )

    def completion(self, reason: FinishReason, now_s: float) -> Completion:
        return Completion(
            request_id=self.request.id,
            prompt_tokens=self.prompt_tokens,
            token_ids=self.token_ids,
            finish_reason=reason,
            text=self.text.text if self.text is not None else None,
            logprobs=self.logprobs or None,
            ttft_s=self.first_token_s - self.asked_s,
            latency_s=now_s - self.asked_s,
        )
