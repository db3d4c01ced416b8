"""The scheduler itself, driven by the cost model's step times in place of GPUs: who waits how long at a request rate.

A discrete-event simulation of one replica's leader (worker.lead): as many steps in flight as the pipeline wants, stages
that work one after another, tokens known when the last stage is through. No torch, no clock: an hour takes seconds.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.request import Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import Row, StepResult
from strategies.cost_memory import memories
from strategies.cost_ops import Pass
from strategies.cost_steps import pass_s
from strategies.plan import Placement
from strategies.spec import Workload

StepTimes = Callable[[Pass], Sequence[float]]
"""Seconds of a step in each pipeline stage."""

_ROUND_CONTEXT = 64  # tokens; steps that differ by less are priced once
_ROUND_PROMPT = 32
_ROUND_ROWS = 32  # sequences, above which eighths of them do not matter


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """Of one request, in seconds from its arrival."""

    ttft_s: float
    latency_s: float
    output_tokens: int

    @property
    def tpot_s(self) -> float:
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Simulated:
    answered: tuple[Answered, ...]  # by arrival
    seconds: float  # from the first arrival to the last token
    steps: int
    preemptions: int

    @property
    def output_tokens_per_s(self) -> float:
        return sum(a.output_tokens for a in self.answered) / self.seconds

    def ttft_s(self, percent: float) -> float:
        return percentile([a.ttft_s for a in self.answered], percent)

    def tpot_s(self, percent: float) -> float:
        return percentile([a.tpot_s for a in self.answered], percent)


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest by a straight line."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    below, above = math.floor(at), math.ceil(at)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def poisson(count: int, per_s: float, prompt_tokens: int, output_tokens: int, seed: int = 0) -> list[Arrival]:
    rnd, at_s, found = random.Random(seed), 0.0, []
    for _ in range(count):
        found.append(Arrival(at_s, prompt_tokens, output_tokens))
        at_s += rnd.expovariate(per_s)
    return found


def simulate(config: SchedulerConfig, arrivals: Sequence[Arrival], step_s: StepTimes) -> Simulated:
    """One replica; `arrivals` in the order of their times. Raises BadRequest for one that can never run."""
    return _Replica(config, arrivals, step_s).run()


class _Replica:
    def __init__(self, config: SchedulerConfig, arrivals: Sequence[Arrival], step_s: StepTimes) -> None:
        self._config, self._step_s = config, step_s
        self._scheduler = Scheduler(config)
        self._arrivals = arrivals
        self._next = 0  # of the arrivals
        self._now_s = arrivals[0].at_s if arrivals else 0.0
        self._free_s = [self._now_s] * config.groups  # when each stage is through with what it has
        self._sampled_s: dict[int, float] = {}  # by slot: when its newest token is there to go on from
        self._in_flight: deque[tuple[int, int, float]] = (
            deque()
        )  # step, tokens that it samples, when it is through
        self._first_s: dict[str, float] = {}
        self._last_s: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._steps = 0

    def run(self) -> Simulated:
        begun_s = self._now_s
        while self._next < len(self._arrivals) or self._scheduler.has_work:
            self._admit()
            depth = self._config.depth
            step = self._scheduler.schedule() if len(self._in_flight) < depth else None
            if step is not None:
                self._launch(step.id, step.rows)
            if self._in_flight and (step is None or len(self._in_flight) == depth):
                self._finish()
            elif step is None:
                self._now_s = self._arrivals[self._next].at_s  # nothing to do until then
        answered = tuple(self._answered(i, arrival) for i, arrival in enumerate(self._arrivals))
        return Simulated(
            answered, self._now_s - begun_s or 1e-12, self._steps, self._scheduler.load.preemptions
        )

    def _admit(self) -> None:
        while self._next < len(self._arrivals) and self._arrivals[self._next].at_s <= self._now_s:
            arrival = self._arrivals[self._next]
            sampling = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
            ids = [0] * arrival.prompt_tokens
            self._scheduler.add(Request(id=str(self._next), prompt_token_ids=ids, sampling=sampling))
            self._next += 1

    def _launch(self, step_id: int, rows: Sequence[Row]) -> None:
        """Stage after stage; a stage begins when it is free and the one before is through.

        The first waits for the tokens that the step goes on from: they may still be on their way through the stages.
        """
        self._steps += 1
        at_s = max([self._now_s, *(self._sampled_s.get(row.slot, 0.0) for row in rows if row.count == 1)])
        for stage, seconds in enumerate(self._step_s(pass_of(rows))):
            at_s = max(at_s, self._free_s[stage]) + seconds
            self._free_s[stage] = at_s
        for row in rows:
            if row.samples:
                self._sampled_s[row.slot] = at_s
        self._in_flight.append((step_id, sum(row.samples for row in rows), at_s))

    def _finish(self) -> None:
        step_id, sampled, at_s = self._in_flight.popleft()
        self._now_s = max(self._now_s, at_s)
        for token in self._scheduler.update(StepResult(step_id, [0] * sampled)):
            self._first_s.setdefault(token.request_id, self._now_s)
            self._last_s[token.request_id] = self._now_s
            self._tokens[token.request_id] = self._tokens.get(token.request_id, 0) + 1

    def _answered(self, index: int, arrival: Arrival) -> Answered:
        name = str(index)
        return Answered(
            self._first_s[name] - arrival.at_s, self._last_s[name] - arrival.at_s, self._tokens[name]
        )


def pass_of(rows: Sequence[Row]) -> Pass:
    """What a step is for the cost model: rows of one token decode, longer ones are prompts."""
    decodes = [row for row in rows if row.count == 1]
    prompts = [row for row in rows if row.count > 1]
    tokens = sum(row.count for row in prompts)
    seen = sum(row.count * (row.start + row.count / 2) for row in prompts)
    return Pass(
        decodes=len(decodes),
        context=sum(row.start + 1 for row in decodes) / len(decodes) if decodes else 0.0,
        prompt_tokens=tokens,
        seen=seen / tokens if tokens else 0.0,
        prompt_rows=sum(row.samples for row in prompts),
    )


# --- by the cost model --------------------------------------------------------------------------------------


def priced(place: Placement, replica: int = 0) -> StepTimes:
    """The cost model's seconds; steps that are nearly alike are priced once."""
    known: dict[tuple[float, ...], tuple[float, ...]] = {}
    needs = memories(place, Workload(concurrency=place.dims.dp)) if place.offload else ()

    def step_s(work: Pass) -> Sequence[float]:
        key = rounded(work)
        if key not in known:
            known[key] = pass_s(place, replica, Pass(*key), needs)
        return known[key]

    return step_s


def rounded(work: Pass) -> tuple[float, ...]:
    """Few distinct steps: counts up to 32 as they are, more of them to an eighth; lengths to a block of tokens."""
    decodes = work.decodes
    if decodes > _ROUND_ROWS:
        unit = 2 ** (int(decodes).bit_length() - 4)
        decodes = unit * round(decodes / unit)

    def nearest(value: float, unit: int) -> float:
        return unit * math.ceil(value / unit) if value > 0 else 0.0

    return (
        decodes,
        nearest(work.context, _ROUND_CONTEXT),
        work.prompt_tokens
        if work.prompt_tokens < _ROUND_PROMPT
        else nearest(work.prompt_tokens, _ROUND_PROMPT),
        nearest(work.seen, _ROUND_CONTEXT),
        work.prompt_rows,
    )


@dataclass(frozen=True, slots=True)
class Queueing:
    """What users see of a layout at a request rate. Seconds."""

    requests_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    output_tokens_per_s: float

    def keeps(self, most_ttft_s: float | None, most_tpot_s: float | None) -> bool:
        """In 99 of 100 answers."""
        waits = most_ttft_s is not None and self.ttft_p99_s > most_ttft_s
        crawls = most_tpot_s is not None and self.tpot_p99_s > most_tpot_s
        return not waits and not crawls


def config_of(place: Placement, kv_tokens: int, length: int, block_size: int = 16) -> SchedulerConfig:
    """The scheduler's as a deployment sets it (launch/start.py); prompts that share nothing."""
    return SchedulerConfig(
        num_blocks=max(kv_tokens // block_size, -(-length // block_size)),
        block_size=block_size,
        max_num_seqs=place.engine.max_sequences,
        max_num_batched_tokens=place.engine.chunk_tokens,
        max_model_len=length + 1,
        groups=place.dims.pp,
        prefix_caching=False,
        run_ahead=place.topology.devices[0].kind != "cpu",
    )


def queueing(
    place: Placement,
    kv_tokens: int,
    prompt_tokens: int,
    output_tokens: int,
    requests_per_s: float,
    *,
    requests: int,
    seed: int = 0,
) -> Queueing:
    """Poisson arrivals over all replicas, each taking its turn; the replicas are taken for alike."""
    dims, first_s = place.dims, place.engine.first_s
    config = config_of(place, kv_tokens, prompt_tokens + output_tokens)
    every = poisson(requests, requests_per_s, prompt_tokens, output_tokens, seed)
    step_s = priced(place)
    pairs: list[tuple[Arrival, Answered]] = []
    for replica in range(min(dims.dp, len(every))):
        own = every[replica :: dims.dp]
        pairs += zip(own, simulate(config, own, step_s).answered, strict=True)
    answered = [a for _, a in pairs]
    seconds = max(arrival.at_s + a.latency_s for arrival, a in pairs)
    return Queueing(
        requests_per_s=requests_per_s,
        ttft_p50_s=first_s + percentile([a.ttft_s for a in answered], 50),
        ttft_p99_s=first_s + percentile([a.ttft_s for a in answered], 99),
        tpot_p50_s=percentile([a.tpot_s for a in answered], 50),
        tpot_p99_s=percentile([a.tpot_s for a in answered], 99),
        output_tokens_per_s=sum(a.output_tokens for a in answered) / seconds,
    )


def highest_rate(
    at: Callable[[float], Queueing],
    most_ttft_s: float | None,
    most_tpot_s: float | None,
    ceiling_per_s: float,
    *,
    tries: int = 6,
) -> Queueing | None:
    """The highest rate up to a ceiling whose answers keep the limits, by halving; None where not even a slow one does.

    `at` simulates a rate.
    """
    low: Queueing | None = None
    high_per_s, rate = ceiling_per_s, 0.6 * ceiling_per_s
    for _ in range(tries):
        made = at(rate)
        if made.keeps(most_ttft_s, most_tpot_s):
            low = made
        else:
            high_per_s = rate
        rate = (high_per_s + (low.requests_per_s if low else 0.0)) / 2
    return low
