"""Admits requests, keeps them until a replica has room, gathers their tokens, and hands back finished answers.

It knows replicas by their seam alone: a fake one drives it in tests. One asyncio loop, no thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from cluster.errors import (
    AttemptsSpent,
    DeadlineExceeded,
    Draining,
    GangDied,
    ShardwiseError,
)
from orchestrator.admission import QueueLimits
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
from orchestrator.scheduler import Load, SchedulerConfig, check_length
from orchestrator.supervisor import End, Supervisor, spent
from orchestrator.text import AnswerText, Text
from orchestrator.turns import Turns

LOG = logging.getLogger("shardwise")
OnText = Callable[[str], None]

_NO_TERMS = Terms()
_NO_LIMITS = QueueLimits()


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
        supervisor: Supervisor | None = None,
    ) -> None:
        """`seed` draws the seeds of requests that bring none, in the order in which they come; None: at random.

        Without a supervisor, replicas that die stay dead.
        """
        self.limits, self.text, self.vocab = limits, text, vocab
        self.meter = Meter()
        self.is_draining = False
        self._eos_ids = frozenset(eos_ids)
        self._lanes = [Lane(i, replica, self._refused) for i, replica in enumerate(replicas)]
        self._turns = Turns(self._lanes, limits, queue)
        self._open: dict[str, Ongoing] = {}
        self._supervisor = supervisor
        self._outage: asyncio.TimerHandle | None = None  # runs while no replica is left
        self._is_patient = True  # or one has been awaited for too long
        self._idle = asyncio.Event()
        self._idle.set()
        self._numbers = itertools.count()
        self._seeds = random.Random(seed)
        self._tending: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Coordinator:
        self._tending = [asyncio.create_task(self._tend(lane)) for lane in self._lanes]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end_outage()
        tasks = [*self._tending, *(lane.sending for lane in self._lanes if lane.sending is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- asked by clients --

    async def complete(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        on_text: OnText | None = None,
        terms: Terms = _NO_TERMS,
    ) -> list[Completion]:
        """`sampling.n` finished answers. `on_text` gets the first one's text as it comes.

        Raises what `ask` does, AttemptsSpent where it may be what replicas died of, and GangDied where none is left.
        Cancelling it drops the request from its replica.
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
            self._turns.join(one)
        self._idle.clear()
        self._turns.deal()
        return answers

    def check_open(self) -> None:
        """Raises what `ask` would of any request whatsoever: quick, where there are more than can be looked at."""
        try:
            self._check_open()
            self._turns.check(1, 0, self.meter.seconds_for)
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
    def is_lost(self) -> bool:
        """No replica is left, and none is expected."""
        if self.is_alive:
            return False
        supervisor = self._supervisor
        if supervisor is None or not self._is_patient:
            return True
        return not any(supervisor.expects(lane.number) for lane in self._lanes)

    @property
    def replicas_alive(self) -> list[bool]:
        return [lane.error is None for lane in self._lanes]

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @property
    def waiting_requests(self) -> int:
        """Those that no replica has."""
        return len(self._turns)

    @property
    def restarts(self) -> dict[int, int]:
        """How often replicas were started again, by number."""
        return self._supervisor.restarts if self._supervisor is not None else {}

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
            self._turns.check(sampling.n, len(ids), self.meter.seconds_for)
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
        if self.is_lost:
            raise next(lane.error for lane in self._lanes if lane.error is not None)

    def _text_of(self, request: Request) -> AnswerText | None:
        return None if self.text is None else AnswerText.of(self.text, request.sampling)

    async def _tend(self, lane: Lane) -> None:
        """One replica after the other in a lane's place."""
        while True:
            error = await self._gather(lane)
            end = self._bury(lane, error)
            if self._supervisor is None:
                return
            lane.revive(await self._supervisor.again(lane.number, error, end, partial(self._give_up, lane)))
            self._end_outage()
            self._turns.deal()

    async def _gather(self, lane: Lane) -> ShardwiseError:
        """One replica's tokens, for as long as it lives. → what it died of."""
        try:
            async for tokens in lane.replica.steps():
                now_s = time.perf_counter()
                self.meter.step(lane.number, len(tokens))
                for token in tokens:
                    self._take(lane, token, now_s)
                self._turns.deal()
        except ShardwiseError as error:
            return error
        except Exception as error:  # ours to mend, but nobody may wait for ever because of it
            LOG.exception("replica %d cannot be read", lane.number)
            return GangDied(f"replica {lane.number} cannot be read: {type(error).__name__}: {error}")
        return GangDied(f"replica {lane.number} has nothing more to say")

    def _take(self, lane: Lane, token: Token, now_s: float) -> None:
        one = self._open.get(token.request_id)
        if one is None or one.replica != lane.number:  # finished by a stop string, or dropped
            return
        if token.finish_reason is FinishReason.ABORT:
            self._fail(one.answers, one.refusal(token))
            return
        if not one.is_begun:
            lane.begin(one.prefill_tokens)
        if one.token_ids:
            self.meter.gap_s.observe(now_s - one.last_token_s)
        else:
            one.first_token_s = now_s
            self.meter.first_token(one.prompt_tokens, one.given_s - one.asked_s, now_s - one.asked_s)
        one.last_token_s = now_s
        lane.tokens -= 1
        one.token_ids.append(token.token_id)
        if one.record.blamed:
            self._turns.note_token(one)
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

    def _finish(self, one: Ongoing, reason: FinishReason, now_s: float) -> None:
        self._lanes[one.replica].has_served = True
        self._forget(one)
        done = one.completion(reason, now_s)
        self.meter.finish(reason, done.prompt_tokens, len(done.token_ids), done.ttft_s, done.latency_s, now_s)
        one.answers.finish(one.choice, done)

    def _forget(self, one: Ongoing) -> None:
        """Out of every account."""
        del self._open[one.request.id]
        self._turns.leave(one)
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
        self._turns.deal()

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

    def _bury(self, lane: Lane, error: ShardwiseError) -> End:
        """What it was doing goes on elsewhere, or when it is back; what may have killed it twice fails."""
        end = End.SERVED if lane.has_served else End.IN_VAIN
        lost = [one for one in self._open.values() if one.replica == lane.number]
        self._turns.bury(lane, error, lost)
        for one in lost:
            if one.request.id not in self._open:  # its sibling has taken it along
                continue
            if one.record.is_spent:
                end = End.SERVED if lane.has_served else End.EXPLAINED
                self._fail(one.answers, AttemptsSpent(spent(one.record, error)))
            elif not self.is_lost:
                self.meter.replayed += 1
                self._turns.join(one, again=True)
        if not self.is_alive and self._supervisor is not None and self._outage is None:
            loop = asyncio.get_running_loop()
            self._outage = loop.call_later(self._supervisor.policy.patience_s, self._lose_patience)
        self._end_if_lost()
        self._turns.deal()
        return end

    def _give_up(self, lane: Lane, error: GangDied) -> None:
        """Nobody should count on this one; it is still tried now and then."""
        lane.error = error
        self._end_if_lost()

    def _lose_patience(self) -> None:
        self._is_patient = False
        self._end_if_lost()

    def _end_outage(self) -> None:
        self._is_patient = True
        if self._outage is not None:
            self._outage.cancel()
            self._outage = None

    def _end_if_lost(self) -> None:
        """Nobody waits for a replica that nobody expects."""
        if not self.is_lost:
            return
        error = next(lane.error for lane in self._lanes if lane.error is not None)
        for one in list(self._open.values()):
            if one.request.id in self._open:  # its siblings may have taken it along
                self._fail(one.answers, error)
