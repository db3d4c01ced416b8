"""Offload: layers that do not fit stay in host memory, and come to the device ahead of their turn, at every step.

Two buffers hold them there: one's layer is at work while the other's is on its way. Every streamed layer has its own
buffer for good, so that its weights stay at one address, which CUDA graphs want. Steps begin and end alike: with the
first two streamed layers in the buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import BadLayout

THREADS, DEEPSPEED = "threads", "deepspeed"  # who reads layers from a disk
BUFFERS = 2
"""Streamed layers that are on the device at once: one at work, one on its way."""


@dataclass(frozen=True, slots=True)
class Streaming:
    """Which of a rank's layers are streamed: evenly among the resident ones, whose work hides a copy's way."""

    layers: int
    resident: int

    @property
    def streamed(self) -> tuple[int, ...]:
        """Local numbers of layers, in order."""
        count = self.layers - self.resident
        return tuple((i + 1) * self.layers // count - 1 for i in range(count))

    @property
    def buffers(self) -> int:
        return min(BUFFERS, self.layers - self.resident)

    def buffer_of(self, position: int) -> int:
        """Where the streamed layer of this position in `streamed` comes to."""
        return position % BUFFERS

    @property
    def order(self) -> list[int]:
        """The positions that are sent for in a step, one after another."""
        every = range(self.layers - self.resident)
        return [self.after(position) for position in every if self.after(position) != position]

    def after(self, position: int) -> int:
        """The position that comes next to the same buffer, in this step or as the next one's first."""
        following = position + BUFFERS
        return following if following < self.layers - self.resident else self.buffer_of(position)

    @property
    def moved(self) -> int:
        """Layers that come at every step: those that the buffers hold for good do not."""
        count = self.layers - self.resident
        return count if count > BUFFERS + 1 else 2 * max(0, count - BUFFERS)

    def step_s(self, layer_s: float, copy_s: float) -> float:
        """Of a step, where a layer's work takes so long and its copy so long: copies follow one another, each once its
        buffer is free, and a layer waits for its own. The step ends when the next one's first two have come."""
        now = link_free = 0.0
        landed = dict.fromkeys(range(self.buffers), 0.0)
        done = -1
        for position, layer in enumerate(self.streamed):
            now = max(now + (layer - done - 1) * layer_s, landed[position]) + layer_s
            done, following = layer, self.after(position)
            if following != position:
                link_free = max(link_free, now) + copy_s
                landed[following] = link_free
        return max(now + (self.layers - 1 - done) * layer_s, link_free)


@dataclass(frozen=True, slots=True)
class Room:
    """What offloading leaves on a device beside weights, and what somebody said of it."""

    longest: int = 0  # tokens of cache that a replica must have
    cached: int = 0  # that it should have, for all sequences at once
    resident: int | None = None  # layers of each rank that stay; None: as many as fit
    on_disk: bool = False  # the others lie there, not in host memory
    disk_bytes_per_s: float | None = None  # that it reads, for all ranks together; None: not known
    host_kv_bytes: int = 0  # of host memory, that each rank takes for KV beside them


def resident_layers(layers: int, layer_bytes: int, room: int, spare: int = 0) -> int:
    """As many as fit beside the buffers; all of them need none. `spare`: bytes beside the room that a smaller cache
    would leave. Raises BadLayout."""
    fit = room // layer_bytes
    if fit >= layers:
        return layers
    if fit < BUFFERS <= (room + spare) // layer_bytes:
        return 0
    if fit < BUFFERS:
        raise BadLayout(
            f"+offload needs {BUFFERS} layers of {layer_bytes / 1e9:.2f} GB on a device at once, and {room / 1e9:.2f} "
            "GB is left beside the tables, activations and the cache; lower --max-num-batched-tokens or "
            "--max-model-len, or split over more devices"
        )
    return int(fit) - BUFFERS


def check_host(needed: int, available: int) -> None:
    """Pinned memory cannot be swapped. Raises BadLayout."""
    if needed > available:
        raise BadLayout(
            f"+offload keeps {needed / 1e9:.1f} GB of weights in host memory, of which {available / 1e9:.1f} GB is "
            "available; use more devices, weights in fewer bits such as +int8+offload, or a disk: --offload-dir FOLDER"
        )


def check_disk(needed: int, free: int, folder: str) -> None:
    """Raises BadLayout."""
    if needed > free:
        raise BadLayout(
            f"+offload keeps {needed / 1e9:.1f} GB of weights in {folder}, which has room for "
            f"{free / 1e9:.1f} GB; use another --offload-dir, or more devices"
        )
