"""The memory that a plan or a process may go by, where that is less than there is: of each GPU, and of each host."""

from __future__ import annotations

import argparse
from dataclasses import replace

from cluster.errors import UserError
from cluster.files import LOG
from cluster.topology import Topology
from strategies.cost_memory import CAP_SLACK
from strategies.engines import Engine

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


def capped(topology: Topology, device_gb: float | None, host_gb: float | None = None) -> Topology:
    """With GPUs of no more memory than a process may take of each, and hosts of as much as was said."""
    if host_gb is not None:
        nodes = dict.fromkeys(device.node for device in topology.devices)
        topology = replace(topology, host_bytes=dict.fromkeys(nodes, int(host_gb * 1e9)))
    if device_gb is None:
        return topology
    most = int(device_gb * 1e9)
    devices = tuple(
        replace(
            d,
            memory_bytes=min(most, d.memory_bytes),
            free_bytes=min(most, d.free_bytes),
            uncapped_bytes=d.free_bytes,
        )
        if d.kind != "cpu"
        else d
        for d in topology.devices
    )
    return replace(topology, devices=devices)


def sharing(engine: Engine, device_gb: float | None, utilization: float | None = None) -> Engine:
    """The engine told what share of a device's memory it takes: of a cap all but the slack."""
    if device_gb is not None:
        return replace(engine, memory_share=1 - CAP_SLACK)
    return engine if utilization is None else replace(engine, memory_share=utilization)
