"""What one rank's part of a pass takes, by operation: products by shape, attention, experts, and gaps between.

A product takes the time of its bytes or of its FLOPs, whichever is longer, a little more where they are close, and a
constant however small it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from cluster.topology import Device, Provenance
from strategies.engines import Engine, Kernels
from strategies.formats import Format, Width
from strategies.plan import ParallelDims, Placement, Shard
from strategies.scheme import GGUF, SPARSE24
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec

# Measured rates are what probes reach, data sheets are what could be: probes reach 0.925 of an H100's bandwidth and
# 0.80 of its FLOP/s (3.10 of 3.35 TB/s, 787 of 989 TFLOP/s), so shares of measured rates are larger by as much.
PROBED_BANDWIDTH = 0.925
PROBED_COMPUTE = 0.80
MOST = 0.98  # of the data sheet's rate, that a kernel is taken to reach
ROUNDING = 3.0  # exponent of the mean that joins bytes' and FLOPs' times
FEW_ROWS = 2  # that our own GEMV takes (docs/performance.md); at four cuBLAS is level with it
LEAST_ROWS = 8  # of a tensor core's tile
WIDENED = 0.85  # of plain products' FLOP/s that kernels reach which widen small weights first (Marlin at large batches)
WEIGHT_ONLY_TILE = 16  # rows that kernels of small weights pad an expert's tokens to, at least (Marlin)
LATENT_COMPUTE = 0.5  # of FLOP/s that decode attention over a latent cache reaches: all heads share one row


@dataclass(frozen=True, slots=True)
class Pass:
    """The work of one pass through the model on one replica."""

    decodes: float  # sequences that take one token
    context: float  # tokens that each of them sees
    prompt_tokens: float = 0.0
    seen: float = 0.0  # tokens that a prompt's token sees, on average
    prompt_rows: float = 0.0  # prompts that end in this pass

    @property
    def tokens(self) -> float:
        return self.decodes + self.prompt_tokens

    @property
    def rows(self) -> float:
        """Of logits."""
        return self.decodes + self.prompt_rows


@dataclass(frozen=True, slots=True)
class Product:
    """[tokens, k] times [k, n], so many times in the shard."""

    n: float
    k: float
    times: int
    weight_bytes: float  # of one weight
    width: Width
    compute: str
    gated: bool = False  # gate and up, which SiLU joins
    kept: str = ""  # the format's name, of weights in fewer bits


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a device, for one rank of a layout."""

    bandwidth: float  # bytes/s, shared with whoever works at the same time
    flops: dict[str, float]
    of_bandwidth: float  # shares of these rates per share of the data sheet's
    of_compute: float
    products: Mapping[str, Mapping[int, float]]  # dtype -> rows -> FLOP/s, where a CPU's were timed
    is_hopper: bool = False  # whose own instructions multiply weights in 4 bits

    def reading(self, share: float) -> float:
        return self.bandwidth * min(MOST, share) * self.of_bandwidth

    def computing(self, dtype: str, share: float) -> float:
        return self.flops[dtype] * min(MOST, share) * self.of_compute


def full_rates(device: Device) -> tuple[float, float]:
    """(bandwidth, FLOP/s) of the data sheet over what the device is told to have: measured rates are probes'."""
    measured = device.provenance is Provenance.MEASURED
    return (1 / PROBED_BANDWIDTH, 1 / PROBED_COMPUTE) if measured else (1.0, 1.0)


def rates(place: Placement, device: Device, at_work: float) -> Rates:
    """Threads of a pool are given out at the start, one share a rank; bandwidth goes to whoever works."""
    sharers = place.pool_ranks(device)
    left = device.free_share
    return Rates(
        left * device.bandwidth_bytes_per_s / max(1.0, sharers * at_work),
        {dtype: left * rate / sharers for dtype, rate in device.flops_per_s.items()},
        *full_rates(device),
        {
            dtype: {rows: left * rate / sharers for rows, rate in by_rows.items()}
            for dtype, by_rows in device.products.items()
            if device.pool
        },
        device.name in place.engine.kernels.hopper,
    )


def compute_dtype(kept: Format, dtype: str, device: Device) -> str:
    """What a format's products run in on a device: weights alone are small where it cannot multiply them so."""
    return kept.compute if kept.compute is not None and kept.compute in device.flops_per_s else dtype


@functools.lru_cache(maxsize=4096)
def products(
    spec: ModelSpec, shard: Shard, dims: ParallelDims, kept: Format, dtype: str, compute: str
) -> tuple[Product, ...]:
    """Of a rank, its routed experts and the head left out."""
    size, hidden, layers = float(BYTES_PER_ELEMENT[dtype]), spec.hidden, len(shard.layers)
    dense = sum(layer < spec.dense_layers for layer in shard.layers)
    small = (kept.bytes_per_weight(dtype), kept.width, compute)
    plain = (size, Width.FULL, dtype)
    attention = plain if kept.experts_only and spec.experts is not None else small
    heads = len(shard.heads)
    found: list[Product] = []

    def add(n: float, k: float, times: int, how: tuple[float, Width, str], *, gated: bool = False) -> None:
        found.append(Product(n, k, times, *how, gated=gated, kept=kept.weights if how is small else ""))

    def add_mlp(width: float, times: int) -> None:
        add(2 * width, hidden, times, small, gated=True)
        add(hidden, width, times, small)

    if spec.latent is None:
        add((heads + 2 * len(shard.kv_heads)) * spec.head_dim, hidden, layers, attention)
        add(hidden, heads * spec.head_dim, layers, attention)
    else:
        a, query = spec.latent, heads * (spec.latent.nope_dim + spec.latent.rope_dim)
        add(a.q_rank + a.cached, hidden, layers, attention)
        add(query, a.q_rank or hidden, layers, attention)
        # What the heads' keys and values are made of is multiplied into queries and outputs instead.
        add(heads * a.kv_rank, a.nope_dim, layers, attention)
        add(heads * a.v_dim, a.kv_rank, layers, attention)
        add(hidden, heads * a.v_dim, layers, attention)
    if dense:
        add_mlp(len(shard.mlp), dense)
    if spec.experts is not None and layers > dense:
        e, mixtures = spec.experts, layers - dense
        add(e.count, hidden, mixtures, plain)
        if e.shared:
            add_mlp(e.shared * e.intermediate / dims.tp, mixtures)
    return tuple(found)


def product_s(p: Product, rows: float, r: Rates, engine: Engine, prompt_share: float) -> tuple[float, float]:
    """(bytes' time, what FLOPs add to it) of one product. `prompt_share`: of the rows, that are prompts'."""
    k = engine.kernels
    slower = 1 + (engine.prompts - 1) * prompt_share
    if p.width is not Width.FULL and k.dot_rows:
        return _small_s(p, rows, r, k, slower)
    n_bytes = p.n * p.k * p.weight_bytes + 2 * rows * (p.n + p.k)
    if p.kept == SPARSE24 and k.pruned_reads:
        flops = 2 * max(rows, LEAST_ROWS) * p.n * p.k
        return joined(
            n_bytes / r.reading(k.pruned_reads), flops / r.computing(p.compute, k.pruned_compute / slower)
        )
    few = k.few_rows.get(p.width, 1.0) if rows <= FEW_ROWS else 1.0
    read = n_bytes / r.reading(k.weights[p.width] * few * engine.reads)
    share = k.compute[p.width]
    if p.width is Width.FULL and p.compute in r.products:
        whole = p.n * p.k * weight_s(r.products[p.compute], rows) * slower / (share * r.of_compute)
        return min(read, whole), max(0.0, whole - read)
    if p.width is not Width.FULL and p.compute in BYTES_PER_ELEMENT:  # small weights, widened in the kernel
        share = k.compute[Width.FULL] * WIDENED
    computed = 2 * max(rows, LEAST_ROWS) * p.n * p.k / r.computing(p.compute, share / slower)
    return joined(read, computed)


def _small_s(p: Product, rows: float, r: Rates, k: Kernels, slower: float) -> tuple[float, float]:
    """Of weights in fewer bits by our own kernels: up to some rows they are multiplied as they are, which takes their
    bytes or the widening of their codes, whichever is longer; beyond, float8 by float8, or all widened first."""
    weights, moved = p.n * p.k, 2 * rows * (p.n + p.k)
    flops = 2 * max(rows, LEAST_ROWS) * weights
    if p.compute not in BYTES_PER_ELEMENT and rows >= k.float8_rows:
        read = (weights * p.weight_bytes + moved) / r.reading(k.float8_reads)
        share = k.int8_compute if p.compute == "int8" else k.compute[p.width]
        return joined(read, flops / r.computing(p.compute, share / slower))
    dtype = p.compute if p.compute in BYTES_PER_ELEMENT else "bfloat16"
    by_wgmma = p.width is Width.FOUR and r.is_hopper and rows >= k.hopper_from and p.kept != GGUF
    if rows <= (k.hopper_rows if by_wgmma else k.dot_rows):
        is_few = rows <= (LEAST_ROWS if p.width is Width.FOUR and p.kept != GGUF else FEW_ROWS)
        codes = k.hopper_codes if by_wgmma else (k.few_codes if is_few else k.codes)[p.width]
        gap = k.hopper_gap_s if by_wgmma else k.few_gap_s.get(p.width, 0.0) if is_few else 0.0
        read = sum(
            joined(
                (weights * p.weight_bytes + moved) / r.reading(k.weights[p.width]),
                weights / (codes * r.flops["float32"] * r.of_compute),
            )
        )
        share = k.hopper_compute if by_wgmma else k.dot_compute[p.width]
        read, more = joined(read, flops / r.computing(dtype, share / slower))
        times = (k.few_blocks if is_few else k.blocks)[p.width] if p.kept == GGUF else 1.0
        return read * times, more * times + gap
    widened = weights * (p.weight_bytes + 2) / r.reading(k.widened_reads)
    if p.gated:  # SiLU reads the product and writes half as much: no kernel does it on the way
        widened += 2 * rows * 1.5 * p.n / r.reading(k.weights[Width.FULL])
    read, more = joined(
        (2 * weights + moved) / r.reading(k.weights[Width.FULL]),
        flops / r.computing(dtype, k.widened_compute / slower),
    )
    return widened + read, more


def weight_s(flops_per_s: Mapping[int, float], rows: float) -> float:
    """Of one weight in a product of so many rows: along a line between those timed, beyond at the last rate."""
    timed = sorted((n, 2 * n / rate) for n, rate in flops_per_s.items())
    (first, first_s), (last, last_s) = timed[0], timed[-1]
    if rows <= first:
        return first_s
    if rows >= last:
        return last_s * rows / last
    (a, a_s), (b, b_s) = next(pair for pair in pairwise(timed) if pair[1][0] > rows)
    return a_s + (b_s - a_s) * (rows - a) / (b - a)


def joined(read: float, computed: float) -> tuple[float, float]:
    """(the first, what the second adds to it)."""
    most = max(read, computed)
    if most <= 0:
        return 0.0, 0.0
    ratio = min(read, computed) / most
    return read, most * (1.0 + ratio**ROUNDING) ** (1 / ROUNDING) - read


def experts_s(place: Placement, shard: Shard, tokens: float, r: Rates, compute: str) -> tuple[float, float]:
    """(bytes' time, what FLOPs add) of a rank's routed experts in all mixtures of its layers.

    Of E experts, tokens that each take k at random hit E(1 − (1 − k/E)^tokens).
    """
    e = place.spec.experts
    assert e is not None
    dims, kept, engine = place.dims, place.format, place.engine
    k: Kernels = engine.kernels
    mixtures = sum(layer >= e.dense_layers for layer in shard.layers)
    if not mixtures:
        return 0.0, 0.0
    everyone = tokens * (dims.dp if dims.expert_ranks > dims.tp else 1)
    hit = e.count * (1 - (1 - e.per_token / e.count) ** everyone)
    each = everyone * e.per_token / max(hit, 1e-9)
    own = hit / dims.expert_ranks  # whole experts' worth on this rank
    params = 3 * place.spec.hidden * e.intermediate
    read = own * params * kept.bytes_per_weight(place.dtype) / r.reading(k.expert_weights[kept.width])
    tile = k.expert_tile if kept.compute is not None else WEIGHT_ONLY_TILE
    flops = own * 2 * params * max(each, tile)
    share = k.expert_compute[kept.width]
    if kept.compute is None and kept.width is not Width.FULL:
        share = k.expert_compute[Width.FULL] * WIDENED
    computed = flops / r.computing(compute, share)
    read, extra = joined(read * engine.experts, computed * engine.experts)
    moved = 3 * everyone * e.per_token / dims.ep * place.spec.hidden * BYTES_PER_ELEMENT[place.dtype]
    return mixtures * (read + moved / r.bandwidth), mixtures * extra


def rank_s(place: Placement, replica: int, rank: int, work: Pass, at_work: float) -> dict[str, float]:
    """Seconds of a rank's part of a pass, by cause; what its group shares is not in it."""
    spec, shard, device, engine = place.spec, place.shards[rank], place.device(replica, rank), place.engine
    k, dtype = engine.kernels, place.dtype
    r = rates(place, device, at_work)
    compute = compute_dtype(place.format, dtype, device)
    prompt_share = work.prompt_tokens / work.tokens
    weights = extra = 0.0
    gaps = 0.0
    for p in products(spec, shard, place.dims, place.format, dtype, compute):
        read, more = product_s(p, work.tokens, r, engine, prompt_share)
        weights, extra, gaps = weights + p.times * read, extra + p.times * more, gaps + p.times
    if shard.is_last and work.rows:
        size = float(BYTES_PER_ELEMENT[dtype])
        head = Product(len(shard.vocab), spec.hidden, 1, size, Width.FULL, dtype)
        read, more = product_s(head, work.rows, r, engine, 0.0)
        weights, extra, gaps = weights + read, extra + more, gaps + 1
    on = k.gaps_on.get(device.name, 1.0)
    host = gaps * k.product_gap_s * engine.launches * on
    if spec.experts is not None:
        read, more = experts_s(place, shard, work.tokens, r, compute)
        weights, extra = weights + read, extra + more
        mixtures = sum(layer >= spec.dense_layers for layer in shard.layers)
        host += mixtures * k.experts_gap_s * engine.launches * on
    layers = len(shard.layers)
    gap = k.attention_gap_s * engine.launches + (k.latent_gap_s if spec.latent is not None else 0.0)
    host += layers * gap * on
    if device.kind == "cpu":
        host += layers * engine.eager_layers * device.layer_overhead_s / device.free_share
    # Norms, rotation and residual sums read and write the hidden states; sampling reads the logits.
    other = layers * k.residual_passes * 2 * work.tokens * spec.hidden * BYTES_PER_ELEMENT[dtype]
    if shard.is_last:
        other += k.sampling_passes * work.rows * spec.vocab * 4
    host += other / r.bandwidth
    return {
        "weights": weights,
        "compute": extra,
        "kv": attention_s(place, shard, work, r),
        "host": host,
    }


def attention_s(place: Placement, shard: Shard, work: Pass, r: Rates) -> float:
    """Of decodes, the bytes of the cache (or, where it is latent, all heads' FLOPs on it); of prompts, the FLOPs."""
    spec, k, dtype = place.spec, place.engine.kernels, place.dtype
    layers, heads, kv_size = len(shard.layers), len(shard.heads), place.format.bytes_per_kv(place.dtype)
    seen = mean_window(spec, shard.layers, work.context) * work.decodes * layers
    if spec.latent is None:
        per_token = 2 * len(shard.kv_heads) * spec.head_dim * kv_size
        share = k.kv_float8 if place.format.has_float8_kv and k.kv_float8 else k.kv
        decode = seen * per_token / r.reading(share)
        per_pair = 4 * heads * spec.head_dim
    else:
        a = spec.latent
        read = seen * a.cached * kv_size / r.reading(k.kv)
        computed = 2 * seen * heads * (2 * a.kv_rank + a.rope_dim) / r.computing(dtype, LATENT_COMPUTE)
        decode = max(read, computed) * k.latent
        per_pair = 2 * heads * (a.nope_dim + a.rope_dim + a.v_dim)
    if not work.prompt_tokens:
        return decode
    pairs = mean_window(spec, shard.layers, work.seen) * work.prompt_tokens * layers
    return decode + pairs * per_pair * place.engine.prompts / r.computing(dtype, k.prompt_attention)


def mean_window(spec: ModelSpec, layers: range, context: float) -> float:
    """Tokens that a query sees, averaged over layers: less than the context where windows slide."""
    if not spec.windows:
        return context
    return sum(min(context, spec.windows[i] or context) for i in layers) / len(layers)
