"""What a disk allows a layout that streams from it, before anything is loaded: this machine's, or each node's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.gang import Call, results
from cluster.topology import Topology
from launch.configured import priced_engine, room_of
from launch.options import EngineOptions
from launch.placed import CALL_TIMEOUT_S, Placed, everywhere
from launch.progress import Progress
from strategies.cost_memory import memories, work_bytes
from strategies.formats import Format
from strategies.offload import Streaming, check_disk
from strategies.place import place
from strategies.plan import Candidate, Shard
from strategies.quantize import as_kept
from strategies.spec import Workload

if TYPE_CHECKING:
    from orchestrator.engine.residence import DiskRoom

COMPILE_TIMEOUT_S = 3600.0  # a quarter of an hour on two busy cores


def tell_disk(
    options: EngineOptions, chosen: Candidate, topology: Topology, workload: Workload, progress: Progress
) -> float | None:
    """Reads from the disk for a moment; bytes/s, None where nothing reads it or it has no room. Raises UserError where
    the folder cannot be written to."""
    n_bytes = streamed_bytes(options, chosen, topology, workload)
    rate = disk_rate(options, reads=n_bytes > 0)
    if rate is not None:  # else the start refuses it, by how much is missing
        progress.say(limit(chosen.layout.name, n_bytes, rate))
    return rate


def disk_rate(options: EngineOptions, *, reads: bool = True) -> float | None:
    """Bytes/s that the disk of --offload-dir reads now; None without room. Raises UserError where nothing can be
    written, whether or not anything `reads`."""
    from cluster.copy_probes import disk_read

    assert options.offload_dir is not None
    try:
        options.offload_dir.mkdir(exist_ok=True)
        found = disk_read(str(options.offload_dir)) if reads else None
    except OSError as error:
        raise UserError(
            f"--offload-dir {options.offload_dir}: {error.strerror}; give a folder on a disk with room"
        ) from None
    return None if found is None else found.bytes_per_s


def check_disks(placed: Sequence[Placed], name: str, options: EngineOptions, progress: Progress) -> None:
    """Each node's disk has room for what its ranks keep; in a cluster what it allows is told. Raises BadLayout."""
    timed = options.address is not None  # else it was, before anything was started
    by_node: dict[str, list[Call]] = {}
    nodes: dict[str, str] = {}
    for replica in placed:
        for rank in range(len(replica.ranks)):
            member = replica.member(rank)
            calls = by_node.setdefault(member.node_id, [])
            calls.append(replica.call(rank, "disk_room", timed and not calls))
            nodes[member.node_id] = member.node
    for node_id, calls in by_node.items():
        rooms: list[DiskRoom] = results(calls, CALL_TIMEOUT_S)
        node, rate = nodes[node_id], rooms[0].bytes_per_s
        folder = f"{options.offload_dir} of {node}" if timed else str(options.offload_dir)
        check_disk(sum(room.file_bytes for room in rooms), rooms[0].free_bytes, folder)
        n_bytes = sum(room.step_bytes for room in rooms)
        if rate is not None and n_bytes:
            progress.say(limit(name, n_bytes, rate, f"the disk of {node}"))


def open_reads(placed: Sequence[Placed], name: str, progress: Progress) -> None:
    """Every rank's DeepSpeed, compiled where it never was. Where it cannot be, it is said who reads instead."""
    with progress.waiting(
        f"{name}: making DeepSpeed's asynchronous I/O ready; to compile it takes minutes, once"
    ):
        reasons = results(everywhere(placed, "open_reads"), COMPILE_TIMEOUT_S)
    for reason in dict.fromkeys(reasons):
        if reason:
            progress.say(f"{name}: threads read in place of DeepSpeed's asynchronous I/O: {reason}")


def limit(name: str, n_bytes: int, bytes_per_s: float, disk: str = "the disk") -> str:
    return (
        f"{name}: {n_bytes / 1e9:.2f} GB come from {disk} at every step, which reads {bytes_per_s / 1e9:.2f} GB/s: "
        f"one request gets about {bytes_per_s / n_bytes:.2f} tokens/s"
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
