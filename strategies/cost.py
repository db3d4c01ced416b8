"""The performance model: what a layout's users see of the steps that it takes on its devices.

A workload is so many requests that arrive together, or so many in flight all the time (steady.py). cost_steps.py has
passes and steps, cost_ops.py their operations, cost_links.py collectives, cost_memory.py what a rank holds.

Units: bytes, seconds, FLOP/s. Sources: Pope et al. 2211.05102 for the roofline; engines.yaml for its constants.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from strategies.cost_links import ByIdentity, slowest_link
from strategies.cost_memory import Memory, memories
from strategies.cost_ops import compute_dtype, full_rates, mean_window
from strategies.cost_steps import (
    Seconds,
    Served,
    decode_step_s,
    prefill_s,
    prefill_steps,
    signature,
    stage_links,
)
from strategies.plan import Estimate, ParallelDims, Placement
from strategies.spec import BYTES_PER_ELEMENT, Objective, Workload
from strategies.steady import steady


def estimate(place: Placement, workload: Workload) -> Estimate:
    """What a layout that fits will do with a workload.

    TTFT and TPOT are means over requests, as vLLM defines them: a request that waits for a place in the cache
    waits in its TTFT, and the prefill of later prompts delays the tokens of earlier ones.
    """
    needs = memories(place, workload)
    kv_tokens = min(need.kv_tokens for need in needs)
    length = workload.prompt_tokens + workload.output_tokens
    share = math.ceil(workload.concurrency / place.dims.dp)  # sequences of the fullest replica
    live = max(1, min(share, kv_tokens // length, place.engine.max_sequences))
    serve = steady if workload.steady else together
    runs = [serve(place, replica, needs, workload) for replica in unlike_replicas(place)]
    slowest = max(runs, key=lambda r: r.first_s + workload.output_tokens * r.token_s)
    # As many replicas work as there are requests for; together they do what the slowest allows.
    at_work = min(place.dims.dp, workload.concurrency) if workload.steady else 1
    rate = at_work * slowest.tokens_per_s
    fullest = max(needs, key=lambda need: need.fixed + live * length * need.kv_per_token)
    parts = {
        "weights": fullest.weights,
        "kv": live * length * fullest.kv_per_token,
        "activations": fullest.activations,
        "runtime": fullest.runtime,
    }
    return Estimate(
        ttft_s=place.engine.first_s + slowest.first_s,
        tpot_s=slowest.token_s,
        output_tokens_per_s=rate,
        memory_bytes_per_device=sum(parts.values()),
        kv_tokens=kv_tokens,
        share_of_limit=rate / limit_tokens_per_s(place, workload),
        usd_per_million_tokens=_usd_per_million(place, rate),
        breakdown=slowest.step,
        memory_parts=parts,
    )


def unlike_replicas(place: Placement) -> list[int]:
    """One replica of each kind: those on like devices over like links do the same."""
    kinds: dict[tuple[object, ...], int] = {}
    for replica in range(place.dims.dp):
        size = place.dims.replica_size
        own = place.devices[replica * size : (replica + 1) * size]
        key = ByIdentity(place.topology)
        links = [slowest_link(key, place.stage(replica, s)) for s in range(place.dims.pp)]
        if place.dims.pp > 1:
            links += stage_links(place, replica)
        rates = tuple((link.kind, link.bytes_per_s) for link in links if link is not None)
        kinds.setdefault((*(signature(place.topology.devices[i]) for i in own), rates), replica)
    return list(kinds.values())


def score(made: Estimate, dims: ParallelDims, workload: Workload) -> float:
    """What the objective minimises: seconds a request, seconds a token, or dollars a token.

    Device-seconds a token where prices are unknown.
    """
    if workload.objective is Objective.LATENCY:
        return made.ttft_s + (workload.output_tokens - 1) * made.tpot_s
    if workload.objective is Objective.THROUGHPUT:
        return 1 / made.output_tokens_per_s
    if made.usd_per_million_tokens is not None:
        return made.usd_per_million_tokens
    return dims.world_size / made.output_tokens_per_s


def together(place: Placement, replica: int, needs: Sequence[Memory], workload: Workload) -> Served:
    """Requests that arrive together: all prompts, then all tokens; those that do not fit wait for the others' end.

    The rate is that of all replicas, this one being the slowest.
    """
    prompt, later = workload.prompt_tokens, workload.output_tokens - 1
    share = math.ceil(workload.concurrency / place.dims.dp)
    kv_tokens = min(need.kv_tokens for need in needs)
    most = min(share, place.engine.max_sequences)
    live = max(1, min(most, kv_tokens // (prompt + workload.output_tokens)))
    # Prompts are read as long as there is room for prompts; who is in the way of those that grow is read again later.
    read = max(live, min(most, kv_tokens // prompt)) if not workload.ragged else live
    busy = min(1.0, workload.concurrency / place.dims.dp)
    context = prompt + workload.output_tokens / 2

    def turn(sequences: int, prompts: int, later: int) -> _Turn:
        step = decode_step_s(place, replica, sequences, context, busy, needs)
        last_s, first_s = prefill_s(place, replica, prompts, prompt, busy, needs)
        # While the others' prompts are read a request has its tokens too, one for each step that reads some.
        joined = min(later, (prefill_steps(place, prompts, prompt) - 1) / 2)
        return _Turn(sequences, step, first_s, last_s, joined, later)

    first = turn(live, read, later)
    if workload.ragged:
        # What waits takes the places of those that end; then the batch empties, the longest answers last.
        waves = share / live - 1
        drain_s = _drain_s(place, replica, live, context, workload.output_tokens, busy, needs)
        total_s = first.whole_s * waves + first.last_s + drain_s
        first_s, token_s, step = first.first_s, first.token_s, first.step
    else:
        # Who was read with those of the turn before has some of its answer by its own: what all had room for.
        ahead = min(later, max(0, kv_tokens // read - prompt))

        def next_turn(sequences: int, prompts: int) -> _Turn:
            return turn(sequences, prompts, later - ahead if sequences <= read - live else later)

        whole, rest = divmod(share, live)
        turns = [first]
        if whole > 1:
            turns += [next_turn(live, read)] * (whole - 1)
        if rest:
            turns.append(next_turn(rest, rest))
        total_s = sum(each.whole_s for each in turns)
        first_s, token_s = _of_turns(turns, read)
        parts = dict.fromkeys(part for turn in turns for part in turn.step)
        step = {part: sum(t.sequences * t.step.get(part, 0.0) for t in turns) / share for part in parts}
    rate = workload.concurrency * workload.output_tokens / (total_s + place.engine.first_s)
    return Served(first_s, token_s, rate, step)


@dataclass(frozen=True, slots=True)
class _Turn:
    """Requests of which all are in the cache at once, from their prompts to their ends."""

    sequences: int
    step: Seconds
    first_s: float  # to a request's first token, in the mean
    last_s: float  # to the last of them
    joined: float  # tokens that a request has by then, in the mean
    later: int  # tokens of an answer after the first

    @property
    def step_s(self) -> float:
        return sum(self.step.values())

    @property
    def whole_s(self) -> float:
        return self.last_s + self.later * self.step_s

    @property
    def token_s(self) -> float:
        if not self.later:
            return self.step_s
        since_s = self.last_s - self.first_s + (self.later - self.joined) * self.step_s
        return max(self.step_s, since_s / self.later)


def _of_turns(turns: Sequence[_Turn], read: int) -> tuple[float, float]:
    """Mean seconds to the first token and a later one, where `read` prompts are read at each turn's beginning: of
    those that are not of the turn too, which wait for the rest of their answers until it is theirs.
    """
    starts = [0.0, *itertools.accumulate(turn.whole_s for turn in turns)]
    live, count = turns[0].sequences, sum(turn.sequences for turn in turns)
    # Turns that prompts are read before their own, and how many prompts one more.
    ahead, more = divmod(read - live, live)
    first_s = token_s = 0.0
    for own, turn in enumerate(turns):
        sooner = min(more, turn.sequences)
        for requests, at in ((sooner, own - ahead - 1), (turn.sequences - sooner, own - ahead)):
            begun = max(0, at)
            waited_s = starts[own] - starts[begun]
            first_s += requests / count * (starts[begun] + turns[begun].first_s)
            token_s += requests / count * (turn.token_s + waited_s / max(1, turns[0].later))
    return first_s, token_s


RAGGED_MOST = 2.9
"""The longest answers by the mean: of 352 tokens in the mean, up to 1,024, as samples of real conversations are cut."""
_DRAIN_PARTS = 6


def _drain_s(
    place: Placement,
    replica: int,
    sequences: int,
    context: float,
    output_tokens: int,
    busy: float,
    needs: Sequence[Memory],
) -> float:
    """Steps until the longest of some answers has ended; at every token each has the same chance to be the last."""
    longest = RAGGED_MOST * output_tokens
    decay = 1.1 * output_tokens  # the cut lengths' mean is then output_tokens
    total = 0.0
    for part in range(_DRAIN_PARTS):
        left = max(1, round(sequences * math.exp(-(part + 0.5) * longest / _DRAIN_PARTS / decay)))
        step = decode_step_s(place, replica, left, context, busy, needs)
        total += sum(step.values()) * longest / _DRAIN_PARTS
    return total


def limit_tokens_per_s(place: Placement, workload: Workload) -> float:
    """Output tokens a second that the devices allow: bytes and FLOPs at full rate, links and host free.

    A replica at work reads its weights once a step, of experts those that its tokens hit. A rate that was measured is
    taken for the share of the data sheet's that probes reach.
    """
    spec, devices = place.spec, [place.topology.devices[i] for i in place.devices]
    own = {device.pool or device.index: device for device in devices}.values()  # a pool counts once
    at_full = {device.index: full_rates(device) for device in own}
    bandwidth = sum(device.bandwidth_bytes_per_s * at_full[device.index][0] for device in own)
    dtypes = {device.index: compute_dtype(place.format, place.dtype, device) for device in own}
    flops_per_s = sum(
        at_full[d.index][1] * max(d.flops_per_s[dtypes[d.index]], d.flops_per_s[place.dtype]) for d in own
    )
    n, copies = workload.concurrency, min(workload.concurrency, place.dims.dp)

    seen = mean_window(spec, range(spec.layers), workload.prompt_tokens / 2)
    pair = 4 * spec.heads * spec.head_dim
    if spec.latent is not None:
        pair = 2 * spec.heads * (spec.latent.nope_dim + spec.latent.rope_dim + spec.latent.v_dim)
    active, head = spec.active_params, spec.embedding_params
    prompt_flops = workload.prompt_tokens * (2 * active + spec.layers * pair * seen) + 2 * head
    token_flops = 2 * (active + head)
    context = mean_window(spec, range(spec.layers), workload.prompt_tokens + workload.output_tokens / 2)
    read: float = copies * _least_read(place, math.floor(n / copies))
    kv = spec.layers * spec.cached_elements * place.format.bytes_per_kv(place.dtype)
    read += n * context * kv
    later = workload.output_tokens - 1
    total_flops = n * (prompt_flops + later * token_flops)
    total_s = max(total_flops / flops_per_s, later * read / bandwidth)
    return n * workload.output_tokens / total_s


def _least_read(place: Placement, sequences: int) -> float:
    """Bytes of weights that a step of so many sequences cannot do without."""
    spec, kept, dtype = place.spec, place.format, place.dtype
    small = min(kept.bytes_per_weight(dtype), BYTES_PER_ELEMENT[dtype])
    params: float = spec.active_params
    if spec.experts is not None:
        e = spec.experts
        hit = e.count * (1 - (1 - e.per_token / e.count) ** sequences)
        mixtures = spec.layers - spec.dense_layers
        params += mixtures * 3 * spec.hidden * e.intermediate * (hit - e.per_token)
    return params * small + spec.embedding_params * BYTES_PER_ELEMENT[dtype]


def _usd_per_million(place: Placement, tokens_per_s: float) -> float | None:
    prices = [place.topology.devices[i].usd_per_hour for i in place.devices]
    known = [price for price in prices if price is not None]
    return sum(known) / 3600 / tokens_per_s * 1e6 if len(known) == len(prices) else None
