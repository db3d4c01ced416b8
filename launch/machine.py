"""The machine that this process is on: devices, as the environment lets us see them, and what was measured of it."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.topology import Topology


def peers_allowed() -> bool:
    """Whether NCCL, and so everything else, may use GPUs' access to each other's memory."""
    return os.environ.get("NCCL_P2P_DISABLE", "0") != "1"


def cache_directory() -> Path:
    """Where what was measured and proved is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardwise"


def found_here(
    device: str | None = None, *, cpu_ranks: int | None = None, peer_access: bool | None = None
) -> Topology:
    """`device`: "cpu" or "cuda", by default GPUs if there are any; `cpu_ranks`: one a core by default."""
    from cluster.discover import discover  # reads NVML: a tenth of a second that --help need not take

    return discover(
        cpu_ranks,
        device,
        peer_access=peers_allowed() if peer_access is None else peer_access,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def visible_here() -> list[int]:
    """Numbers of the GPUs that this process may use, as the driver's tools count them."""
    from cluster.discover import report_here, visible_gpus

    report, visible = report_here(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [gpu.index for gpu in visible_gpus(report.gpus, visible)]


def as_measured(topology: Topology, dtype: str) -> Topology:
    """With this machine's profile in place of priors, where one was kept."""
    from cluster.profile import apply, kept

    profile = kept(cache_directory(), topology)
    return topology if profile is None else apply(profile, topology, dtype)
