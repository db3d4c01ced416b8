"""`shardwise plan`: which layout, how fast, and why the others lost. Reads configs and data sheets only."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.errors import BadRequest, NoFeasiblePlan
from cluster.topology import Topology
from launch.config import read_machine
from launch.kept import shelf
from launch.machine import as_measured, cache_directory, found_here
from launch.memory import add_memory_arguments, capped, check_device_memory, check_memory
from launch.models import spec_of
from launch.plan_json import plan_to_json
from strategies.engines import CPU, OURS, engine
from strategies.explain import ms
from strategies.kept import Kept
from strategies.plan import Candidate, Layout, Plan
from strategies.planner import plan
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec, Objective, Workload

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from launch.queueing import Simulations

MOST_ROWS = 16  # of the table that people read; --json has them all
MOST_PLANNED = 4  # of them, of what cannot be run, where something can
WIDTH = 100  # where the output is no terminal

_COLUMNS = (
    "layout",
    "TTFT\nms",
    "TPOT\nms",
    "output\ntokens/s",
    "GB per\nGPU",
    "KV tokens\nthat fit",
    "share of\nlimit",
    "$ per\nMtok",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, a .gguf file, a built-in name, or smollm2"
    )
    parser.add_argument("--on", metavar="RECIPE", help="a recipe's path or name; default: this machine")
    add_workload_arguments(parser)
    for flag, of in (("--max-ttft-ms", "the first token"), ("--max-tpot-ms", "each next token")):
        parser.add_argument(
            flag, type=float, metavar="MS", help=f"choose no layout that takes longer to {of}"
        )
    parser.add_argument(
        "--request-rate",
        metavar="R",
        help="simulate the best layouts with so many requests a second, or max: as many as keep the limits",
    )
    dtypes = ("auto", *BYTES_PER_ELEMENT)
    parser.add_argument(
        "--dtype", choices=dtypes, default="auto", help="default: the model's, where devices compute in it"
    )
    add_memory_arguments(parser)
    parser.add_argument("--max-model-len", type=int, metavar="N", help="make room for so long a sequence")
    parser.add_argument(
        "--layouts", metavar="A,B", help="only these, such as tp2,pp2,tp2dp2,tp2+int4,tp8ep8+fp8"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def add_workload_arguments(parser: argparse.ArgumentParser, sweep: Sequence[int] | None = None) -> None:
    """`sweep`: the concurrency may be several, by default these."""
    asked = parser.add_argument_group("workload")
    asked.add_argument("--prompt-tokens", type=int, default=1024, metavar="N", help="of each request (1024)")
    asked.add_argument("--output-tokens", type=int, default=256, metavar="N", help="of each request (256)")
    if sweep is None:
        asked.add_argument("--concurrency", type=int, default=1, metavar="N", help="requests at once (1)")
    else:
        told = ",".join(map(str, sweep))
        asked.add_argument(
            "--concurrency",
            type=_several,
            default=tuple(sweep),
            metavar="N,M",
            help=f"requests at once, one load after the other ({told})",
        )
    asked.add_argument(
        "--objective",
        choices=tuple(map(str, Objective)),
        default=Objective.LATENCY,
        help="what the chosen layout is best at (latency)",
    )


def _several(text: str) -> tuple[int, ...]:
    """`1,8,32` → each once, in order."""
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None


def run(args: argparse.Namespace) -> int:
    from launch.queueing import rate_of, to_json

    workload = workload_of(args)
    rate = rate_of(args)
    alone = workload if rate is None else replace(workload, most_ttft_s=None, most_tpot_s=None)
    layouts = named_layouts(args.layouts)
    check_memory(args)
    here = args.on is None
    topology = found_here() if here else read_machine(args.on)
    spec = spec_of(args.model)
    check_lengths(spec, workload, args.max_model_len)
    dtype = choose_dtype(args.dtype, spec, topology)
    if here:
        topology = as_measured(topology, dtype)
    check_device_memory(args.device_memory_gb, topology.devices[0].kind)
    ours = engine(CPU if topology.devices[0].kind == "cpu" else OURS)
    topology = capped(topology, args.device_memory_gb, args.host_memory_gb, share=ours.memory_share)
    kept = kept_here(topology, spec, dtype) if here else ()
    longest = args.max_model_len
    made = plan(
        spec,
        topology,
        alone,
        dtype,
        layouts=layouts,
        max_model_len=longest,
        wide=True,
        engine=ours,
        kept=kept,
    )
    simulated = None
    if rate is not None and made.candidates:
        from launch.progress import Progress
        from launch.queueing import queued

        made, simulated = queued(made, spec, topology, workload, dtype, rate, Progress(quiet=args.json))
    if args.json:
        told = plan_to_json(made, workload)
        print(json.dumps(told if simulated is None else {**told, "simulated": to_json(simulated)}, indent=2))
    else:
        show(made, workload, heading(made, topology, workload, dtype), simulated, named=layouts is not None)
    return 0 if made.chosen is not None else NoFeasiblePlan.exit_code


def kept_here(topology: Topology, spec: ModelSpec, dtype: str) -> list[Kept]:
    """What `compare` measured of the model on this machine, with the engine's own limits."""
    ours = engine(CPU if topology.devices[0].kind == "cpu" else OURS)
    limits = {"chunk_tokens": ours.chunk_tokens, "max_sequences": ours.max_sequences}
    return shelf(cache_directory(), topology, spec, dtype, **limits).read()


# --- what is asked ------------------------------------------------------------------------------------------


def workload_of(args: argparse.Namespace) -> Workload:
    """Raises BadRequest."""
    for flag in ("prompt_tokens", "output_tokens", "concurrency"):
        value = getattr(args, flag)
        if value < 1:
            raise BadRequest(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")
    limits = []
    for flag in ("max_ttft_ms", "max_tpot_ms"):
        limit = getattr(args, flag, None)
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise BadRequest(f"--{flag.replace('_', '-')} is {limit:g}; it must be above 0")
        limits.append(None if limit is None else limit / 1e3)
    lengths = (args.prompt_tokens, args.output_tokens, args.concurrency)
    return Workload(*lengths, Objective(args.objective), most_ttft_s=limits[0], most_tpot_s=limits[1])


def named_layouts(names: str | None) -> list[Layout] | None:
    """`tp2,tp2+int4` → layouts to plan, each once; None: all. Raises BadLayout."""
    if names is None:
        return None
    return list(dict.fromkeys(Layout.parse(name) for name in names.split(",")))


def check_lengths(spec: ModelSpec, workload: Workload, max_model_len: int | None) -> None:
    """Prompt and output fit the context asked for, and that the model's positions. Raises BadRequest."""
    length = workload.prompt_tokens + workload.output_tokens
    longest = spec.max_positions if max_model_len is None else max_model_len
    if longest < 1:
        raise BadRequest(f"--max-model-len is {longest:,}; it must be at least 1")
    if longest > spec.max_positions:
        raise BadRequest(f"--max-model-len is {longest:,}; {spec.name} has {spec.max_positions:,} positions")
    if length > longest:
        asked = f"{workload.prompt_tokens:,} prompt and {workload.output_tokens:,} output tokens"
        way_out = "ask for less" + (f", or --max-model-len {length}" if length <= spec.max_positions else "")
        raise BadRequest(f"{asked} are {length:,}; a sequence of {spec.name} may have {longest:,}: {way_out}")


def choose_dtype(asked: str, spec: ModelSpec, topology: Topology) -> str:
    """The model's own where every device computes in it; else the nearest that all do."""
    if asked != "auto":
        return asked
    if any(device.kind == "cpu" for device in topology.devices):
        return "float32"
    known = (spec.dtype, "bfloat16", "float16", "float32")
    return next((d for d in known if all(d in device.flops_per_s for device in topology.devices)), spec.dtype)


# --- for people ---------------------------------------------------------------------------------------------


def show(
    made: Plan, workload: Workload, title: str, simulated: Simulations | None = None, *, named: bool = False
) -> None:
    """The table, what was rejected, and the sentences."""
    from rich.console import Console, Group

    parts: list[RenderableType] = [title, ""]
    if any(candidate.feasible for candidate in made.candidates):
        parts.append(plan_table(made))
    if simulated is not None:
        from launch.queueing import table

        parts.append(table(simulated))
    parts += rejections(made, every=named)
    if made.chosen is not None:
        parts.append(f"Use {made.chosen.layout.name} for {workload.objective}.")
    elif not any(candidate.feasible and candidate.not_runnable is None for candidate in made.candidates):
        starred = any(candidate.feasible for candidate in made.candidates)
        told = "; what is marked * is planned only, or must be named" if starred else ""
        parts.append(f"Nothing fits that would be chosen{told}.")
    parts.append(bullets(made.explanation))
    wide = Console(highlight=False, markup=False)
    width = wide.width if wide.is_terminal else WIDTH
    Console(highlight=False, markup=False, width=width).print(Group(*parts))


def rejections(made: Plan, *, every: bool) -> list[RenderableType]:
    """What is refused and why; nothing where all fits. `every`: what somebody named, whatever refuses it; else what
    does not fit of plain layouts and of those that stream them."""
    if every:
        refused = [c for c in made.candidates if not c.feasible or c.not_runnable is not None]
        return ["Refused:", _rejections(refused), ""] if refused else []
    short = [candidate for candidate in made.candidates if not candidate.feasible]
    rejected = [c for c in short if c.layout.is_plain or (c.offload and not c.format.name)] or short
    return ["Does not fit:", _rejections(rejected), ""] if rejected else []


def heading(made: Plan, topology: Topology, workload: Workload, dtype: str) -> str:
    """Model, precision, machine, workload: what the figures below are of."""
    names = [device.name for device in topology.devices]
    devices = " + ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    kinds = " and ".join(sorted({link.kind.value for link in topology.links.values()}))
    links = f", {kinds} links" if kinds else ""
    requests = "1 request" if workload.concurrency == 1 else f"{workload.concurrency} requests at once"
    lengths = f"{workload.prompt_tokens:,} prompt + {workload.output_tokens:,} output tokens"
    return f"{made.model} in {dtype} on {made.machine} ({devices}{links}); {requests} of {lengths}"


def plan_table(made: Plan) -> Table:
    """Feasible candidates, best first."""
    from rich import box
    from rich.table import Table

    every = [candidate for candidate in made.candidates if candidate.feasible]
    runs = [candidate for candidate in every if candidate.not_runnable is None]
    planned = _best_of_each_format([c for c in every if c.not_runnable is not None])
    planned = planned[: MOST_PLANNED if runs else MOST_ROWS]
    feasible = [*runs[: MOST_ROWS - len(planned)], *planned]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for i, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for candidate in feasible:
        table.add_row(*_row(candidate), style="bold" if candidate is made.chosen else None)
    told = []
    if len(every) > len(feasible):
        told.append(f"{len(every) - len(feasible)} more that fit rank below; --json lists them all")
    if planned:
        told.append("* not chosen: planned only, or in fewer bits, which --layout must name")
    table.caption = "\n".join(told) or None
    return table


def _best_of_each_format(ranked: Sequence[Candidate]) -> list[Candidate]:
    """The first of each format, with and without offload: the rest would fill pages."""
    first: dict[tuple[str, bool], Candidate] = {}
    for candidate in ranked:
        first.setdefault((candidate.format.name, candidate.offload), candidate)
    return list(first.values())


def _row(candidate: Candidate) -> Sequence[str]:
    made = candidate.estimate
    assert made is not None, "only feasible candidates have rows"
    usd = made.usd_per_million_tokens
    return (
        f"{candidate.layout.name}{'' if candidate.not_runnable is None else ' *'}",
        ms(made.ttft_s).removesuffix(" ms"),
        ms(made.tpot_s).removesuffix(" ms"),
        f"{made.output_tokens_per_s:,.{0 if made.output_tokens_per_s >= 10 else 1}f}",
        f"{made.memory_bytes_per_device / 1e9:.1f}",
        f"{made.kv_tokens:,}",
        f"{made.share_of_limit:.0%}",
        "" if usd is None else f"{usd:,.2f}",
    )


def _rejections(rejected: Sequence[Candidate]) -> Table:
    """Layouts by reason: data parallelism changes nothing for a replica that does not fit."""
    from rich.table import Table

    by_reason: dict[str, list[str]] = {}
    for candidate in rejected:
        by_reason.setdefault(str(candidate.reason or candidate.not_runnable), []).append(
            candidate.layout.name
        )
    table = Table.grid(padding=(0, 2, 0, 0))
    for reason, names in by_reason.items():
        table.add_row("", ", ".join(names), reason)
    return table


def bullets(sentences: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 1, 0, 0))
    for sentence in sentences:
        table.add_row("-", sentence)
    return table
