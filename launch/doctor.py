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

from rich.markup import escape

from cluster.discover import numa_node
from cluster.paths import Op, best_path
from cluster.profile import MachineProfile
from cluster.topology import Topology
from launch.checks import findings
from launch.facts import gather, topology_of
from launch.findings import GB, Finding, MachineFacts, Severity
from launch.machine import cache_directory
from launch.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

STOPS_A_LAUNCH = 3  # exit code
SMALL_BYTES = 16 << 10  # a decode step's sum
WIDTH = 140  # where the output is no terminal
PATIENCE_S = 2.0  # after which a silent wait is explained
MARK = {
    Severity.ERROR: "[red]✗ error[/]",
    Severity.WARNING: "[yellow]! warning[/]",
    Severity.INFO: "[dim]· info[/]",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    with _explained("asking the NVIDIA driver: without persistence mode it takes seconds to load"):
        facts = gather(cache_directory())
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
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=WIDTH)
    topology = topology_of(facts)
    if facts.gpus:
        console.print(_gpus(facts))
        if len(facts.gpus) > 1:
            console.print(_links(facts, topology))
    console.print(f"machine  {topology.name}")
    console.print(f"host     {_host(facts)}")
    console.print(f"software {_software(facts)}")
    console.print(f"measured {_measured(facts)}")
    console.print(f"proved   {_proved(facts)}")
    console.print()
    for finding in found:
        console.print(f"{MARK[finding.severity]} [bold]{finding.subject}[/]: {escape(finding.evidence)}")
        console.print(f"    fix: {escape(finding.fix)}", style="dim")
    errors = sum(finding.severity is Severity.ERROR for finding in found)
    console.print("nothing here stops a launch" if not errors else f"{errors} of these stop a launch")


def _gpus(facts: MachineFacts) -> Table:
    from rich.table import Table

    columns = (
        "GPU",
        "name",
        "GB",
        "GB free",
        "MHz / most",
        "°C",
        "W limit",
        "PCIe now / most",
        "NVLink lanes",
        "NUMA",
        "address",
    )
    table = Table(*columns, box=None)
    for gpu in facts.gpus:
        table.add_row(
            str(gpu.index),
            gpu.name,
            f"{gpu.memory_bytes / GB:.1f}",
            f"{gpu.free_bytes / GB:.1f}",
            f"{_or(gpu.sm_clock_mhz)} / {_or(gpu.sm_clock_mhz_max)}",
            _or(gpu.temperature_c),
            "?" if gpu.watts_limit is None else f"{gpu.watts_limit:.0f}",
            f"{_slot(gpu.pcie_generation, gpu.pcie_lanes)} / {_slot(gpu.pcie_generation_max, gpu.pcie_lanes_max)}",
            f"{gpu.nvlink_lanes}{' to a switch' if gpu.nvlink_switched else ''}" if gpu.nvlink_lanes else "–",
            str(numa_node(gpu.pci)),
            gpu.pci,
        )
    return table


def _or(value: int | None) -> str:
    return "?" if value is None else str(value)


def _slot(generation: int | None, lanes: int | None) -> str:
    return f"{_or(generation)}×{_or(lanes)}"


def _links(facts: MachineFacts, topology: Topology) -> Table:
    """For each pair: over the diagonal what the driver says, under it what was measured."""
    from rich.table import Table

    devices = range(len(topology.devices))
    table = Table("link", *(str(j) for j in devices), box=None)
    for i in devices:
        table.add_row(str(i), *(_cell(facts, topology, i, j) for j in devices))
    table.caption = (
        "above the diagonal: kind and GB/s to expect; below: GB/s that copies took, – where none was timed"
    )
    table.caption_justify = "left"
    return table


def _cell(facts: MachineFacts, topology: Topology, i: int, j: int) -> str:
    if i == j:
        return "·"
    if i < j:
        link = topology.link(i, j)
        return f"{link.kind} {link.bytes_per_s / GB:.0f}"
    copies = facts.measured.pair_copies if facts.measured else ()
    rate = min((c.bytes_per_s for c in copies if {c.source, c.target} == {i, j}), default=None)
    return "–" if rate is None else f"{rate / GB:.0f}"


def _measured(facts: MachineFacts) -> str:
    found = facts.measured
    if found is None:
        return "never, in full: shardwise profile"
    words = [f"{found.measured_at[:10]}"]
    read = ", ".join(f"{detail.read_bytes_per_s / GB:,.0f}" for detail in found.details)
    words.append(f"memory {read} GB/s")
    count = len(found.devices)
    for ranks in sorted({2, count} if count > 1 else ()):
        words += _small_sum(found, ranks)
    return "; ".join(words)


def _small_sum(found: MachineProfile, ranks: int) -> list[str]:
    """In a graph where that was timed."""
    for in_graph in (True, False):
        small = best_path(found.curves, Op.ALL_REDUCE, ranks, SMALL_BYTES, in_graph)
        if small is not None:
            where = " in a graph" if in_graph else ""
            over = f" over {ranks} devices" if len(found.devices) > 2 else ""
            return [f"16 KB summed by {small.path}{where} in {small.seconds * 1e6:.1f} µs{over}"]
    return []


def _proved(facts: MachineFacts) -> str:
    if facts.proof is None:
        several = len(facts.gpus) > 1
        return (
            "nothing yet: a start over several GPUs does, or shardwise profile"
            if several
            else "nothing to prove"
        )
    told = "".join(f"; {name}={value}" for name, value in facts.proof.environment.items())
    return (
        f"{facts.proof.proved_at[:10]}: {', '.join(facts.proof.paths) or 'no path between the devices'}{told}"
    )


def _host(facts: MachineFacts) -> str:
    shm = "none" if facts.shm_bytes is None else f"{facts.shm_bytes / GB:.1f} GB free"
    wire = facts.network
    network = f"; network {wire.bytes_per_s * 8 / 1e9:g} Gb/s ({wire.name})" if wire else ""
    return (
        f"{facts.cpu.name}, {facts.cpu.cores} cores; memory {facts.cpu.free_bytes / GB:.1f} of "
        f"{facts.cpu.memory_bytes / GB:.1f} GB free; {facts.disk_path} {facts.disk_free_bytes / GB:.0f} of "
        f"{facts.disk_bytes / GB:.0f} GB free; /dev/shm {shm}{network}"
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
