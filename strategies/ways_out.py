"""When no layout fits: how far from fitting it is, in context, in cards and in bits a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cluster.errors import BadLayout
from cluster.topology import Device, Topology
from strategies.cost_memory import Memory, memories
from strategies.engines import OURS, engine
from strategies.place import count, gb, shards
from strategies.plan import ParallelDims, Placement
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec, Workload

_MOST_CARDS = 64
_MOST_TP = 8  # ranks of one node
# Bits a weight takes with its scales: int8 by block, int4 in groups of 32 to 128 (GPTQ, AWQ, Q4_K files).
_QUANTIZED_BITS = {"int8": 8.5, "int4": 4.5}
_ONE_REQUEST = Workload(concurrency=1)  # memory depends on a workload by its concurrency alone


def ways_out(spec: ModelSpec, topology: Topology, dtype: str, length: int) -> tuple[str, ...]:
    """Sentences, nearest way first. `length` is the context, in tokens, that had to fit."""
    best = max(topology.devices, key=lambda device: device.free_bytes)
    held = [_replica(spec, tp, pp, dtype, best) for tp, pp in _splits(len(topology.devices))]
    fitted = [placement for placement in held if placement is not None]
    ways = [
        _shorter_context(fitted),
        _more_memory(spec, dtype, best, len(topology.devices), length),
        _fewer_bits(fitted, length),
    ]
    return (f"No layout of {spec.name} fits {topology.name}.", *(way for way in ways if way))


def _splits(devices: int) -> Iterator[tuple[int, int]]:
    """(tp, pp) of one replica over at most so many devices."""
    for pp in range(1, devices + 1):
        for tp in range(1, min(devices // pp, _MOST_TP) + 1):
            yield tp, pp


def _replica(spec: ModelSpec, tp: int, pp: int, dtype: str, device: Device) -> Placement | None:
    """A replica on tp × pp devices like `device`, for its memory; None where the model cannot be split."""
    n = tp * pp
    try:
        parts = shards(spec, tp, pp, (1.0,) * pp)
    except BadLayout:
        return None
    machine = Topology("", tuple(replace(device, index=i) for i in range(n)))
    return Placement(spec, ParallelDims(tp, pp), dtype, parts, machine, tuple(range(n)), engine(OURS))


def _needs(placement: Placement) -> list[Memory]:
    return memories(placement, _ONE_REQUEST)


def _kv_tokens(needs: list[Memory], weight_ratio: float = 1.0) -> int:
    """Tokens of KV cache that fit the fullest rank, were its weights so much smaller."""
    return min((n.free - n.fixed + int(n.weights * (1 - weight_ratio))) // n.kv_per_token for n in needs)


def _shorter_context(fitted: list[Placement]) -> str | None:
    tokens, name = max(((_kv_tokens(_needs(p)), p.dims.name) for p in fitted), default=(0, ""))
    if tokens <= 0:
        return None
    return f"Shorter context: {name} has room for {tokens:,} tokens of prompt and output."


def _more_memory(spec: ModelSpec, dtype: str, device: Device, have: int, length: int) -> str | None:
    if device.pool:
        alone = _replica(spec, 1, 1, dtype, device)
        assert alone is not None, "tp1 splits nothing"
        (need,) = _needs(alone)
        total = need.fixed + length * need.kv_per_token
        return f"More memory: tp1 needs {gb(total)} free on the host, which has {gb(device.free_bytes)}."
    least = spec.total_params * BYTES_PER_ELEMENT[dtype] // device.free_bytes
    for n in range(max(have, least) + 1, _MOST_CARDS + 1):
        even = [tp for tp in range(min(n, _MOST_TP), 0, -1) if n % tp == 0 and spec.kv_heads % tp == 0]
        for tp in even:
            placement = _replica(spec, tp, n // tp, dtype, device)
            if placement is not None and _kv_tokens(_needs(placement)) >= length:
                fullest = max(m.fixed + length * m.kv_per_token for m in _needs(placement))
                return (
                    f"More cards: {count(n, 'such card')} would hold it as {placement.dims.name}, "
                    f"{gb(fullest)} of the {gb(device.free_bytes)} free on each."
                )
    return None


def _fewer_bits(fitted: list[Placement], length: int) -> str | None:
    """What quantized weights would take; the layouts planned here keep the model's precision."""
    told = []
    for kind, bits in _QUANTIZED_BITS.items():
        found = []
        for placement in fitted:
            needs, ratio = _needs(placement), bits / 8 / BYTES_PER_ELEMENT[placement.dtype]
            found.append(
                (_kv_tokens(needs, ratio), ratio * sum(n.weights for n in needs), placement.dims.name)
            )
        tokens, weights, name = max(found, default=(0, 0.0, ""))
        if not name:
            return None
        room = f"room for {tokens:,} tokens beside them over {name}" if tokens >= length else "still too much"
        told.append(
            f"{kind} ({bits} bits a weight with its scales) would make the weights {gb(weights)}, {room}"
        )
    return f"Fewer bits: {'; '.join(told)}. That is what it would need: layouts here do not quantize."
