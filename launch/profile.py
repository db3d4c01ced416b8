"""`shardwise profile`: proves the links, then times all that the planner prices. Under a minute on two GPUs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import TYPE_CHECKING

import msgspec

from cluster.errors import UserError
from cluster.files import write_whole
from cluster.measure import measure
from cluster.paths import Curve, Op, Path, best_path, crossovers
from cluster.profile import MachineProfile, apply, save
from cluster.proof import Outcome, Proof, Trusted
from cluster.prove import proved
from launch.machine import cache_directory, found_here
from launch.progress import Progress
from launch.recipe import to_recipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN_SIZES = tuple(1 << power for power in range(12, 29, 2))  # 4 KB to 256 MB
WIDTH = 140  # where the output is no terminal
GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--refresh", action="store_true", help="prove and measure anew what is kept")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write it there too, for `plan --on FILE` anywhere: .json has all, .yaml is a recipe to edit",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="describe the nodes of this Ray cluster instead, without timing them: with --out FILE.yaml",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: the GPUs, if there are any",
    )


def run(args: argparse.Namespace) -> int:
    out = _checked(args.out)
    progress = Progress()
    if args.address is not None:
        return _report_nodes(args, out, progress)
    topology = found_here(None if args.device == "auto" else args.device)
    cache = cache_directory()
    proof = proved(topology, cache, progress.say, refresh=args.refresh) if len(topology.devices) > 1 else None
    profile = measure(
        topology, cache, progress.say, refresh=args.refresh, full=True, trusted=_measurable(proof)
    )
    if out is not None:
        _write(profile, out)
    if args.json:
        print(json.dumps(to_json(profile, proof), indent=1))
    else:
        show(profile, proof)
    return 0


def _report_nodes(args: argparse.Namespace, out: File | None, progress: Progress) -> int:
    """The nodes of a Ray cluster as one machine, by what their drivers say: nothing is timed."""
    from launch.nodes import cluster_machine

    if out is None or out.suffix != ".yaml":
        raise UserError(f"--address {args.address} times nothing: add --out FILE.yaml, a recipe to plan on")
    topology = cluster_machine(args.address, None if args.device == "auto" else args.device, progress)
    text = to_recipe(
        topology, f"By what the nodes of {args.address} report: nothing is measured, least the network."
    )
    write_whole(text.encode(), out)
    print(
        json.dumps({"machine": topology.name, "out": str(out)}) if args.json else text, end="\n" * args.json
    )
    return 0


def _checked(out: str | None) -> File | None:
    """Raises UserError before anything is measured."""
    if out is None:
        return None
    path = File(out)
    if path.suffix not in (".json", ".yaml") or not path.parent.is_dir():
        raise UserError(f"--out {out}; it must be a .json or .yaml file in a directory that exists")
    return path


def _write(profile: MachineProfile, path: File) -> None:
    if path.suffix == ".json":
        save(profile, path)
        return
    dtype = "bfloat16" if profile.devices[0].kind == "cuda" else "float32"
    comment = f"Measured by shardwise profile, {profile.measured_at[:10]}, torch {profile.torch_version}."
    text = to_recipe(apply(profile, profile.topology, dtype), comment)
    write_whole(text.encode(), path)


def _measurable(proof: Proof | None) -> Trusted:
    """What was proved; and torch's own kernels over peer memory, for comparison."""
    if proof is None:
        return Trusted(())
    found = proof.trusted
    return replace(found, paths=(*found.paths, Path.SYMMETRIC)) if Path.PEER in found.paths else found


def to_json(profile: MachineProfile, proof: Proof | None) -> dict[str, object]:
    """The profile as it is kept, and what was proved."""
    made: dict[str, object] = msgspec.to_builtins(profile, str_keys=True)
    made["proof"] = None if proof is None else msgspec.to_builtins(proof, str_keys=True)
    return made


# --- for people ---------------------------------------------------------------------------------------------


def show(profile: MachineProfile, proof: Proof | None) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    software = f"torch {profile.torch_version}"
    software += f", driver {profile.driver}" if profile.driver else ""
    software += f", NCCL {profile.nccl_version}" if profile.nccl_version else ""
    console.print(
        f"[bold]{profile.machine}[/], {software}; measured {profile.measured_at} in {profile.seconds:.0f} s\n"
    )
    for table in (
        _devices(profile),
        _products(profile),
        _host_copies(profile),
        _pulls(profile),
        _pairs(profile),
    ):
        if table is not None:
            console.print(table)
            console.print()
    if profile.disk is not None:
        cached = "" if profile.disk.direct else ", by way of memory"
        console.print(f"disk of {profile.disk.path}: {profile.disk.bytes_per_s / GB:.1f} GB/s read{cached}\n")
    _show_collectives(console, profile)
    for name, reason in profile.absent.items():
        console.print(f"not measured: {name}: {reason}")
    if proof is not None:
        console.print(_proof(proof))


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _devices(profile: MachineProfile) -> Table:
    table = _table("device", "read GB/s", "copy GB/s", "launch µs", "in a graph µs", "PCIe under load")
    for i, (detail, device) in enumerate(zip(profile.details, profile.devices, strict=False)):
        graph = "–" if detail.graph_kernel_s is None else f"{detail.graph_kernel_s * 1e6:.2f}"
        pcie = f"{detail.pcie_generation}×{detail.pcie_lanes}" if detail.pcie_generation else "–"
        read, copy = (f"{rate / GB:,.0f}" for rate in (detail.read_bytes_per_s, detail.copy_bytes_per_s))
        table.add_row(f"{i} {device.name}", read, copy, f"{detail.launch_s * 1e6:.2f}", graph, pcie)
    return table


def _products(profile: MachineProfile) -> Table:
    """TFLOP/s of the first device by rows; the others' are in --json."""
    detail = profile.details[0]
    rows = sorted({n for by_rows in detail.products.values() for n in by_rows})
    size = detail.product_size
    table = _table(f"TFLOP/s with a {size} × {size} weight, by rows", *map(str, rows))
    for dtype, by_rows in detail.products.items():
        table.add_row(dtype, *(f"{by_rows[n] / 1e12:,.2f}" if n in by_rows else "–" for n in rows))
    return table


def _host_copies(profile: MachineProfile) -> Table | None:
    if not profile.host_copies:
        return None
    table = _table("GB/s", "to GPU", "to host", "to GPU, all at once", "to host, all at once")
    for pinned in (True, False):
        for device in range(len(profile.devices)):
            cells = [
                f"{copy.bytes_per_s / GB:.1f}"
                for together in (False, True)
                for to_device in (True, False)
                for copy in profile.host_copies
                if (copy.device, copy.pinned, copy.together, copy.to_device)
                == (device, pinned, together, to_device)
            ]
            table.add_row(f"{'pinned' if pinned else 'pageable'} memory, GPU {device}", *cells)
    return table


def _pulls(profile: MachineProfile) -> Table | None:
    if not profile.host_pulls:
        return None
    table = _table("GB/s pulled from pinned memory", "alone", "by all at once")
    for pull in profile.host_pulls:
        rates = (pull.alone_bytes_per_s, pull.together_bytes_per_s)
        table.add_row(f"GPU {pull.device}", *(f"{rate / GB:.1f}" for rate in rates))
    return table


def _pairs(profile: MachineProfile) -> Table | None:
    if not profile.pair_copies:
        return None
    count = len(profile.devices)
    rates = {(pair.source, pair.target): pair.bytes_per_s for pair in profile.pair_copies}
    table = _table("GB/s, GPU to GPU", *map(str, range(count)))
    for source in range(count):
        cells = (rates.get((source, target)) for target in range(count))
        table.add_row(str(source), *("–" if rate is None else f"{rate / GB:.0f}" for rate in cells))
    return table


def _show_collectives(console: Console, profile: MachineProfile) -> None:
    for ranks in sorted({curve.ranks for curve in profile.curves}):
        for op in Op:
            own = [c for c in profile.curves if (c.op, c.ranks) == (op, ranks)]
            if own:
                console.print(_times(op, ranks, own))
                console.print()
    if profile.curves:
        console.print(_fits(profile.curves))
        console.print()
        for line in path_lines(profile.curves):
            console.print(line)


def _times(op: Op, ranks: int, curves: Sequence[Curve]) -> Table:
    names = ["\n".join((*c.path.rsplit(" ", 1), "in a graph" if c.in_graph else "eager")) for c in curves]
    table = _table(f"{op.replace('_', '-')} of {ranks} ranks, µs", *names)
    for size in SHOWN_SIZES:
        cells = (dict(curve.points).get(size) for curve in curves)
        shown = ["" if seconds is None else f"{seconds * 1e6:,.1f}" for seconds in cells]
        if any(shown):
            table.add_row(_size(size), *shown)
    return table


def _fits(curves: Sequence[Curve]) -> Table:
    table = _table("straight line through all sizes", "ranks", "latency µs", "GB/s", "furthest off")
    for curve in curves:
        name = f"{curve.op.replace('_', '-')}, {curve.path}{', in a graph' if curve.in_graph else ''}"
        line = curve.fit
        rate = f"{line.bytes_per_s / GB:.1f}"
        table.add_row(name, str(curve.ranks), f"{line.latency_s * 1e6:.1f}", rate, f"{line.residual:.0%}")
    return table


def path_lines(curves: Sequence[Curve]) -> Iterator[str]:
    """Which path is the fastest from which size on."""
    for ranks in sorted({curve.ranks for curve in curves}):
        for in_graph in (True, False):
            turns = crossovers(curves, Op.ALL_REDUCE, ranks, in_graph)
            if turns:
                first = turns[0][0]
                words = [f"{path} from {_size(size)}" if size > first else str(path) for size, path in turns]
                where = "inside graphs" if in_graph else "eager"
                small = best_path(curves, Op.ALL_REDUCE, ranks, 16 << 10, in_graph)
                took = f" (16 KB: {small.seconds * 1e6:.1f} µs)" if small else ""
                yield f"fastest all-reduce of {ranks} ranks, {where}: {', '.join(words)}{took}"


def _proof(proof: Proof) -> Table:
    colours = {Outcome.PASSED: "green", Outcome.SKIPPED: "dim"}
    table = _table("proved", "", "")
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    for step in proof.steps:
        words = ". ".join(part for part in (step.evidence, step.fix) if part)
        table.add_row(step.rung, f"[{colours.get(step.outcome, 'red')}]{step.outcome}[/]", words)
    return table


def _size(n_bytes: int) -> str:
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {name}"
    return f"{n_bytes} bytes"
