"""Admits requests, keeps them until a replica has room, gathers their tokens, and hands back finished answers.

It knows replicas by their seam alone: a fake one drives it in tests. One asyncio loop, no thread.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence

import msgspec

from cluster.errors import BadRequest, DeadlineExceeded, Draining, GangDied, Overloaded, ShardwiseError
from orchestrator.admission import FairQueue, QueueLimits
from orchestrator.answer import Answers, Ongoing, OnUpdate, Terms, Update
from orchestrator.lane import Lane
from orchestrator.meter import Meter
from orchestrator.replica import Replica
from orchestrator.request import (
    Completion,
    FinishReason,
    Grammar,
    Request,
    SamplingParams,
    Token,
    check_tokens,
)
from orchestrator.router import choose, has_room
from orchestrator.scheduler import Load, SchedulerConfig, check_length
from orchestrator.text import AnswerText, Text

OnText = Callable[[str], None]

_NO_TERMS = Terms()
_NO_LIMITS = QueueLimits()
_RETRY_S = (1.0, 60.0)  # the least and the most that a client is told to wait


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
        queue: QueueLimits = _NO_LIMITS,
    ) -> None:
        """`seed` draws the seeds of requests that bring none, in the order in which they come; None: at random."""
        self.limits, self.text, self.vocab = limits, text, vocab
        self.meter = Meter()
        self.is_draining = False
        self._eos_ids, self._queue_limits = frozenset(eos_ids), queue
        self._lanes = [Lane(i, replica, self._refused) for i, replica in enumerate(replicas)]
        self._open: dict[str, Ongoing] = {}
        self._waiting: FairQueue[Ongoing] = FairQueue()
        self._idle = asyncio.Event()
        self._idle.set()
        self._numbers = itertools.count()
        self._seeds = random.Random(seed)
        self._gathering: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Coordinator:
        self._gathering = [asyncio.create_task(self._gather(lane)) for lane in self._lanes]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._gathering:
            task.cancel()
        await asyncio.gather(*self._gathering, return_exceptions=True)

    # -- asked by clients --

    async def complete(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        on_text: OnText | None = None,
        terms: Terms = _NO_TERMS,
    ) -> list[Completion]:
        """`sampling.n` finished answers. `on_text` gets the first one's text as it comes.

        Raises what `ask` does, and GangDied where its replica dies. Cancelling it drops the request from its replica.
        """

        def show(update: Update) -> None:
            if update.choice == 0 and update.text and on_text is not None:
                on_text(update.text)

        asked = self.ask(prompt_token_ids, sampling, terms, on_update=show if on_text is not None else None)
        return await asked.all()

    def ask(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        terms: Terms = _NO_TERMS,
        *,
        grammar: Grammar | None = None,
        on_update: OnUpdate | None = None,
    ) -> Answers:
        """Answers on their way. Raises BadRequest where it can never run, Overloaded, Draining, or why all are dead."""
        try:
            requests = self._admit(prompt_token_ids, sampling, grammar, terms)
        except ShardwiseError as error:
            self.meter.refused[type(error).__name__] += 1
            raise
        self.meter.ask(sampling)
        now_s = time.perf_counter()
        answers = Answers(len(requests), self._drop, on_update)
        if terms.timeout_s is not None:
            loop = asyncio.get_running_loop()
            answers.timer = loop.call_later(terms.timeout_s, self._expire, answers, terms.timeout_s)
        for choice, request in enumerate(requests):
            one = Ongoing(request, answers, choice, terms, self._text_of(request), now_s)
            answers.ongoing.append(one)
            self._open[request.id] = one
            self._waiting.push(one)
        self._idle.clear()
        self._dispatch()
        return answers

    def check_open(self) -> None:
        """Raises what `ask` would of any request whatsoever: quick, where there are more than can be looked at."""
        try:
            self._check_open()
            self._check_queue(1, 0)
        except ShardwiseError as error:
            self.meter.refused[type(error).__name__] += 1
            raise

    # -- asked by whoever runs it --

    def drain(self) -> None:
        """Take nothing new; what is here is finished."""
        self.is_draining = True

    async def idle(self) -> None:
        """Until nothing is open."""
        await self._idle.wait()

    @property
    def is_alive(self) -> bool:
        """Whether a replica is left."""
        return any(self.replicas_alive)

    @property
    def replicas_alive(self) -> list[bool]:
        return [lane.error is None for lane in self._lanes]

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @property
    def waiting_requests(self) -> int:
        """Those that no replica has yet."""
        return len(self._waiting)

    async def loads(self, timeout_s: float) -> dict[int, Load]:
        """Of the replicas that live and answer in time."""
        alive = [lane for lane in self._lanes if lane.error is None]
        asked = (asyncio.wait_for(lane.replica.load(), timeout_s) for lane in alive)
        found = await asyncio.gather(*asked, return_exceptions=True)
        return {lane.number: load for lane, load in zip(alive, found, strict=True) if isinstance(load, Load)}

    # -- inside --

    def _admit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        grammar: Grammar | None,
        terms: Terms,
    ) -> list[Request]:
        """The request as its n sequences. Each sampled one has a seed, so that it can be run again."""
        self._check_open()
        ids = list(prompt_token_ids)
        check_tokens(ids, sampling, vocab=self.vocab, has_tokenizer=self.text is not None)
        check_length(len(ids), sampling.max_tokens, self.limits)
        if not terms.is_batch:
            self._check_queue(sampling.n, len(ids))
        stop_ids = frozenset(sampling.stop_token_ids)
        if grammar is not None or not sampling.ignore_eos:  # a grammar ends with eos and allows nothing else
            stop_ids |= self._eos_ids
        seed = sampling.seed if sampling.seed is not None else self._seeds.getrandbits(62)
        return [
            Request(
                id=str(next(self._numbers)),
                prompt_token_ids=ids,
                sampling=msgspec.structs.replace(
                    sampling, seed=None if sampling.is_greedy else (seed + i) % 2**63, n=1
                ),
                stop_ids=stop_ids,
                grammar=grammar,
            )
            for i in range(sampling.n)
        ]

    def _check_open(self) -> None:
        if self.is_draining:
            raise Draining("the server is shutting down; ask another, or this one once it is back")
        if not self.is_alive:
            raise next(lane.error for lane in self._lanes if lane.error is not None)

    def _check_queue(self, requests: int, prompt_tokens: int) -> None:
        """One that finds nobody waiting is taken, however long it is. Batches bound themselves."""
        waiting, limits = self._waiting, self._queue_limits
        if not waiting.live:
            return
        asked = (
            ("requests", waiting.live, requests, limits.requests),
            ("prompt tokens", waiting.live_tokens, requests * prompt_tokens, limits.tokens),
        )
        for what, have, new, most in asked:
            if most is not None and have + new > most:
                least_s, most_s = _RETRY_S
                estimate_s = self.meter.seconds_for(len(waiting), time.perf_counter()) or least_s
                raise Overloaded(
                    f"the queue is full: {have} {what} wait, {new} more would pass {most}; try again later",
                    min(max(estimate_s, least_s), most_s),
                )

    def _text_of(self, request: Request) -> AnswerText | None:
        return None if self.text is None else AnswerText.of(self.text, request.sampling)

    def _dispatch(self) -> None:
        """Give those whose turn it is to replicas that have room."""
        seqs, tokens = self.limits.max_num_seqs, self.limits.max_num_batched_tokens
        while len(self._waiting):
            is_batch = self._waiting.next_is_batch
            loads = (lane.outstanding for lane in self._lanes if lane.error is None)
            rooms = [load for load in loads if has_room(load, seqs, tokens, is_batch=is_batch)]
            if not rooms:
                return
            one, lane = self._waiting.pop(), self._lanes[choose(rooms)]
            one.replica, one.given_s = lane.number, time.perf_counter()
            lane.give(one.prompt_tokens, one.tokens_left)
            lane.submit(one.request)

    async def _gather(self, lane: Lane) -> None:
        """One replica's tokens, for as long as it lives; its death fails what it was doing."""
        try:
            async for tokens in lane.replica.steps():
                now_s = time.perf_counter()
                self.meter.step(lane.number, len(tokens))
                for token in tokens:
                    self._take(lane, token, now_s)
                self._dispatch()
        except ShardwiseError as error:
            self._bury(lane, error)
        except Exception as error:  # ours to mend, but nobody may wait for ever because of it
            told = f"replica {lane.number} cannot be read: {type(error).__name__}: {error}"
            self._bury(lane, GangDied(told))
            raise

    def _take(self, lane: Lane, token: Token, now_s: float) -> None:
        one = self._open.get(token.request_id)
        if one is None:  # finished by a stop string, or dropped
            return
        if token.finish_reason is FinishReason.ABORT:
            told = "the answer's grammar allows no token here, or cannot be compiled; change it"
            self._fail(one.answers, BadRequest(told))
            return
        if one.token_ids:
            self.meter.gap_s.observe(now_s - one.last_token_s)
        else:
            self._begin(lane, one, now_s)
        one.last_token_s = now_s
        lane.tokens -= 1
        one.token_ids.append(token.token_id)
        if token.logprobs is not None:
            one.logprobs.append(token.logprobs)
        new, reason = "", token.finish_reason
        if one.text is not None:
            new = one.text.push(token.token_id) if reason is not FinishReason.STOP else ""
            if one.text.stopped and reason is None:
                reason = FinishReason.STOP
                lane.abort(token.request_id)
            if reason is not None:
                new += one.text.finish()
                reason = FinishReason.STOP if one.text.stopped else reason
        one.answers.say(Update(one.choice, token.token_id, new, token.logprobs, reason))
        if reason is not None:
            self._finish(one, reason, now_s)

    def _begin(self, lane: Lane, one: Ongoing, now_s: float) -> None:
        one.first_token_s = now_s
        lane.begin(one.prompt_tokens)
        self.meter.first_token(one.prompt_tokens, one.given_s - one.asked_s, now_s - one.asked_s)

    def _finish(self, one: Ongoing, reason: FinishReason, now_s: float) -> None:
        self._forget(one)
        done = one.completion(reason, now_s)
        self.meter.finish(reason, done.prompt_tokens, len(done.token_ids), done.ttft_s, done.latency_s, now_s)
        one.answers.finish(one.choice, done)

    def _forget(self, one: Ongoing) -> None:
        """Out of every account."""
        del self._open[one.request.id]
        if one.replica < 0:
            self._waiting.discard(one)
        else:
            is_begun = bool(one.token_ids)
            self._lanes[one.replica].end(one.prompt_tokens, one.tokens_left, is_begun=is_begun)
            self._waiting.charge(one.client, len(one.token_ids))
        if not self._open:
            self._idle.set()

    def _drop(self, answers: Answers) -> None:
        """Nobody wants the rest of these."""
        now_s = time.perf_counter()
        for one in answers.ongoing:
            if one.request.id in self._open:
                self._forget(one)
                if one.replica >= 0:
                    self._lanes[one.replica].abort(one.request.id)
                latency_s = now_s - one.asked_s
                ttft_s = one.first_token_s - one.asked_s if one.token_ids else latency_s
                tokens = len(one.token_ids)
                self.meter.finish(FinishReason.ABORT, one.prompt_tokens, tokens, ttft_s, latency_s, now_s)
        self._dispatch()

    def _fail(self, answers: Answers, error: ShardwiseError) -> None:
        self.meter.failed[type(error).__name__] += 1
        answers.fail(error)
        self._drop(answers)

    def _expire(self, answers: Answers, timeout_s: float) -> None:
        told = f"the request's deadline of {timeout_s:g} s is over and its answer is not; give it more, or ask for less"
        self._fail(answers, DeadlineExceeded(told))

    def _refused(self, requests: Sequence[Request], error: ShardwiseError) -> None:
        for request in requests:
            if (one := self._open.get(request.id)) is not None:
                self._fail(one.answers, error)

    def _bury(self, lane: Lane, error: ShardwiseError) -> None:
        """Its own requests fail; so do those that wait, if it was the last."""
        lane.error = error
        for one in list(self._open.values()):
            is_lost = one.replica == lane.number or (one.replica < 0 and not self.is_alive)
            if is_lost and one.request.id in self._open:  # its siblings may have taken it along
                self._fail(one.answers, error)
