"""The whole performance and memory model: what a layout needs of each device, and how long its steps take.

A pass over some tokens is bound on each rank by the bytes that it reads or by the FLOPs that it does, plus
what links and the host add. Decode is a pass of one token a sequence; prefill is passes of up to
MAX_BATCHED_TOKENS prompt tokens. The workload is `concurrency` requests that arrive together.

Units: bytes, seconds, FLOP/s. Sources: Pope et al. 2211.05102 for the roofline, NCCL's tuning model for
collectives; each constant has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.topology import Device, Link, Provenance, Topology
from strategies.plan import Estimate, ParallelDims, Shard
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec, Objective, Workload
from strategies.tensor import local_spec

# The scheduler's defaults: tokens a pass, and sequences at once in a replica.
MAX_BATCHED_TOKENS = 2048
MAX_NUM_SEQS = 256

REQUEST_OVERHEAD_S = 2e-3  # two Ray calls a request, 0.96 ms each (called and awaited on a 32-core H100 host)

# What a process holds besides its shard. CUDA: context, workspaces and graphs (0.6 to 3.5 GB among engines),
# and NCCL's buffers (0.35 GB). CPU: a Python process with torch loaded.
CUDA_RUNTIME_BYTES = 1_000_000_000
NCCL_BYTES = 350_000_000
CPU_RUNTIME_BYTES = 400_000_000


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a device's rates that kernels reach."""

    weights: float  # of bandwidth, reading weights
    kv: float  # of bandwidth, reading KV in decode attention
    compute: float  # of FLOP/s, in matrix products
    attention: float  # of FLOP/s, in prefill attention


# Of the data sheet: fitted on aiconfigurator's tables for A100, H100, L40S and RTX PRO 6000 (medians).
OF_SHEET = Efficiency(weights=0.80, kv=0.70, compute=0.65, attention=0.25)
# Of what probes reach: the same kernels, where probes reach 0.925 of the sheet's bandwidth and 0.80 of its
# FLOP/s, as on an H100 (3.10 of 3.35 TB/s, 787 of 989 TFLOP/s).
OF_MEASURED = Efficiency(weights=0.87, kv=0.76, compute=0.82, attention=0.31)


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout put on devices. `devices` holds indices by replica × replica_size + rank."""

    spec: ModelSpec
    dims: ParallelDims
    dtype: str
    shards: tuple[Shard, ...]
    topology: Topology
    devices: tuple[int, ...]

    def device(self, replica: int, rank: int) -> Device:
        return self.topology.devices[self.devices[replica * self.dims.replica_size + rank]]

    def stage(self, replica: int, stage: int) -> tuple[int, ...]:
        """Device indices of a stage's tp group."""
        first = replica * self.dims.replica_size + stage * self.dims.tp
        return self.devices[first : first + self.dims.tp]

    def pool_ranks(self, device: Device) -> int:
        """Ranks of the layout that share a device's bandwidth, FLOP/s and memory, itself among them."""
        if not device.pool:
            return 1
        return sum(self.topology.devices[i].pool == device.pool for i in self.devices)


# --- memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """What one rank holds, in bytes."""

    free: int  # before anything is loaded
    weights: int
    activations: int  # at the token budget, with the logits
    runtime: int
    kv_per_token: int

    @property
    def fixed(self) -> int:
        return self.weights + self.activations + self.runtime

    @property
    def kv_tokens(self) -> int:
        return max(0, (self.free - self.fixed) // self.kv_per_token)


def weight_bytes(spec: ModelSpec, shard: Shard, dtype: str) -> int:
    """Bytes of a rank's parameters: its part of the layers, and the tables that its stage keeps."""
    local = local_spec(spec, shard)
    tables = local.embedding_params if shard.is_first else 0
    if shard.is_last and not (shard.is_first and spec.tied):
        tables += local.embedding_params
    norm = spec.hidden if shard.is_last else 0
    return (local.layers * local.layer_params + tables + norm) * BYTES_PER_ELEMENT[dtype]


def memory(place: Placement, replica: int, rank: int, sequences: int) -> Memory:
    """What a rank needs to serve `sequences` at once, and what its device has free for it."""
    spec, shard, device = place.spec, place.shards[rank], place.device(replica, rank)
    size = BYTES_PER_ELEMENT[place.dtype]
    # The widest point of a layer: the residual, the normed input, gate and up, and their product.
    hidden_bytes = MAX_BATCHED_TOKENS * (2 * spec.hidden + 3 * len(shard.mlp)) * size
    # Logits as gathered, and in float32 to sample from.
    logits_bytes = min(sequences, MAX_NUM_SEQS) * spec.vocab * (size + 4) if shard.is_last else 0
    runtime = CPU_RUNTIME_BYTES
    if device.kind != "cpu":
        runtime = CUDA_RUNTIME_BYTES + (NCCL_BYTES if place.dims.replica_size > 1 else 0)
    return Memory(
        free=device.free_bytes // place.pool_ranks(device),
        weights=weight_bytes(spec, shard, place.dtype),
        activations=hidden_bytes + logits_bytes,
        runtime=runtime,
        kv_per_token=local_spec(spec, shard).kv_bytes_per_token(place.dtype),
    )


def memories(place: Placement, workload: Workload) -> list[Memory]:
    """Of every rank of every replica."""
    sequences = math.ceil(workload.concurrency / place.dims.dp)
    ranks = range(place.dims.replica_size)
    return [memory(place, d, rank, sequences) for d in range(place.dims.dp) for rank in ranks]


# --- links --------------------------------------------------------------------------------------------------


def all_reduce_latency_s(link: Link, ranks: int) -> float:
    """Of a small all-reduce: the link's own figures by ranks, straight lines between; else a ring's law.

    The law, base + hops, fits NCCL on H100 over 2, 4 and 8 ranks within 2 % (6.9, 10.5, 17.5 µs).
    """
    known = sorted(link.all_reduce_latency_s.items())
    if ranks in link.all_reduce_latency_s:
        return link.all_reduce_latency_s[ranks]
    if len(known) < 2:
        return link.latency_s * (ranks + 2) / 4
    # The two known points around `ranks`, or the two nearest it.
    after = min(max(sum(n < ranks for n, _ in known), 1), len(known) - 1)
    (n0, t0), (n1, t1) = known[after - 1 : after + 1]
    return t0 + (t1 - t0) * (ranks - n0) / (n1 - n0)


def all_reduce_s(link: Link, ranks: int, n_bytes: float) -> float:
    """A ring moves every byte 2(n−1)/n times."""
    return all_reduce_latency_s(link, ranks) + 2 * (ranks - 1) / ranks * n_bytes / link.bytes_per_s


def all_gather_s(link: Link, ranks: int, n_bytes: float) -> float:
    """`n_bytes` in all; each rank lacks (n−1)/n of them."""
    return all_reduce_latency_s(link, ranks) + (ranks - 1) / ranks * n_bytes / link.bytes_per_s


def send_recv_s(link: Link, n_bytes: float) -> float:
    return link.latency_s + n_bytes / link.bytes_per_s


# --- one pass -----------------------------------------------------------------------------------------------

Seconds = Mapping[str, float]  # by cause: weights, compute, kv, host, all_reduce, all_gather, send_recv


@dataclass(frozen=True, slots=True)
class Pass:
    """The work of one pass through the model."""

    tokens: float  # that enter
    pairs_per_token: float  # (query, key) pairs that a token makes
    kv_tokens: float  # whose K and V are read from the cache
    rows: float  # of logits


def decode_pass(sequences: int, context: float) -> Pass:
    return Pass(tokens=sequences, pairs_per_token=context, kv_tokens=sequences * context, rows=sequences)


def mean_window(spec: ModelSpec, layers: range, context: float) -> float:
    """Tokens that a query sees, averaged over layers: less than the context where windows slide."""
    if not spec.windows:
        return context
    return sum(min(context, spec.windows[i] or context) for i in layers) / len(layers)


def stage_s(place: Placement, replica: int, stage: int, work: Pass, at_work: float) -> Seconds:
    """Seconds of one stage's part of a pass, by cause; its slowest rank bounds it.

    `at_work` is the share of the layout's ranks that work at the same moment: those of one pool share its
    bandwidth.
    """
    tp, spec = place.dims.tp, place.spec
    ranks = range(stage * tp, (stage + 1) * tp)
    slowest = max((_rank_s(place, replica, r, work, at_work) for r in ranks), key=lambda s: sum(s.values()))
    link = place.topology.slowest(place.stage(replica, stage))
    if link is None:
        return slowest
    shard = place.shards[stage * tp]
    size = BYTES_PER_ELEMENT[place.dtype]
    reduces = 2 * len(shard.layers) + shard.is_first  # the embedding's rows are summed once
    found = {**slowest, "all_reduce": reduces * all_reduce_s(link, tp, work.tokens * spec.hidden * size)}
    if shard.is_last:
        found["all_gather"] = all_gather_s(link, tp, work.rows * spec.vocab * size)
    return found


def _rank_s(place: Placement, replica: int, rank: int, work: Pass, at_work: float) -> dict[str, float]:
    spec, shard, device = place.spec, place.shards[rank], place.device(replica, rank)
    local, size = local_spec(spec, shard), BYTES_PER_ELEMENT[place.dtype]
    reach = OF_MEASURED if device.provenance is Provenance.MEASURED else OF_SHEET
    # Threads are given out at the start, one share a rank; bandwidth goes to whoever works.
    sharers = place.pool_ranks(device)
    bandwidth = device.bandwidth_bytes_per_s / max(1.0, sharers * at_work)
    flops_per_s = device.flops_per_s[place.dtype] / sharers

    layer_params = local.layers * local.layer_params
    head_params = local.embedding_params if shard.is_last else 0
    weights = (layer_params + head_params) * size / (reach.weights * bandwidth)
    flops = 2 * layer_params * work.tokens + 2 * head_params * work.rows
    compute = flops / (reach.compute * flops_per_s)
    seen = mean_window(spec, shard.layers, work.pairs_per_token)
    read = mean_window(spec, shard.layers, work.kv_tokens / work.tokens) * work.tokens
    kv = read * local.kv_bytes_per_token(place.dtype) / (reach.kv * bandwidth)
    attention_flops = 4 * work.tokens * seen * local.layers * local.heads * local.head_dim
    return {
        "weights": weights,
        "compute": max(0.0, compute - weights),  # what compute adds where it outlasts the reads
        "kv": max(kv, attention_flops / (reach.attention * flops_per_s)),
        "host": device.step_overhead_s + local.layers * device.layer_overhead_s,
    }


def hops_s(place: Placement, replica: int, work: Pass) -> float:
    """Sends of the hidden states from stage to stage, and of the picked tokens back to the first."""
    if place.dims.pp == 1:
        return 0.0
    firsts = [place.stage(replica, stage)[0] for stage in range(place.dims.pp)]
    links = [place.topology.link(a, b) for a, b in zip(firsts, [*firsts[1:], firsts[0]], strict=True)]
    n_bytes = work.tokens * place.spec.hidden * BYTES_PER_ELEMENT[place.dtype]
    return sum(send_recv_s(link, n_bytes) for link in links[:-1]) + send_recv_s(links[-1], 4 * work.rows)


# --- decode and prefill -------------------------------------------------------------------------------------


def decode_step_s(place: Placement, replica: int, sequences: int, context: float, busy: float) -> Seconds:
    """From one token to the next of every sequence of a replica, by cause; `busy`: share of replicas at work.

    A pipeline keeps up to pp groups of sequences in flight: the cycle is the slowest stage's time for every
    group, or one group's way through all stages, whichever is longer. One sequence leaves all stages but one
    idle.
    """
    pp = place.dims.pp
    groups = min(pp, sequences)
    work = decode_pass(math.ceil(sequences / groups), context)
    stages = [stage_s(place, replica, s, work, busy * groups / pp) for s in range(pp)]
    through = _sum(stages)
    if pp > 1:
        through["send_recv"] = hops_s(place, replica, work)
    slowest = max(stages, key=lambda s: sum(s.values()))
    packed = {cause: groups * seconds for cause, seconds in slowest.items()}
    return max(through, packed, key=lambda s: sum(s.values()))


def prefill_s(place: Placement, replica: int, prompts: int, length: int, busy: float) -> tuple[float, float]:
    """Seconds until the last of some prompts is done, and until one is on average.

    Chunks of the token budget follow one another through the stages; the first fills the pipeline.
    """
    total = prompts * length
    tokens = min(total, MAX_BATCHED_TOKENS)
    chunks = total / tokens
    # A causal token sees half of its prompt on average; only a prompt's last token needs logits.
    cached = max(0, length - tokens) / 2
    work = Pass(tokens, pairs_per_token=length / 2, kv_tokens=cached, rows=tokens / length)
    pp = place.dims.pp
    stages = [stage_s(place, replica, s, work, busy * min(1.0, chunks / pp)) for s in range(pp)]
    times = [sum(s.values()) for s in stages]
    fill = sum(times) + hops_s(place, replica, work)
    last = fill + (chunks - 1) * max(times)
    return last, (fill + last) / 2


def _sum(parts: Sequence[Seconds]) -> dict[str, float]:
    causes = {cause: None for part in parts for cause in part}  # a dict, to keep their order
    return {cause: sum(part.get(cause, 0.0) for part in parts) for cause in causes}


# --- the estimate -------------------------------------------------------------------------------------------


def estimate(place: Placement, workload: Workload) -> Estimate:
    """What a layout that fits will do with `workload.concurrency` requests that arrive together.

    TTFT and TPOT are means over requests, as vLLM defines them: a request that waits for a place in the cache
    waits in its TTFT, and the prefill of later prompts delays the tokens of earlier ones.
    """
    needs = memories(place, workload)
    kv_tokens = min(need.kv_tokens for need in needs)
    share = math.ceil(workload.concurrency / place.dims.dp)  # sequences of the fullest replica
    length = workload.prompt_tokens + workload.output_tokens
    live = min(share, kv_tokens // length, MAX_NUM_SEQS)
    busy = min(1.0, workload.concurrency / place.dims.dp)
    runs = [_run(place, replica, live, workload, busy) for replica in range(place.dims.dp)]
    run = max(runs, key=lambda r: r.total_s)
    waves = share / live
    output_tokens = workload.concurrency * workload.output_tokens
    rate = output_tokens / (waves * run.total_s + REQUEST_OVERHEAD_S)
    return Estimate(
        ttft_s=REQUEST_OVERHEAD_S + run.first_s + (waves - 1) / 2 * run.total_s,
        tpot_s=run.token_s,
        output_tokens_per_s=rate,
        memory_bytes_per_device=max(need.fixed + live * length * need.kv_per_token for need in needs),
        kv_tokens=kv_tokens,
        share_of_limit=rate / limit_tokens_per_s(place, workload),
        usd_per_million_tokens=_usd_per_million(place, rate),
        breakdown=run.step,
    )


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


@dataclass(frozen=True, slots=True)
class _Run:
    """As many requests as a replica holds at once, from arrival to the last token."""

    first_s: float  # mean time to the first token
    token_s: float  # mean time to each next one
    total_s: float
    step: Seconds


def _run(place: Placement, replica: int, sequences: int, workload: Workload, busy: float) -> _Run:
    context = workload.prompt_tokens + workload.output_tokens / 2
    step = decode_step_s(place, replica, sequences, context, busy)
    step_s = sum(step.values())
    last_s, first_s = prefill_s(place, replica, sequences, workload.prompt_tokens, busy)
    later = workload.output_tokens - 1
    token_s = step_s + (last_s - first_s) / later if later else step_s
    return _Run(first_s, token_s, last_s + later * step_s, step)


def limit_tokens_per_s(place: Placement, workload: Workload) -> float:
    """Output tokens a second that the devices allow: bytes and FLOPs at full rate, links and host free.

    A replica at work reads its weights once a step. A CPU has no data sheet: its rates are those assumed.
    """
    spec, devices = place.spec, [place.topology.devices[i] for i in place.devices]
    own = {device.pool or device.index: device for device in devices}.values()  # a pool counts once
    bandwidth = sum(device.bandwidth_bytes_per_s for device in own)
    flops_per_s = sum(device.flops_per_s[place.dtype] for device in own)
    layer_params, size = spec.layers * spec.layer_params, BYTES_PER_ELEMENT[place.dtype]
    n, copies = workload.concurrency, min(workload.concurrency, place.dims.dp)

    seen = mean_window(spec, range(spec.layers), workload.prompt_tokens / 2)
    attention = 4 * spec.layers * spec.heads * spec.head_dim
    prompt_flops = workload.prompt_tokens * (2 * layer_params + attention * seen) + 2 * spec.embedding_params
    context = mean_window(spec, range(spec.layers), workload.prompt_tokens + workload.output_tokens / 2)
    read: float = copies * (layer_params + spec.embedding_params) * size
    read += n * context * spec.kv_bytes_per_token(place.dtype)
    token_flops = 2 * n * (layer_params + spec.embedding_params)
    step_s = max(read / bandwidth, token_flops / flops_per_s)
    total_s = n * prompt_flops / flops_per_s + (workload.output_tokens - 1) * step_s
    return n * workload.output_tokens / total_s


def _usd_per_million(place: Placement, tokens_per_s: float) -> float | None:
    prices = [place.topology.devices[i].usd_per_hour for i in place.devices]
    known = [price for price in prices if price is not None]
    return sum(known) / 3600 / tokens_per_s * 1e6 if len(known) == len(prices) else None
