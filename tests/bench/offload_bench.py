"""Layers streamed from host memory, beside the link and the plan: `python -m tests.bench.offload_bench --layout tp2`.

A process a rank, no Ray and no channels: the scheduler and the ranks alone, on random weights. The decode steps of
one sequence and of --rows are timed, with CUDA graphs, beside what the plan says of the same layout, cap and batch,
with the link's own rate: before and after, all ranks copy from pinned memory at once. --check: the tokens of a small
--model with some of its layers resident must be those with all; exit code 1 otherwise. --against zero3: the same
model in the same call by DeepSpeed's ZeRO-3 with its weights in host memory (zero3_steps.py).

Two cards without peer access: NCCL_P2P_DISABLE=1. To try the script itself: `--device cpu --model smollm2
--resident-layers 10 --rows 4`, where errors of the plan mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.table import Table

from cluster.errors import BadLayout
from cluster.loopback import free_port
from cluster.topology import Topology
from launch.configured import engine_config, limits_for, priced_engine, room_of
from launch.machine import peers_allowed
from launch.models import resolve
from launch.options import EngineOptions
from launch.predict import this_machine
from orchestrator.engine.host_memory import paged, pin
from orchestrator.request import Request, SamplingParams
from orchestrator.scheduler import Scheduler
from orchestrator.step import Step, StepResult
from orchestrator.worker import Worker
from strategies.cost_memory import memories
from strategies.cost_steps import decode_step_s
from strategies.formats import FORMATS
from strategies.pipeline import shard_replica
from strategies.place import place
from strategies.plan import Layout, ParallelDims
from strategies.source import spec_of
from strategies.spec import Workload
from tests.bench import zero3_steps

PROMPT_TOKENS = 128
CONTEXT = 4096
COPIES = 16
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
PIECE_BYTES = 2**25  # that a capped card has room for when the model is there
SETTLE = 2  # decode steps that are not counted
CHECKED_TOKENS = 24
CHECKED = {
    "cuda": ((1, 40), (8, 33), (2, 3000)),
    "cpu": ((1, 9), (3, 5)),
}  # sequences, tokens of their prompts


@dataclass(frozen=True, slots=True)
class Timed:
    """Decode steps of one load."""

    rows: int
    token_s: float  # from one token of a sequence to its next
    steps: int  # in that time: more than one where groups of sequences take turns in a pipeline

    @property
    def tokens_per_s(self) -> float:
        return self.rows / self.token_s


@dataclass(frozen=True, slots=True)
class Measured:
    """By one rank."""

    link_bytes_per_s: float
    layers: int
    resident: int
    step_bytes: int
    load_s: float
    used_bytes: int  # of the device, by everybody
    loads: tuple[Timed, ...]

    def bytes_per_s(self, load: int) -> float:
        """That came from host memory while this load was timed."""
        timed = self.loads[load]
        return self.step_bytes * timed.steps / timed.token_s


@dataclass(frozen=True, slots=True)
class Predicted:
    token_s: float
    resident: int  # of the rank that keeps fewest
    step_bytes: int  # of the rank that streams most


def predicted(
    options: EngineOptions, layout: Layout, machine: Topology, link_bytes_per_s: float, rows: int, tokens: int
) -> Predicted:
    """What the plan says of decode steps over links that give so much while all ranks pull."""
    devices = tuple(
        replace(d, host_bytes_per_s=link_bytes_per_s, host_together_bytes_per_s=link_bytes_per_s)
        for d in machine.devices
    )
    load = Workload(PROMPT_TOKENS, tokens, rows)
    placed = place(
        options.spec, layout, options.dtype, replace(machine, devices=devices), priced_engine(options), load,
        room_of(options),
    )  # fmt: skip
    needs = memories(placed, load)
    step = decode_step_s(placed, 0, rows, PROMPT_TOKENS + tokens / 2, 1.0, needs)
    kept = [
        len(shard.layers) if need.streaming is None else need.streaming.resident
        for shard, need in zip(placed.shards, needs, strict=False)
    ]
    return Predicted(sum(step.values()), min(kept), max(need.streamed for need in needs))


def options_of(args: argparse.Namespace) -> EngineOptions:
    """As `shardwise generate` makes them of the same flags."""
    source, on_gpu = resolve(args.model), args.device == "cuda"
    spec = spec_of(source)
    return EngineOptions(
        source, spec, args.device, "bfloat16" if on_gpu else "float32", dummy_weights=True,
        max_model_len=min(CONTEXT, spec.max_positions), max_num_seqs=max(8, args.rows), max_num_batched_tokens=2048,
        block_size=16, num_blocks=None, prefix_caching=False, seed=0, address=None, peer_access=peers_allowed(),
        enforce_eager=args.enforce_eager, format=args.format, offload=True,
        resident_layers=args.resident_layers, device_memory_gb=args.device_memory_gb,
        host_memory_gb=args.host_memory_gb, offload_kv_tokens=max(CONTEXT, 256 * args.rows),
    )  # fmt: skip


def ready(options: EngineOptions, dims: ParallelDims, rank: int, port: int, *, choose: bool) -> Worker:
    """A worker as launch/start.py gets one ready. `choose`: attention by measurement, not where tokens are compared."""
    shards = shard_replica(options.spec, dims, kept=FORMATS[options.format])
    worker = Worker()
    worker.join(engine_config(options, dims), shards[rank], f"tcp://127.0.0.1:{port}", rank)
    worker.load()
    if choose and options.device == "cuda":
        worker.choose_attention()
    blocks = torch.tensor([worker.fit_blocks()], device=worker.device)
    if dims.replica_size > 1:
        torch.distributed.all_reduce(blocks, torch.distributed.ReduceOp.MIN)
    worker.allocate(limits_for(int(blocks), dims, options))
    if options.captures:
        worker.capture()
    return worker


@dataclass(frozen=True, slots=True)
class Ends:
    """What joins the ranks' processes with each other and with the one that started them."""

    ports: Sequence[int]
    barrier: Any
    tokens: Sequence[Any]  # a queue to each rank
    found: Any  # a queue of (rank, what it found)


Job = Callable[[int, argparse.Namespace, Ends], Any]


def link_rate(device: str, barrier: Any) -> float:
    """Bytes/s of copies from memory pinned as the engine pins it, while all ranks copy."""
    host = paged(COPY_BYTES[device]).zero_()
    pieces = host.split(PIECE_BYTES)
    there = torch.empty_like(pieces[0], device=device)
    if device == "cuda":
        pin(host)
    synchronize = torch.cuda.synchronize if device == "cuda" else int
    took_s = 0.0
    for copies in (2, COPIES):
        synchronize()
        barrier.wait()
        began = time.perf_counter()
        for _ in range(copies):
            for piece in pieces:
                there.copy_(piece, non_blocking=True)
        synchronize()
        took_s = time.perf_counter() - began
    barrier.wait()
    del there
    if device == "cuda":
        torch.cuda.empty_cache()
    return COPIES * host.nbytes / took_s


class Driven(NamedTuple):
    gaps_s: list[float]  # from the end of a step to that of the next, where this decodes only
    rows: list[int]  # of those steps
    tokens: dict[str, list[int]]


def driven(worker: Worker, ends: Ends, requests: int, prompt_tokens: int, output_tokens: int) -> Driven:
    """All at once, by a scheduler on every rank; the rank that learns a step's tokens tells the others."""
    scheduler, vocab = Scheduler(worker.limits), worker.config.spec.vocab
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    for i in range(requests):
        prompt = [(i * 7919 + 31 * j + 1) % vocab for j in range(prompt_tokens)]
        scheduler.add(Request(id=str(i), prompt_token_ids=prompt, sampling=sampling))
    found = Driven([], [], {str(i): [] for i in range(requests)})
    in_flight: deque[tuple[Step, Any]] = deque()
    ended = time.perf_counter()
    while in_flight or scheduler.has_work:
        step = scheduler.schedule() if len(in_flight) < worker.limits.depth else None
        if step is not None:
            in_flight.append((step, worker.runner.run(step)))
        if in_flight and (step is None or len(in_flight) == worker.limits.depth):
            oldest, pending = in_flight.popleft()
            for token in scheduler.update(_result(worker.shard.rank, oldest, pending, ends)):
                found.tokens[token.request_id].append(token.token_id)
            now = time.perf_counter()
            if all(row.count == 1 for row in oldest.rows):
                found.gaps_s.append(now - ended)
                found.rows.append(len(oldest.rows))
            ended = now
    return found


def _result(rank: int, step: Step, pending: Any, ends: Ends) -> StepResult:
    if pending is None:
        return StepResult(step.id, ends.tokens[rank].get())
    result: StepResult = pending.result()
    for other, queue in enumerate(ends.tokens):
        if other != rank:
            queue.put(list(result.token_ids))
    return result


def run_rank(rank: int, args: argparse.Namespace, ends: Ends) -> Measured:
    options, dims = options_of(args), ParallelDims.parse(args.layout)
    before = link_rate(args.device, ends.barrier)
    began = time.perf_counter()
    worker = ready(options, dims, rank, ends.ports[0], choose=True)
    load_s = time.perf_counter() - began
    if not rank:
        print(f"{args.layout}: ready after {load_s:.0f} s; {worker.residence().told}", flush=True)
    driven(worker, ends, 1, 64, 4)
    loads = []
    for rows in dict.fromkeys((1, args.rows)):
        ends.barrier.wait()
        done = driven(worker, ends, rows, PROMPT_TOKENS, args.steps + SETTLE)
        steps = -(-rows // max(done.rows))
        loads.append(Timed(rows, statistics.median(done.gaps_s[SETTLE:]) * steps, steps))
    free, total = torch.cuda.mem_get_info() if args.device == "cuda" else (0, 0)
    kept = worker.residence()
    link = (before + link_rate(args.device, ends.barrier)) / 2  # a host that others use changes in between
    if not rank:
        print(
            f"pulled before it began {before / 1e9:.1f} GB/s, before and after {link / 1e9:.1f}", flush=True
        )
    return Measured(link, kept.layers, kept.resident, kept.step_bytes, load_s, total - free, tuple(loads))


def check_rank(rank: int, args: argparse.Namespace, ends: Ends) -> int:
    """Answers that differ: the tokens with all layers resident, then with few, with some more, and with all but two."""
    options, dims = options_of(args), ParallelDims.parse(args.layout)
    turns: list[int | None] = [None, *residents(options.spec.layers // dims.pp)]
    told = []
    for port, resident in zip(ends.ports, turns, strict=False):
        own = replace(options, offload=resident is not None, resident_layers=resident)
        worker = ready(own, dims, rank, port, choose=False)
        loads = CHECKED[args.device]
        told.append([driven(worker, ends, n, tokens, CHECKED_TOKENS).tokens for n, tokens in loads])
        if not rank:
            print(f"{args.layout}: {worker.residence().told}", flush=True)
        worker.collectives.leave()
        del worker
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return sum(
        one[name] != other[name]
        for turn in told[1:]
        for one, other in zip(turn, told[0], strict=True)
        for name in other
    )


def residents(layers: int) -> list[int]:
    """So many stay: an even and an odd number of streamed ones, and two, which the buffers hold for good."""
    return sorted({n for n in (2, 5, layers - 2) if 0 <= n < layers})


def enter(rank: int, job: Job, args: argparse.Namespace, ends: Ends) -> None:
    """A rank's process. Graphs and pinned memory go with it, in no order of ours, once all ranks have told."""
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    ends.found.put((rank, job(rank, args, ends)))
    ends.barrier.wait()
    sys.stdout.flush()
    os._exit(0)


def of_ranks(job: Job, size: int, args: argparse.Namespace) -> list[Any]:
    """What each rank's process found. Raises what one of them raised, and ends the others."""
    context = multiprocessing.get_context("spawn")
    tokens = [context.SimpleQueue() for _ in range(size)]
    ends = Ends([free_port() for _ in range(4)], context.Barrier(size), tokens, context.SimpleQueue())
    multiprocessing.spawn(enter, (job, args, ends), nprocs=size)  # type: ignore[no-untyped-call]
    found = dict(ends.found.get() for _ in range(size))
    return [found[rank] for rank in range(size)]


def show(args: argparse.Namespace, found: Sequence[Measured], plans: Sequence[Predicted]) -> None:
    link = sum(rank.link_bytes_per_s for rank in found)
    table = Table(
        "sequences",
        "ms a token",
        "of the plan",
        "error",
        "GB/s streamed",
        "of the link",
        "tokens/s",
        "of the plan",
    )
    for i, plan in enumerate(plans):
        timed, streamed = found[0].loads[i], sum(rank.bytes_per_s(i) for rank in found)
        table.add_row(
            str(timed.rows),
            f"{timed.token_s * 1e3:,.1f}",
            f"{plan.token_s * 1e3:,.1f}",
            f"{(plan.token_s / timed.token_s - 1) * 100:+.1f} %",
            f"{streamed / 1e9:,.1f}",
            f"{streamed / link:.1%}",
            f"{timed.tokens_per_s:,.2f}",
            f"{timed.rows / plan.token_s:,.2f}",
        )
    one, plan = found[0], plans[0]
    Console(width=120).print(table)
    name = f"{args.model} {args.layout}{args.format and '+' + args.format}+offload"
    print(
        f"{name}: {one.resident} of {one.layers} layers resident (the plan: {plan.resident}), "
        f"{one.step_bytes / 1e9:.2f} GB a step and rank ({plan.step_bytes / 1e9:.2f}); the links give {link / 1e9:.1f} "
        f"GB/s together; {one.used_bytes / 1e9:.1f} GB of a device taken"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", default="tp1")
    parser.add_argument("--model", default="qwen2.5-32b")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--format", default="", help="such as int8")
    parser.add_argument("--device-memory-gb", type=float, help="of each card, such as 25.3")
    parser.add_argument("--host-memory-gb", type=float, help="where a machine says less than it has")
    parser.add_argument("--resident-layers", type=int, help="of each rank; default: as many as fit")
    parser.add_argument("--rows", type=int, default=32, help="sequences at once, beside one alone")
    parser.add_argument("--steps", type=int, default=12, help="of decoding, timed for each load")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--against", choices=("zero3",))
    args = parser.parse_args(argv)
    try:
        dims = ParallelDims.parse(args.layout)
    except BadLayout as wrong:
        parser.error(str(wrong))
    if min(args.rows, args.steps) < 1 or dims.dp > 1:
        parser.error("--rows and --steps are 1 at least, and --layout is of one replica, such as tp2")
    if args.against and args.format:
        parser.error("--against zero3 is in bfloat16; leave --format away")
    return args


def main() -> int:
    args = parse()
    layout = replace(Layout.parse(args.layout), offload=True, format=FORMATS[args.format])
    size = layout.dims.replica_size
    if args.check:
        wrong = max(of_ranks(check_rank, size, args))
        print(f"answers that differ though they must not: {wrong}")
        return int(wrong > 0)
    options = options_of(args)
    found: list[Measured] = of_ranks(run_rank, size, args)
    for rank, one in enumerate(found):
        print("RESULT", args.model, args.layout, rank, json.dumps(asdict(one)), flush=True)
    machine, slowest = this_machine(options, size), min(one.link_bytes_per_s for one in found)
    plans = [predicted(options, layout, machine, slowest, load.rows, args.steps) for load in found[0].loads]
    show(args, found, plans)
    if args.against:
        theirs = of_ranks(zero3_steps.run_rank, size, args)
        zero3_steps.show([load.tokens_per_s for load in found[0].loads], theirs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
