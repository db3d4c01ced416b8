"""A load that never ends: so many requests in flight, each that ends replaced at once, as a load generator keeps them.

In the time from one request's arrival to its end every other slot has seen one prompt, so a request's life is its own
decode steps and everybody's prompts. Prompts join decode steps, which read the weights anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from strategies.cost_memory import Memory
from strategies.cost_offload import pulls
from strategies.cost_ops import Pass
from strategies.cost_steps import Seconds, Served, busy_s, decode_step_s, stage_s
from strategies.plan import Placement
from strategies.spec import Workload

_ROUNDS = 2  # of sequences in decode, which depend on the time that prompts take, which depends on them
_MOST_FIRST = 0.7  # of a request's life that can be before its first token, waiting for room left out
_MOST_BUSY = 0.98  # of a request's life that prompts can take
_FRONT_ROUNDS = 4  # of sequences in the engine where the server in front of it is what holds them up


@dataclass(frozen=True, slots=True)
class _Life:
    """Of a request, with so many in the engine."""

    seconds: float
    first_s: float
    step: Seconds


def steady(place: Placement, replica: int, needs: Sequence[Memory], workload: Workload) -> Served:
    """What one replica's requests see, and its own rate."""
    engine, prompt, output = place.engine, workload.prompt_tokens, workload.output_tokens
    offered = max(1.0, workload.concurrency / place.dims.dp)  # of a replica that has any
    # Sequences grow: on average one holds its prompt and half of its output.
    room = min(need.kv_tokens for need in needs) / (prompt + output / 2)
    most = max(1.0, min(offered, room, engine.max_sequences))
    life = _life(place, replica, most, workload, needs)
    # The server sends tokens out one by one; where the engine is faster, requests wait in front of it.
    front_s = engine.token_out_s * output * place.dims.dp
    live = most
    for _ in range(_FRONT_ROUNDS):
        if live * front_s <= life.seconds and live == most:
            break
        live = min(most, max(1.0, live * (life.seconds / (live * front_s)) ** 0.7))
        life = _life(place, replica, live, workload, needs)
    whole_s = max(life.seconds, live * front_s) * offered / live
    token_s = (life.seconds - life.first_s) / (output - 1) if output > 1 else sum(life.step.values())
    first_s = life.first_s + whole_s - life.seconds
    return Served(first_s, token_s, offered * output / whole_s, life.step)


def _life(place: Placement, replica: int, live: float, workload: Workload, needs: Sequence[Memory]) -> _Life:
    """A request's own decode steps and everybody's prompts."""
    engine, prompt, output = place.engine, workload.prompt_tokens, workload.output_tokens
    busy = min(1.0, workload.concurrency / place.dims.dp)
    context = prompt + output / 2
    # Of prompts, in a step: one, or as many as have to go in each where answers are short.
    tokens = min(max(min(prompt, engine.chunk_tokens), live * prompt / output), engine.chunk_tokens)
    chunks = prompt / tokens
    decoding = live
    for _ in range(_ROUNDS):
        step = decode_step_s(place, replica, decoding, context, busy, needs)
        step_s = sum(step.values())
        prompt_s = chunks * _joining_s(place, replica, decoding, context, tokens, prompt, busy, needs)
        prompt_s += engine.prompt_s * min(1.0, chunks)
        life_s = live * prompt_s + output * step_s
        own_s = prompt_s + step_s + prompts_ahead(engine.burst, live, live * prompt_s / life_s) * prompt_s
        first_s = min(own_s, _MOST_FIRST * life_s)
        decoding = max(1.0, live * (1 - first_s / life_s))
    return _Life(life_s, first_s, step)


def prompts_ahead(burst: float, live: float, busy: float) -> float:
    """That a new request finds waiting, where prompts take the share `busy` of all time: the queue that one which
    comes at random meets, ρ / (1 − ρ), times `burst`; at most everybody else's.
    """
    busy = min(_MOST_BUSY, busy)
    return min(live - 1, burst * busy / (1 - busy))


def _joining_s(
    place: Placement,
    replica: int,
    decoding: float,
    context: float,
    tokens: float,
    prompt: int,
    busy: float,
    needs: Sequence[Memory],
) -> float:
    """What so many tokens of prompts add to a decode step; in a pipeline, to the stage that all wait for."""
    pp = place.dims.pp
    groups = min(pp, max(1, math.floor(decoding))) if place.engine.pipelines else 1
    alone = Pass(decoding / groups, context)
    joined = Pass(
        decoding / groups, context, prompt_tokens=tokens, seen=prompt / 2, prompt_rows=tokens / prompt
    )

    pulled = pulls(place, replica, needs, busy * groups / pp)

    def slowest(work: Pass) -> float:
        parts = [stage_s(place, replica, stage, work, busy * groups / pp) for stage in range(pp)]
        times = [busy_s(place, replica, stage, part, work) for stage, part in enumerate(parts)]
        if not work.prompt_tokens:
            times = [sum(part.values()) for part in parts]
        times = [s if p is None else p.step_s(s) for s, p in zip(times, pulled, strict=True)]
        return max(times) if place.engine.pipelines else sum(times)

    return slowest(joined) - slowest(alone)
