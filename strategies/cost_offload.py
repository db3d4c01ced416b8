"""What weights from host memory cost: over each card's own slot, all cards of a node at once, beside the layers' work.

A step waits for what its links bring; how much of that its work hides is reckoned copy by copy (strategies/offload.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.topology import Device
from strategies.cost_memory import Memory
from strategies.offload import Streaming
from strategies.plan import Placement

HOST_MEMORY_BYTES_PER_S = 50e9
"""What host memory gives all cards of a node together, where that was not measured: two channels, as desktops have."""
HOST_LINK_BYTES_PER_S = 12e9  # of one card, where nothing is known of its slot: eight lanes of PCIe 4.0


@dataclass(frozen=True, slots=True)
class Pulled:
    """A stage's layers that come from host memory, those of its slowest rank."""

    streaming: Streaming
    copy_s: float  # of one layer
    beside: bool  # whether layers work meanwhile; a CPU copies by itself

    def behind(self, sums_s: float) -> Pulled:
        """Where the same link carries a pass's sums: 70B's prompts in int8 at tp2 took 588 ms a step, where
        the copies alone are 333 and the sums, by their curve, 198 (two H100s, 2026-11-23)."""
        return replace(self, copy_s=self.copy_s + sums_s / max(1, self.streaming.moved))

    def step_s(self, work_s: float) -> float:
        """Of a pass whose layers would take so long together."""
        if not self.beside:
            return work_s + self.streaming.moved * self.copy_s
        return self.streaming.step_s(work_s / self.streaming.layers, self.copy_s)


Pulls = Sequence[Pulled | None]
"""By stage; None: all its layers are on their devices."""


def pulls(place: Placement, replica: int, needs: Sequence[Memory], at_work: float = 1.0) -> Pulls:
    """`at_work`: the share of the layout's ranks that work, and so pull, at the same moment."""
    tp, size = place.dims.tp, place.dims.replica_size
    own = needs[replica * size : (replica + 1) * size]
    if not place.offload or not any(need.streamed for need in own):
        return [None] * place.dims.pp
    streaming = [i for i, need in zip(place.devices, needs, strict=True) if need.streamed]
    return [
        max(
            (
                _pulled(place, replica, rank, own[rank], streaming, at_work)
                for rank in range(s * tp, (s + 1) * tp)
            ),
            key=lambda one: one.streaming.moved * one.copy_s if one else 0.0,
        )
        for s in range(place.dims.pp)
    ]


def _pulled(
    place: Placement, replica: int, rank: int, need: Memory, streaming: Sequence[int], at_work: float
) -> Pulled | None:
    if need.streaming is None or not need.streamed:
        return None
    device = place.device(replica, rank)
    beside = sum(place.topology.devices[i].node == device.node for i in streaming)
    pulling = max(1, math.ceil(beside * at_work))
    rate = host_rate(device, pulling)
    beside_work = device.kind != "cpu"
    if place.room.disk_bytes_per_s is not None:  # whose threads read ahead anywhere
        rate, beside_work = min(rate, place.room.disk_bytes_per_s / pulling), True
    return Pulled(need.streaming, need.layer / rate, beside_work)


def host_rate(device: Device, pulling: int) -> float:
    """Bytes/s to a card while so many of its node pull; what all of them did at once counts for a few as well."""
    if device.kind == "cpu":  # read and written
        return device.bandwidth_bytes_per_s / 2 / pulling
    alone = device.host_bytes_per_s or HOST_LINK_BYTES_PER_S
    if pulling == 1:
        return alone
    together = device.host_together_bytes_per_s
    return together if together is not None else min(alone, HOST_MEMORY_BYTES_PER_S / pulling)


def with_waits(parts: Mapping[str, float], pulled: Pulled | None) -> dict[str, float]:
    """A stage's seconds by cause, with those in which its devices wait for layers."""
    if pulled is None:
        return dict(parts)
    work_s = sum(parts.values())
    return {**parts, "offload": max(0.0, pulled.step_s(work_s) - work_s)}
