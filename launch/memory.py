"""The memory that a plan or a process may go by, where that is less than there is: of each GPU, and of each host."""

from __future__ import annotations

import argparse
from dataclasses import replace

from cluster.errors import UserError
from cluster.files import LOG
from cluster.topology import Device, Topology
from strategies.cost_memory import CAP_SLACK, GAP_BYTES

MOST_GB = 10_000.0


def add_memory_arguments(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device-memory-gb",
        type=float,
        metavar="GB",
        help="of each GPU's memory, that a process may take, CUDA's context and NCCL in it; in place of the share",
    )
    parser.add_argument(
        "--host-memory-gb",
        type=float,
        metavar="GB",
        help="of each host's memory, that offloaded weights and KV may be locked in; default: what is available",
    )


def check_memory(args: argparse.Namespace) -> None:
    """Raises UserError."""
    for flag in ("device_memory_gb", "host_memory_gb"):
        value = getattr(args, flag)
        if value is not None and not 1 <= value <= MOST_GB:  # nan too
            raise UserError(f"--{flag.replace('_', '-')} is {value:g}; it must be from 1 to {MOST_GB:.0f} GB")


def check_device_memory(gb: float | None, device: str, *, asked: str = "auto") -> None:
    """Where the devices turn out to be CPUs a line says that it is for nothing. Raises UserError where a CPU was
    asked for."""
    if gb is None or device != "cpu":
        return
    if asked == "cpu":
        raise UserError(
            f"--device-memory-gb {gb:g} is of GPUs; leave it away with --device cpu, where --num-gpu-blocks-override "
            "bounds the KV cache"
        )
    LOG.warning("--device-memory-gb %g is of GPUs, and there is none: it changes nothing", gb)


def capped(
    topology: Topology, device_gb: float | None, host_gb: float | None = None, *, share: float = 1.0
) -> Topology:
    """With GPUs of no more free memory than an engine takes of each, and hosts of as much as was said.

    `share`: of all of a GPU's memory, less torch's gaps; where `device_gb` caps it, all of that but the slack.
    """
    if host_gb is not None:
        nodes = dict.fromkeys(device.node for device in topology.devices)
        topology = replace(topology, host_bytes=dict.fromkeys(nodes, int(host_gb * 1e9)))
    return replace(topology, devices=tuple(_capped(d, device_gb, share) for d in topology.devices))


def _capped(device: Device, gb: float | None, share: float) -> Device:
    if device.kind == "cpu":
        return device
    most = device.memory_bytes if gb is None else min(int(gb * 1e9), device.memory_bytes)
    left = (1 - share) * most + GAP_BYTES if gb is None else CAP_SLACK * most
    free = max(0, int(min(most, device.free_bytes) - left))
    return replace(device, memory_bytes=most, free_bytes=free, uncapped_bytes=device.free_bytes)
