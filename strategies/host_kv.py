"""Whether KV blocks that the device has no room for are worth keeping in host memory, and how much of it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from cluster.errors import BadLayout, UserError
from strategies.formats import Format
from strategies.plan import Shard
from strategies.spec import ModelSpec

MOST_GB = 10_000


@dataclass(frozen=True, slots=True)
class HostRoom:
    """What one rank says of the host memory that it is given."""

    blocks: int
    block_bytes: int
    bytes_per_s: float  # from host memory to the device, measured while all ranks copy
    flops_per_s: float | None  # of the device, at most; None: not known
    block_flops: float  # to compute a block anew

    @property
    def comes_s(self) -> float:
        """A block's way back."""
        return self.block_bytes / self.bytes_per_s

    @property
    def computed_s(self) -> float:
        """At least, to compute it again. Attention to what is before it comes on top."""
        return self.block_flops / self.flops_per_s if self.flops_per_s else float("inf")


def block_flops(spec: ModelSpec, shard: Shard, block_size: int) -> float:
    """Of a rank's products for the tokens of a block."""
    return 2.0 * spec.active_params * len(shard.layers) / spec.layers / shard.tp * block_size


def useful_blocks(rooms: Sequence[HostRoom]) -> int:
    """Blocks of every rank, 0 where computing them again is faster."""
    slowest = _slowest(rooms)
    return min(room.blocks for room in rooms) if slowest.comes_s < slowest.computed_s else 0


def told(rooms: Sequence[HostRoom], block_size: int) -> str:
    """What is done, and the arithmetic of it, of the rank where it pays least."""
    slowest, blocks = _slowest(rooms), useful_blocks(rooms)
    comes = (
        f"a block of {block_size} tokens comes back in {slowest.comes_s * 1e3:.3f} ms "
        f"({slowest.block_bytes / 1e6:.2f} MB at {slowest.bytes_per_s / 1e9:.1f} GB/s)"
    )
    if slowest.flops_per_s is None:
        computed = "what computing it takes is not known of this device"
    else:
        computed = (
            f"computing it takes {slowest.computed_s * 1e3:.3f} ms or more ({slowest.block_flops / 1e9:.1f} GFLOP at "
            f"{slowest.flops_per_s / 1e12:.4g} TFLOP/s)"
        )
    if not blocks:
        return f"no KV is kept in host memory, for {comes}, and {computed}"
    taken = max(room.block_bytes for room in rooms) * blocks
    size = f"{taken / 1e9:.1f} GB" if taken >= 10**8 else f"{taken / 1e6:.3g} MB"
    return f"host memory keeps {blocks * block_size} KV tokens more ({size} a rank): {comes}, {computed}"


def _slowest(rooms: Sequence[HostRoom]) -> HostRoom:
    return max(rooms, key=lambda room: room.comes_s / room.computed_s)


def check_asked(gb: float | None, *, prefix_caching: bool, has_blocks: bool) -> None:
    """`has_blocks`: the runtime has a paged cache. Raises UserError."""
    if gb is None:
        return
    if not 0 < gb <= MOST_GB:  # nan too
        raise UserError(f"--host-kv-gb is {gb:g}; it must be over 0 and at most {MOST_GB} GB")
    if not has_blocks:
        raise UserError(
            "--host-kv-gb keeps blocks of the paged KV cache, and the compatibility runtime has none; leave it "
            "away"
        )
    if not prefix_caching:
        raise UserError(
            "--host-kv-gb finds blocks by their prefix; leave it away, or --no-enable-prefix-caching"
        )


def check_block(
    gb: float, spec: ModelSpec, shards: Sequence[Shard], kept: Format, dtype: str, block_size: int
) -> None:
    """What each rank gets holds a block of it, as orchestrator/engine/kv_cache.py counts one. Raises BadLayout."""
    heads = max(len(shard.layers) * len(shard.kv_heads) for shard in shards)
    needed = round(2 * heads * spec.head_dim * block_size * kept.bytes_per_kv(dtype))
    if int(gb * 1e9) < needed:
        enough = (needed // 10_000 + 1) / 1e5
        raise BadLayout(
            f"--host-kv-gb {gb:g} holds no KV block: one of {block_size} tokens takes {needed / 1e6:.3g} MB of a rank; "
            f"give {enough:g} or more, or leave it away"
        )


def check_room(gb: float, ranks: int, available: int, node: str) -> None:
    """Locked memory cannot be swapped. Raises BadLayout."""
    needed = gb * 1e9 * ranks
    if needed > available:
        most = floor(available / 1e8 / ranks) / 10
        raise BadLayout(
            f"--host-kv-gb {gb:g} for {ranks} rank{'s' * (ranks > 1)} of {node} is {needed / 1e9:.1f} GB of host "
            f"memory, of which {available / 1e9:.1f} GB is available; give {most:.1f} or less"
        )
