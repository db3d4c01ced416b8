"""Offload: layers that do not fit stay in host memory, and come to the device ahead of their turn, at every step.

Two buffers hold them there: one's layer is at work while the other's is on its way. Every streamed layer has its own
buffer for good, so that its weights stay at one address, which CUDA graphs want. Steps begin and end alike: with the
first two streamed layers in the buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import BadLayout

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


def resident_layers(layers: int, layer_bytes: int, room: int) -> int:
    """As many as fit beside the buffers; all of them need none. Raises BadLayout."""
    fit = room // layer_bytes
    if fit >= layers:
        return layers
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
            f"+offload keeps {needed / 1e9:.1f} GB of a rank's weights in {folder}, which has room for "
            f"{free / 1e9:.1f} GB; use another --offload-dir, or more devices"
        )
