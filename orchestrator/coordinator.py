"""Admits requests, routes each to a replica, gathers its tokens, and hands back finished answers.

It knows replicas by their seam alone: a fake one drives it in tests. One asyncio loop, no thread.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from cluster.errors import GangDied, ShardwiseError
from orchestrator.replica import Replica
from orchestrator.request import (
    Completion,
    FinishReason,
    Request,
    SamplingParams,
    Token,
    TokenLogprobs,
    check_tokens,
)
from orchestrator.router import Outstanding, choose
from orchestrator.scheduler import SchedulerConfig, check_length
from orchestrator.text import AnswerText, Text

OnText = Callable[[str], None]


@dataclass(slots=True, eq=False)
class _Answer:
    """A request that is not finished."""

    request: Request
    replica: int
    done: asyncio.Future[Completion]
    text: AnswerText | None
    on_text: OnText | None
    submitted_s: float
    first_token_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def tokens_left(self) -> int:
        prompt = 0 if self.token_ids else len(self.request.prompt_token_ids)
        return prompt + self.request.sampling.max_tokens - len(self.token_ids)


class _Outbox:
    """Requests on their way to one replica. Those of one turn of the loop travel in one call.

    256 at once took a call each, a millisecond of the host apiece, while the replica began its first steps half empty.
    """

    def __init__(self, replica: Replica, is_open: Callable[[str], bool]) -> None:
        """`is_open`: whether a request's id is still one that somebody waits for."""
        self._replica, self._is_open = replica, is_open
        self._waiting: list[Request] = []
        self._sending: asyncio.Task[None] | None = None

    async def send(self, request: Request) -> None:
        """Raises what submitting raises, to everybody whose request was in the call."""
        self._waiting.append(request)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
            # Asked here, lest asyncio complain where everybody who waited was cancelled.
            self._sending.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._sending)

    async def _send(self) -> None:
        await asyncio.sleep(0)  # whoever else asks in this turn
        requests, self._waiting, self._sending = self._waiting, [], None
        if wanted := [request for request in requests if self._is_open(request.id)]:
            await self._replica.submit(wanted)


class Coordinator:
    """`async with Coordinator(…) as coordinator: await coordinator.complete(…)`."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        limits: SchedulerConfig,
        *,
        vocab: int,
        eos_ids: Sequence[int] = (),
        text: Text | None = None,
        seed: int | None = None,
    ) -> None:
        """`seed` draws the seeds of requests that bring none, in the order in which they come; None: at random."""
        self._replicas = list(replicas)
        self._limits, self._vocab, self._eos_ids, self._text = limits, vocab, frozenset(eos_ids), text
        self._open: dict[str, _Answer] = {}
        self._dead: dict[int, ShardwiseError] = {}  # replica -> why
        self._numbers = itertools.count()
        self._seeds = random.Random(seed)
        self._outboxes = [_Outbox(replica, self._open.__contains__) for replica in self._replicas]
        self._gathering: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Coordinator:
        self._gathering = [asyncio.create_task(self._gather(i)) for i in range(len(self._replicas))]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._gathering:
            task.cancel()
        await asyncio.gather(*self._gathering, return_exceptions=True)

    async def complete(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, on_text: OnText | None = None
    ) -> list[Completion]:
        """`sampling.n` finished answers. `on_text` gets the first one's text as it comes.

        Raises BadRequest where the request can never run, GangDied where its replica dies. Cancelling it drops the
        request from its replica.
        """
        requests = self._admit(prompt_token_ids, sampling)
        answers = [self._route(r, on_text if i == 0 else None) for i, r in enumerate(requests)]
        try:
            await asyncio.gather(*(self._outboxes[a.replica].send(a.request) for a in answers))
            return await asyncio.gather(*(answer.done for answer in answers))
        finally:
            for answer in answers:
                if self._open.pop(answer.request.id, None) is not None:
                    with suppress(GangDied):  # then it is dropped already
                        await self._replicas[answer.replica].abort([answer.request.id])

    def _admit(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> list[Request]:
        """The request as its n sequences, or BadRequest. Each sampled one has a seed, so that it can be run again."""
        ids = list(prompt_token_ids)
        check_tokens(ids, sampling, vocab=self._vocab, has_tokenizer=self._text is not None)
        check_length(len(ids), sampling.max_tokens, self._limits)
        stop_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else self._eos_ids
        )
        seed = sampling.seed if sampling.seed is not None else self._seeds.getrandbits(62)
        return [
            Request(
                id=str(next(self._numbers)),
                prompt_token_ids=ids,
                sampling=msgspec.structs.replace(
                    sampling, seed=None if sampling.is_greedy else (seed + i) % 2**63, n=1
                ),
                stop_ids=stop_ids,
            )
            for i in range(sampling.n)
        ]

    def _route(self, request: Request, on_text: OnText | None) -> _Answer:
        replica = self._choose()
        text = None
        if self._text is not None:
            text = AnswerText(self._text, request.sampling.stop, request.sampling.min_tokens)
        done: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        answer = _Answer(request, replica, done, text, on_text, time.perf_counter())
        self._open[request.id] = answer
        return answer

    def _choose(self) -> int:
        if len(self._dead) == len(self._replicas):
            raise next(iter(self._dead.values()))
        loads = {i: Outstanding(i, 0, 0) for i in range(len(self._replicas)) if i not in self._dead}
        for answer in self._open.values():
            if answer.replica in loads:
                known = loads[answer.replica]
                loads[answer.replica] = Outstanding(
                    known.replica, known.requests + 1, known.tokens + answer.tokens_left
                )
        return choose(list(loads.values()))

    async def _gather(self, replica: int) -> None:
        """One replica's tokens, for as long as it lives; its death fails what it was doing."""
        try:
            async for tokens in self._replicas[replica].steps():
                for token in tokens:
                    await self._take(token)
        except ShardwiseError as error:
            self._fail(replica, error)
        except Exception as error:  # ours to mend, but nobody may wait for ever because of it
            self._fail(
                replica, GangDied(f"replica {replica} cannot be read: {type(error).__name__}: {error}")
            )
            raise

    def _fail(self, replica: int, error: ShardwiseError) -> None:
        self._dead[replica] = error
        for answer in list(self._open.values()):
            if answer.replica == replica and not answer.done.done():
                del self._open[answer.request.id]
                answer.done.set_exception(error)
                answer.done.exception()  # asked here, lest asyncio complain: submitting may have failed first

    async def _take(self, token: Token) -> None:
        answer = self._open.get(token.request_id)
        if answer is None:  # finished by a stop string, or dropped
            return
        if not answer.token_ids:
            answer.first_token_s = time.perf_counter()
        answer.token_ids.append(token.token_id)
        if token.logprobs is not None:
            answer.logprobs.append(token.logprobs)
        reason = token.finish_reason
        if answer.text is not None:
            is_stop_token = reason is FinishReason.STOP
            self._show(answer, "" if is_stop_token else answer.text.push(token.token_id))
            if answer.text.stopped and reason is None:
                reason = FinishReason.STOP
                await self._replicas[answer.replica].abort([token.request_id])
        if reason is not None:
            self._finish(answer, reason)

    def _show(self, answer: _Answer, new_text: str) -> None:
        if new_text and answer.on_text is not None:
            answer.on_text(new_text)

    def _finish(self, answer: _Answer, reason: FinishReason) -> None:
        del self._open[answer.request.id]
        if answer.text is not None:
            self._show(answer, answer.text.finish())
            if answer.text.stopped:
                reason = FinishReason.STOP
        if answer.done.done():  # cancelled meanwhile
            return
        answer.done.set_result(
            Completion(
                request_id=answer.request.id,
                prompt_tokens=len(answer.request.prompt_token_ids),
                token_ids=answer.token_ids,
                finish_reason=reason,
                text=answer.text.text if answer.text is not None else None,
                logprobs=answer.logprobs or None,
                ttft_s=answer.first_token_s - answer.submitted_s,
                latency_s=time.perf_counter() - answer.submitted_s,
            )
        )
