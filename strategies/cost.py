"""The performance model: what a layout's users see of the steps that it takes on its devices.

A workload is so many requests that arrive together, or so many in flight all the time (steady.py). cost_steps.py has
passes and steps, cost_ops.py their operations, cost_links.py collectives, cost_memory.py what a rank holds.

Units: bytes, seconds, FLOP/s. Sources: Pope et al. 2211.05102 for the roofline; engines.yaml for its constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from strategies.cost_links import ByIdentity, slowest_link
from strategies.cost_memory import Memory, memories
from strategies.cost_ops import compute_dtype, full_rates, mean_window
from strategies.cost_steps import (
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
    length = workload.prompt_tokens + workload.output_tokens
    share = math.ceil(workload.concurrency / place.dims.dp)
    kv_tokens = min(need.kv_tokens for need in needs)
    live = max(1, min(share, kv_tokens // length, place.engine.max_sequences))
    busy = min(1.0, workload.concurrency / place.dims.dp)
    context = workload.prompt_tokens + workload.output_tokens / 2
    step = decode_step_s(place, replica, live, context, busy, needs)
    step_s = sum(step.values())
    last_s, first_s = prefill_s(place, replica, live, workload.prompt_tokens, busy, needs)
    later = workload.output_tokens - 1
    # While the others' prompts are read a request has its tokens too, one for each step that reads some.
    joined = min(later, (prefill_steps(place, live, workload.prompt_tokens) - 1) / 2)
    token_s = max(step_s, (last_s - first_s + (later - joined) * step_s) / later) if later else step_s
    total_s, waves = last_s + later * step_s, share / live
    if workload.ragged:
        # What waits takes the places of those that end; then the batch empties, the longest answers last.
        drain_s = _drain_s(place, replica, live, context, workload.output_tokens, busy, needs)
        total_s = (last_s + later * step_s) * (waves - 1) + last_s + drain_s
        waves = 1.0
    rate = workload.concurrency * workload.output_tokens / (waves * total_s + place.engine.first_s)
    return Served(first_s + (waves - 1) / 2 * total_s, token_s, rate, step)


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
