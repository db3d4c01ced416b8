"""`shardwise doctor`: what is here, what is wrong with it, and the fix. It starts and changes nothing."""

from __future__ import annotations

import argparse
import json
import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from cluster.discover import cpu_topology, gpu_topology
from cluster.nvml import Gpu
from cluster.topology import Topology
from launch.facts import gather
from launch.findings import Finding, MachineFacts, Severity, findings
from launch.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

STOPS_A_LAUNCH = 3  # exit code
PATIENCE_S = 2.0  # after which a silent wait is explained
GB = 1e9
MARK = {
    Severity.ERROR: "[red]✗ error[/]",
    Severity.WARNING: "[yellow]! warning[/]",
    Severity.INFO: "[dim]· info[/]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    with _explained("asking the NVIDIA driver: without persistence mode it takes seconds to load"):
        facts = gather()
    found = findings(facts)
    if args.json:
        print(json.dumps(to_json(found), indent=2))
    else:
        show(facts, found)
    return 0 if ok(found) else STOPS_A_LAUNCH


def ok(found: Sequence[Finding]) -> bool:
    return all(finding.severity is not Severity.ERROR for finding in found)


def to_json(found: Sequence[Finding]) -> dict[str, object]:
    return {"ok": ok(found), "findings": [asdict(finding) for finding in found]}


@contextmanager
def _explained(line: str) -> Iterator[None]:
    """Says `line` on standard error if the block takes long."""
    timer = threading.Timer(PATIENCE_S, Progress().say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- one screen for people ----------------------------------------------------------------------------------


def show(facts: MachineFacts, found: Sequence[Finding]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if facts.gpus:
        topology = gpu_topology(facts.report, facts.gpus, peer_access=facts.peer_access)
        console.print(_gpus(facts.gpus))
        if len(facts.gpus) > 1:
            console.print(_links(topology))
    else:
        topology = cpu_topology(cpu=facts.cpu)
    console.print(f"machine  {topology.name}")
    console.print(f"host     {_host(facts)}")
    console.print(f"software {_software(facts)}")
    console.print()
    for finding in found:
        console.print(f"{MARK[finding.severity]} [bold]{finding.subject}[/]: {finding.evidence}")
        console.print(f"    fix: {finding.fix}", style="dim")
    errors = sum(finding.severity is Severity.ERROR for finding in found)
    console.print("nothing here stops a launch" if not errors else f"{errors} of these stop a launch")


def _gpus(gpus: Sequence[Gpu]) -> Table:
    from rich.table import Table

    table = Table("GPU", "name", "GB", "GB free", "PCIe now / most", "NVLink lanes", "address", box=None)
    for gpu in gpus:
        table.add_row(
            str(gpu.index),
            gpu.name,
            f"{gpu.memory_bytes / GB:.1f}",
            f"{gpu.free_bytes / GB:.1f}",
            f"{_slot(gpu.pcie_generation, gpu.pcie_lanes)} / "
            f"{_slot(gpu.pcie_generation_max, gpu.pcie_lanes_max)}",
            str(gpu.nvlink_lanes or "–"),
            gpu.pci,
        )
    return table


def _slot(generation: int | None, lanes: int | None) -> str:
    return f"{generation or '?'}×{lanes or '?'}"


def _links(topology: Topology) -> Table:
    """Kind of link and its expected bandwidth, for each pair."""
    from rich.table import Table

    devices = range(len(topology.devices))
    table = Table("link, GB/s", *(str(j) for j in devices), box=None)
    for i in devices:
        cells = []
        for j in devices:
            link = topology.link(i, j) if i != j else None
            cells.append(f"{link.kind} {link.bytes_per_s / GB:.0f}" if link else "–")
        table.add_row(str(i), *cells)
    return table


def _host(facts: MachineFacts) -> str:
    shm = "none" if facts.shm_bytes is None else f"{facts.shm_bytes / GB:.1f} GB free"
    return (
        f"{facts.cpu.name}, {facts.cpu.cores} cores; memory {facts.cpu.free_bytes / GB:.1f} of "
        f"{facts.cpu.memory_bytes / GB:.1f} GB free; {facts.disk_path} {facts.disk_free_bytes / GB:.0f} of "
        f"{facts.disk_bytes / GB:.0f} GB free; /dev/shm {shm}"
    )


def _software(facts: MachineFacts) -> str:
    built = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPU build"
    shown = {name: found for name, found in facts.versions.items() if found}
    if "torch" in shown:
        shown["torch"] = f"{shown['torch']} ({built})"
    if "ray" in shown:
        shown["ray"] = f"{shown['ray']} (auth: {facts.ray_auth_mode or 'token, its default'})"
    if facts.report.driver:
        shown["driver"] = f"{facts.report.driver} (CUDA {'.'.join(map(str, facts.report.cuda))})"
    return "; ".join(
        [f"Python {platform.python_version()}", *(f"{name} {text}" for name, text in shown.items())]
    )
