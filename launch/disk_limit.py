"""What a disk allows a layout that streams from it, before anything is loaded."""

from __future__ import annotations

import os

from cluster.errors import UserError
from cluster.topology import Topology
from launch.configured import priced_engine, room_of
from launch.options import EngineOptions
from launch.progress import Progress
from strategies.cost_memory import memories, work_bytes
from strategies.formats import Format
from strategies.offload import Streaming
from strategies.place import place
from strategies.plan import Candidate, Shard
from strategies.quantize import as_kept
from strategies.spec import Workload


def tell_disk(
    options: EngineOptions, chosen: Candidate, topology: Topology, workload: Workload, progress: Progress
) -> None:
    """Reads from the disk for a moment. Raises UserError where the folder cannot be written to."""
    from cluster.copy_probes import disk_read

    assert options.offload_dir is not None
    n_bytes = streamed_bytes(options, chosen, topology, workload)
    try:
        os.makedirs(options.offload_dir, exist_ok=True)
        found = disk_read(str(options.offload_dir)) if n_bytes else None
    except OSError as error:
        raise UserError(
            f"--offload-dir {options.offload_dir}: {error.strerror}; give a folder on a disk with room"
        ) from None
    if found is not None:  # else the start refuses it, by how much is missing
        progress.say(limit(chosen.layout.name, n_bytes, found.bytes_per_s))


def limit(name: str, n_bytes: int, bytes_per_s: float) -> str:
    return (
        f"{name}: {n_bytes / 1e9:.2f} GB come from the disk at every step, which reads {bytes_per_s / 1e9:.2f} GB/s: "
        f"one request gets {bytes_per_s / n_bytes:.2f} tokens/s at most"
    )


def streamed_bytes(options: EngineOptions, chosen: Candidate, topology: Topology, workload: Workload) -> int:
    """Of all ranks that read the disk for one step of a replica, and of the replicas that do so beside it."""
    if options.resident_layers is None:
        priced, room = priced_engine(options), room_of(options)
        placed = place(options.spec, chosen.layout, options.dtype, topology, priced, workload, room)
        return sum(need.streamed for need in memories(placed, workload))
    kept = as_kept(options.spec, chosen.layout.format, options.device)
    return chosen.dims.dp * sum(
        _beyond(options, shard, kept, options.resident_layers) for shard in chosen.shards
    )


def _beyond(options: EngineOptions, shard: Shard, kept: Format, resident: int) -> int:
    needs = work_bytes(options.spec, shard, options.dtype, kept, tokens=1, rows=1, cached=0)
    layers = len(shard.layers)
    return len(Streaming(layers, min(layers, resident)).order) * needs.layer
