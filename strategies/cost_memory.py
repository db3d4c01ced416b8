"""What one rank holds: weights, KV cache, activations, and what the process itself takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cluster.errors import BadLayout
from cluster.topology import Device
from strategies.formats import Format
from strategies.offload import Streaming, resident_layers
from strategies.plan import ParallelDims, Placement, Shard
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec, Workload

# What a process of ours holds on a GPU besides its shard; `runtime_bytes` and `joined_bytes` of engines.yaml are their
# sums, and other engines' (0.6 to 3.5 GB among them).
NCCL_BYTES = 350_000_000
WORK_BYTES = 800_000_000  # what comes after the weights: graphs and workspaces
CONTEXT_BYTES = 600_000_000
"""Of a process's first touch of a GPU, which it cannot see for itself: an H100's and a 4090's are 0.4 to 0.6 GB."""
CAP_SLACK = 0.02
"""Of a cap on a process's memory: graphs take more than is estimated from a few, and what torch keeps is in pieces: of
25.3 GB, 0.1 GB was missing (Qwen2.5-32B on an H100, 2026-11-22)."""
GAP_BYTES = 1_100_000_000
"""That torch leaves between what it keeps, where no cap makes its segments grow in place: Llama-3.1-8B's cache had 56.9
GB of the 58.1 that are left by all else at tp1, 64.0 of 65.2 at tp2 (H100, 2026-11-22)."""
CPU_RUNTIME_BYTES = 400_000_000  # of a Python process with torch loaded


@dataclass(frozen=True, slots=True)
class Memory:
    """What one rank holds, in bytes."""

    free: int  # before anything is loaded
    weights: int  # on the device
    activations: int  # at the token budget, with the logits
    runtime: int
    kv_per_token: int
    streaming: Streaming | None = None  # which of its layers stay in host memory; None: it has no such
    layer: float = 0.0  # of one layer's weights, where there are such

    @property
    def pinned(self) -> int:
        """Of host memory."""
        return 0 if self.streaming is None else math.ceil(len(self.streaming.streamed) * self.layer)

    @property
    def streamed(self) -> int:
        """That come from there at every step."""
        return 0 if self.streaming is None else math.ceil(self.streaming.moved * self.layer)

    @property
    def fixed(self) -> int:
        return self.weights + self.activations + self.runtime

    @property
    def kv_tokens(self) -> int:
        return max(0, (self.free - self.fixed) // self.kv_per_token)


def linear_params(spec: ModelSpec, shard: Shard, dims: ParallelDims) -> tuple[int, int]:
    """Of a rank: (attention, dense MLP, shared experts, norms, biases and router; routed experts)."""
    layers = len(shard.layers)
    dense = sum(layer < spec.dense_layers for layer in shard.layers)
    if spec.latent is None:
        head = spec.hidden * spec.head_dim
        attention = 2 * head * (len(shard.heads) + len(shard.kv_heads))
        if spec.qkv_bias:
            attention += spec.head_dim * (len(shard.heads) + 2 * len(shard.kv_heads))
    else:
        a, heads = spec.latent, len(shard.heads)
        query = heads * (a.nope_dim + a.rope_dim)
        attention = a.q_rank * (spec.hidden + query) if a.q_rank else spec.hidden * query
        attention += spec.hidden * a.cached + heads * a.kv_rank * (a.nope_dim + a.v_dim)
        attention += heads * a.v_dim * spec.hidden
    common = layers * (attention + 2 * spec.hidden) + dense * 3 * spec.hidden * len(shard.mlp)
    if spec.experts is None:
        return common, 0
    e = spec.experts
    one = 3 * spec.hidden * e.intermediate
    mixtures = layers - dense
    common += mixtures * (math.ceil(e.shared * one / dims.tp) + e.count * spec.hidden)
    return common, mixtures * math.ceil(e.count * one / dims.expert_ranks)


def table_params(spec: ModelSpec, shard: Shard) -> int:
    """Embedding, head and last norm: a rank's part of what its stage keeps."""
    rows = len(shard.vocab) * spec.hidden
    tables = rows if shard.is_first else 0
    if shard.is_last and not (shard.is_first and spec.tied):
        tables += rows
    return tables + (spec.hidden if shard.is_last else 0)


def weight_bytes(place: Placement, rank: int) -> int:
    """Bytes of a rank's parameters: its part of the layers, and the tables that its stage keeps."""
    spec, shard, kept = place.spec, place.shards[rank], place.format
    size, small = BYTES_PER_ELEMENT[place.dtype], kept.bytes_per_weight(place.dtype)
    common, experts = linear_params(spec, shard, place.dims)
    of_common = size if kept.experts_only and spec.experts is not None else small
    return math.ceil(common * of_common + experts * small) + _table_bytes(place, rank)


def _table_bytes(place: Placement, rank: int) -> int:
    spec, shard = place.spec, place.shards[rank]
    tables = table_params(spec, shard)
    if spec.tied and shard.is_first and shard.is_last and place.device(0, rank).kind == "cpu":
        tables += len(shard.vocab) * spec.hidden  # the head's own copy, packed for its products
    return tables * BYTES_PER_ELEMENT[place.dtype]


def kv_bytes_per_token(place: Placement, rank: int) -> int:
    """A latent row is whole on every rank of a tp group; KV heads are split, or replicated beyond their number."""
    shard, size = place.shards[rank], place.format.bytes_per_kv(place.dtype)
    if place.spec.latent is not None:
        return math.ceil(len(shard.layers) * place.spec.latent.cached * size)
    return math.ceil(2 * len(shard.layers) * len(shard.kv_heads) * place.spec.head_dim * size)


def memory(place: Placement, replica: int, rank: int, sequences: int) -> Memory:
    """What a rank needs to serve `sequences` at once, and what its device has free for it."""
    spec, shard, device = place.spec, place.shards[rank], place.device(replica, rank)
    size = BYTES_PER_ELEMENT[place.dtype]
    # The widest point of a layer: the residual, the normed input, gate and up, and their product.
    wide = len(shard.mlp)
    if spec.experts is not None:
        wide = max(wide, spec.experts.per_token * spec.experts.intermediate // place.dims.expert_ranks)
    hidden_bytes = place.engine.chunk_tokens * (2 * spec.hidden + 3 * wide) * size
    # Logits as gathered, and in float32 to sample from.
    rows = place.engine.max_sequences if place.offload else min(sequences, place.engine.max_sequences)
    logits_bytes = rows * spec.vocab * (size + 4) if shard.is_last else 0
    runtime = CPU_RUNTIME_BYTES
    if device.kind != "cpu":
        ranks = place.dims.replica_size * (place.dims.dp if place.dims.expert_ranks > place.dims.tp else 1)
        runtime = place.engine.runtime_bytes + (place.engine.joined_bytes if ranks > 1 else 0)
    free = device.free_bytes // place.pool_ranks(device)
    weights = weight_bytes(place, rank)
    made = Memory(
        free=free,
        weights=weights,
        activations=hidden_bytes + logits_bytes,
        runtime=runtime,
        kv_per_token=kv_bytes_per_token(place, rank),
    )
    return _streaming(place, rank, device, made) if place.offload else made


def _streaming(place: Placement, rank: int, device: Device, whole: Memory) -> Memory:
    """The same with as many layers in host memory as room for the cache wants: as the engine reckons when it loads."""
    shard, room = place.shards[rank], place.room
    layers, tables = len(shard.layers), _table_bytes(place, rank)
    layer = (whole.weights - tables) / layers
    resident = min(layers, room.resident) if room.resident is not None else layers
    if place.zero3:
        resident = 0
    elif room.resident is None and device.kind != "cpu":  # whose memory is the host's
        least = room.longest * whole.kv_per_token
        cache = max(room.longest, room.cached) * whole.kv_per_token
        left = whole.free - (whole.fixed - whole.weights) - tables - cache
        try:
            resident = resident_layers(layers, math.ceil(layer), left, cache - least)
        except BadLayout:  # which `rejection` tells with its own figures
            resident = 0
    if resident == layers:
        return whole
    streaming = Streaming(layers, resident)
    kept = whole.weights - math.ceil((layers - resident - streaming.buffers) * layer)
    return replace(whole, weights=kept, streaming=streaming, layer=layer)


@dataclass(frozen=True, slots=True)
class WorkBytes:
    """What a rank's device must hold beside its context."""

    layer: int
    beside_layers: int  # tables, activations, logits, cache, graphs


def work_bytes(
    spec: ModelSpec, shard: Shard, dtype: str, kept: Format, *, tokens: int, rows: int, cached: int
) -> WorkBytes:
    """Of a dense model's rank that computes `tokens` a step, samples `rows`, and has room to cache some."""
    size, layers = BYTES_PER_ELEMENT[dtype], len(shard.layers)
    common, _ = linear_params(spec, shard, ParallelDims(shard.tp, shard.pp))
    layer = math.ceil(common / layers * kept.bytes_per_weight(dtype))
    activations = tokens * (2 * spec.hidden + 3 * len(shard.mlp)) * size
    logits = rows * spec.vocab * (size + 4) if shard.is_last else 0
    cache = math.ceil(cached * 2 * layers * len(shard.kv_heads) * spec.head_dim * kept.bytes_per_kv(dtype))
    tables = table_params(spec, shard) * size
    ours = WORK_BYTES + (NCCL_BYTES if shard.tp * shard.pp > 1 else 0)
    return WorkBytes(layer, tables + activations + logits + cache + ours)


def memories(place: Placement, workload: Workload) -> list[Memory]:
    """Of every rank of every replica; replicas on like devices are worked out once."""
    sequences = math.ceil(workload.concurrency / place.dims.dp)
    ranks = range(place.dims.replica_size)
    known: dict[tuple[int, int, int], Memory] = {}
    found = []
    for replica in range(place.dims.dp):
        for rank in ranks:
            device = place.device(replica, rank)
            key = (rank, device.free_bytes, place.pool_ranks(device) if device.pool else 1)
            if key not in known:
                known[key] = memory(place, replica, rank, sequences)
            found.append(known[key])
    return found
