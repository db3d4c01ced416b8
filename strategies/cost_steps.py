"""Passes and steps: what a stage takes with its collectives, a decode step through all stages, a prefill in chunks.

Decode is a pass of one token a sequence; prefill is passes of up to the engine's tokens a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.topology import Device, Link, LinkKind
from strategies.cost_links import ByIdentity, all_gather_s, all_reduce_s, send_recv_s, slowest_link
from strategies.cost_memory import Memory
from strategies.cost_offload import Pulled, pulls, with_waits
from strategies.cost_ops import Pass, rank_s
from strategies.plan import Placement
from strategies.spec import BYTES_PER_ELEMENT

# --- one pass -----------------------------------------------------------------------------------------------

Seconds = Mapping[str, float]
"""By cause: weights, compute, kv, host, all_reduce, all_gather, all_to_all, offload, send_recv."""


def decode_pass(sequences: float, context: float) -> Pass:
    return Pass(decodes=sequences, context=context)


def stage_s(place: Placement, replica: int, stage: int, work: Pass, at_work: float) -> Seconds:
    """Seconds of one stage's part of a pass, by cause; its slowest rank bounds it.

    `at_work` is the share of the layout's ranks that work at the same moment: those of one pool share its
    bandwidth.
    """
    tp, spec = place.dims.tp, place.spec
    found = _slowest_rank(place, replica, stage, work, at_work)
    shard = place.shards[stage * tp]
    size, k = BYTES_PER_ELEMENT[place.dtype], place.engine.kernels
    hidden_bytes = work.tokens * spec.hidden * size
    if place.dims.expert_ranks > tp and spec.experts is not None:
        # Every replica's tokens reach every mixture, and their sums come back.
        group = _expert_group(place, stage)
        mixtures = sum(layer >= spec.dense_layers for layer in shard.layers)
        once = _sum_s(place, group, hidden_bytes * place.dims.dp)
        found["all_to_all"] = 2 * mixtures * k.exchange * k.all_reduce * once
    group = place.stage(replica, stage)
    if len(group) == 1:
        return found
    sums = 2 * len(shard.layers) + shard.is_first  # the embedding's rows are summed once
    if "all_to_all" in found:
        sums -= sum(layer >= spec.dense_layers for layer in shard.layers)
    found["all_reduce"] = sums * k.all_reduce * _sum_s(place, group, hidden_bytes)
    link = slowest_link(ByIdentity(place.topology), group)
    if shard.is_last and link is not None:
        found["all_gather"] = all_gather_s(link, tp, work.rows * GATHERED_BYTES * tp)
    return found


GATHERED_BYTES = 8
"""A rank's best token and its logit travel, not the logits."""


def _sum_s(place: Placement, group: tuple[int, ...], n_bytes: float) -> float:
    link = slowest_link(ByIdentity(place.topology), group)
    return 0.0 if link is None else all_reduce_s(link, len(group), n_bytes, mapped=place.engine.mapped_sums)


def _expert_group(place: Placement, stage: int) -> tuple[int, ...]:
    """The devices of one stage in all replicas."""
    return tuple(i for replica in range(place.dims.dp) for i in place.stage(replica, stage))


def _slowest_rank(place: Placement, replica: int, stage: int, work: Pass, at_work: float) -> dict[str, float]:
    """Of a stage. Ranks that hold as much on like devices are priced once."""
    tp = place.dims.tp
    unlike: dict[tuple[object, ...], int] = {}
    for rank in range(stage * tp, (stage + 1) * tp):
        shard, device = place.shards[rank], place.device(replica, rank)
        widths = (len(shard.heads), len(shard.kv_heads), len(shard.mlp), len(shard.vocab))
        unlike.setdefault((*widths, *signature(device)), rank)
    parts = (rank_s(place, replica, rank, work, at_work) for rank in unlike.values())
    return max(parts, key=lambda s: sum(s.values()))


def signature(device: Device) -> tuple[object, ...]:
    """What a device's speed and room depend on; like devices have equal ones."""
    return (device.name, device.bandwidth_bytes_per_s, device.free_bytes, device.pool, device.provenance)


def hops_s(place: Placement, replica: int, work: Pass) -> float:
    """Sends of the hidden states from stage to stage, and of the picked tokens back to the first."""
    if place.dims.pp == 1:
        return 0.0
    links = stage_links(place, replica)
    n_bytes = work.tokens * place.spec.hidden * BYTES_PER_ELEMENT[place.dtype]
    return sum(send_recv_s(link, n_bytes) for link in links[:-1]) + send_recv_s(links[-1], 4 * work.rows)


def stage_links(place: Placement, replica: int) -> list[Link]:
    """From each stage to the next, and from the last back to the first."""
    firsts = [place.stage(replica, stage)[0] for stage in range(place.dims.pp)]
    return [place.topology.link(a, b) for a, b in zip(firsts, [*firsts[1:], firsts[0]], strict=True)]


def step_host_s(place: Placement, replica: int, work: Pass, chunks: float = 0.0) -> float:
    """Host time of a step that the devices wait for; `chunks`: of prompts, in it."""
    engine, device = place.engine, place.device(replica, 0)
    held = engine.step_s + engine.sequence_s * work.decodes + engine.prompt_s * min(1.0, chunks)
    if work.decodes > 1:
        held += engine.ungraphed_s.get(device.name, 0.0)
    return device.step_overhead_s / device.free_share + held


BESIDE = 0.25
"""Of the shorter of products and sums, that running beside each other costs: kernels that carry sums hold processors.
Two H100s, 8192 tokens (docs/performance.md): 105 ms of 94 + 20 by NVLink, 166 of 100 + 154 through the host."""


HALVES = 3.3
"""Times as long as a whole step's launches those of two halves take, whose threads wait for each other: 97 ms for 29
(Llama-3.1-8B at tp2 on two H100s, docs/accuracy.md)."""


def busy_s(place: Placement, replica: int, stage: int, parts: Seconds, work: Pass) -> float:
    """Of a stage's part of a pass with prompts: sums go beside products where the engine runs it in halves, and the
    host must launch what is not replayed as a graph.
    """
    engine, total = place.engine, sum(parts.values())
    layers = len(place.shards[stage * place.dims.tp].layers)
    in_halves = place.dims.tp > 1 and 0 < engine.overlap_tokens <= work.tokens
    if in_halves:
        sums = parts.get("all_reduce", 0.0)
        products = total - sums
        total = max(products, sums) + BESIDE * min(products, sums)
    if work.tokens <= engine.graph_tokens:
        return total
    device = place.device(replica, stage * place.dims.tp)
    launches = (1 + 2 * engine.eager_sum * (place.dims.tp > 1)) * (HALVES if in_halves else 1)
    return max(total, layers * launches * eager_layer_s(place, device))


def eager_layer_s(place: Placement, device: Device) -> float:
    """Host time to launch a layer: by this host's own, the least that any of its GPUs' probes saw."""
    engine = place.engine
    timed = _timed_layer_s(ByIdentity(place.topology), device.node) if device.kind != "cpu" else 0.0
    return timed * engine.eager_layers or engine.eager_layer_s


@functools.lru_cache(maxsize=4096)
def _timed_layer_s(key: ByIdentity, node: str) -> float:
    """0 where none was timed."""
    timed = [d.layer_overhead_s for d in key.topology.devices if d.node == node and d.layer_overhead_s]
    return min(timed, default=0.0)


# --- decode and prefill -------------------------------------------------------------------------------------


def decode_step_s(
    place: Placement,
    replica: int,
    sequences: float,
    context: float,
    busy: float,
    needs: Sequence[Memory] = (),
) -> Seconds:
    """From one token to the next of every sequence of a replica, by cause; `busy`: share of replicas at work.

    A pipeline keeps up to pp groups of sequences in flight: the cycle is the slowest stage's time for every
    group, or one group's way through all stages, whichever is longer. One sequence leaves all stages but one
    idle. `needs`: of all ranks, where layers may come from host memory: each pass of a stage brings its own.
    """
    pp = place.dims.pp
    groups = min(pp, max(1, math.floor(sequences))) if place.engine.pipelines else 1
    work = decode_pass(math.ceil(sequences / groups) if pp > 1 else sequences, context)
    at_work = busy * groups / pp
    pulled = pulls(place, replica, needs, at_work)
    stages = []
    for stage in range(pp):
        part = dict(stage_s(place, replica, stage, work, at_work))
        part["host"] += step_host_s(place, replica, work)
        stages.append(with_waits(part, pulled[stage]))
    through = _sum(stages)
    if pp > 1:
        through["send_recv"] = hops_s(place, replica, work)
    slowest = max(stages, key=lambda s: sum(s.values()))
    packed = {cause: groups * seconds for cause, seconds in slowest.items()}
    return max(through, packed, key=lambda s: sum(s.values()))


def prefill_s(
    place: Placement, replica: int, prompts: int, length: int, busy: float, needs: Sequence[Memory] = ()
) -> tuple[float, float]:
    """Seconds until the last of some prompts is done, and until one is on average.

    Chunks of the token budget follow one another through the stages; the first fills the pipeline.
    """
    chunks = prefill_steps(place, prompts, length)
    tokens = prompts * length / chunks
    # A causal token sees half of its prompt on average; only a prompt's last token needs logits.
    work = Pass(0, 0, prompt_tokens=tokens, seen=length / 2, prompt_rows=tokens / length)
    pp = place.dims.pp
    host = step_host_s(place, replica, work, chunks=1.0)
    at_work = busy * min(1.0, chunks / pp)
    pulled = pulls(place, replica, needs, at_work)
    parts = [stage_s(place, replica, s, work, at_work) for s in range(pp)]
    stages = [busy_s(place, replica, s, part, work) for s, part in enumerate(parts)]
    times = [
        host + _with_pulls_s(place, replica, s, pulled[s], part, stages[s]) for s, part in enumerate(parts)
    ]
    fill = sum(times) + hops_s(place, replica, work)
    last = fill + (chunks - 1) * max(times)
    return last, (fill + last) / 2


def pass_s(place: Placement, replica: int, work: Pass, needs: Sequence[Memory] = ()) -> tuple[float, ...]:
    """Seconds of a step in each stage, with its host time and its way to the next: for whoever steps one by one."""
    chunks = min(1.0, work.prompt_tokens)
    host = step_host_s(place, replica, work, chunks)
    hop_s = hops_s(place, replica, work) / place.dims.pp
    busy = min(1.0, work.tokens)
    pulled = pulls(place, replica, needs)
    found = []
    for stage in range(place.dims.pp):
        parts = stage_s(place, replica, stage, work, busy)
        seconds = busy_s(place, replica, stage, parts, work) if work.prompt_tokens else sum(parts.values())
        found.append(_with_pulls_s(place, replica, stage, pulled[stage], parts, seconds) + host + hop_s)
    return tuple(found)


def _with_pulls_s(
    place: Placement, replica: int, stage: int, pulled: Pulled | None, parts: Seconds, seconds: float
) -> float:
    """Of a stage's pass that takes so long by itself: sums through the host hold up layers that come thence."""
    if pulled is None:
        return seconds
    link = slowest_link(ByIdentity(place.topology), place.stage(replica, stage))
    if link is not None and link.kind is LinkKind.HOST:
        pulled = pulled.behind(parts.get("all_reduce", 0.0))
    return pulled.step_s(seconds)


def prefill_steps(place: Placement, prompts: int, length: int) -> float:
    return max(1.0, prompts * length / place.engine.chunk_tokens)


def _sum(parts: Sequence[Seconds]) -> dict[str, float]:
    causes = {cause: None for part in parts for cause in part}  # a dict, to keep their order
    return {cause: sum(part.get(cause, 0.0) for part in parts) for cause in causes}


@dataclass(frozen=True, slots=True)
class Served:
    """What a replica does with its share of a workload."""

    first_s: float  # mean time to the first token
    token_s: float  # mean time to each next one
    tokens_per_s: float  # of output
    step: Seconds
