"""KV in host memory beside computing it again: `python -m tests.bench.host_kv_bench`.

One device, one process, no Ray and no channels: the scheduler and the rank alone, on random weights. Each load runs
with a cache that holds all of it (ample), with one that is too small (computed again), and with the same and host
memory (brought back). `crowd`: requests at once, whose answers outgrow the cache, so that some are preempted. `talks`:
conversations that take turns one after another, together more than the cache; what is timed is the first token of all
turns but the first. With --exact the crowd's answers must be the same in all three (in float32, where the order of a
batch's sums does not show); a talk's, brought back, must always be those of an ample cache. Exit code 1 otherwise.

On a CPU, seconds are of its processor's time on one thread: other programs leave them as they are.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.loopback import free_port
from launch.models import resolve
from orchestrator.engine.host_memory import rate_to
from orchestrator.engine_config import EngineConfig
from orchestrator.request import Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.worker import Worker
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from strategies.source import spec_of

BLOCK = 16
AMPLE, COMPUTED, BROUGHT = CASES = ("ample", "computed again", "brought back")


@dataclass(slots=True)
class Found:
    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)  # of later turns
    computed: int = 0  # tokens, by all steps
    tokens: dict[str, list[int]] = field(default_factory=dict)
    preemptions: int = 0
    blocks_out: int = 0
    blocks_in: int = 0


def ready(args: argparse.Namespace, blocks: int, host_blocks: int, length: int) -> Worker:
    source, on_gpu = resolve(args.model), args.device == "cuda"
    spec = spec_of(source)
    config = EngineConfig(
        source, spec, args.dtype, args.device, format=args.format, dummy_weights=True, max_num_seqs=args.requests,
        host_kv_bytes=1, memory_utilization=0.88,
    )  # fmt: skip
    (shard,) = shard_replica(spec, ParallelDims())
    worker = Worker()
    worker.join(config, shard, f"tcp://127.0.0.1:{free_port()}", 0)
    worker.load()
    if on_gpu:
        assert blocks <= worker.fit_blocks(), "a smaller load, please"
    worker.allocate(
        SchedulerConfig(blocks, BLOCK, args.requests, max_model_len=length, run_ahead=on_gpu, host_blocks=host_blocks)
    )  # fmt: skip
    if on_gpu and not args.enforce_eager:
        worker.capture()
    return worker


def answered(worker: Worker, scheduler: Scheduler, asked: Sequence[Request], found: Found) -> float:
    """All at once. → seconds to the first token of all."""
    for request in asked:
        scheduler.add(request)
        found.tokens[request.id] = []
    in_flight: deque[Any] = deque()
    clock = time.perf_counter if worker.device.type == "cuda" else time.process_time
    began, first_s = clock(), 0.0
    while in_flight or scheduler.has_work:
        step = scheduler.schedule() if len(in_flight) < worker.limits.depth else None
        if step is not None:
            found.computed += sum(row.count for row in step.rows)
            in_flight.append(worker.run(step))
        if in_flight and (step is None or len(in_flight) == worker.limits.depth):
            for token in scheduler.update(in_flight.popleft().result()):
                first_s = first_s or clock() - began
                found.tokens[token.request_id].append(token.token_id)
    found.seconds += clock() - began
    return first_s


def counted(found: Found, scheduler: Scheduler) -> Found:
    load = scheduler.load
    found.preemptions = load.preemptions
    found.blocks_out, found.blocks_in = load.host_saved_blocks, load.host_loaded_blocks
    return found


def crowd(worker: Worker, limits: SchedulerConfig, args: argparse.Namespace) -> Found:
    rnd, vocab = random.Random(1), worker.config.spec.vocab
    sampling = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True)
    asked = [
        Request(
            id=str(i), prompt_token_ids=[rnd.randrange(vocab) for _ in range(args.prompt_tokens)], sampling=sampling
        )
        for i in range(args.requests)
    ]  # fmt: skip
    scheduler, found = Scheduler(limits), Found()
    answered(worker, scheduler, asked, found)
    return counted(found, scheduler)


def talks(worker: Worker, limits: SchedulerConfig, args: argparse.Namespace) -> Found:
    rnd, vocab = random.Random(2), worker.config.spec.vocab
    sampling = SamplingParams(max_tokens=args.turn_tokens, ignore_eos=True)
    said = [[rnd.randrange(vocab) for _ in range(args.talk_tokens)] for _ in range(args.talks)]
    scheduler, found = Scheduler(limits), Found()
    for turn in range(args.turns):
        for i, words in enumerate(said):
            name = f"{i}, turn {turn}"
            asked = Request(id=name, prompt_token_ids=list(words), sampling=sampling)
            first_s = answered(worker, scheduler, [asked], found)
            words += found.tokens[name] + [rnd.randrange(vocab) for _ in range(args.turn_tokens)]
            if turn:
                found.first_s.append(first_s)
    return counted(found, scheduler)


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


def measure(args: argparse.Namespace) -> tuple[dict[str, dict[str, Found]], str]:
    length = max(
        args.prompt_tokens + args.output_tokens, args.talk_tokens + 2 * args.turns * args.turn_tokens
    )
    wanted = {
        crowd: args.requests * blocks_of(args.prompt_tokens + args.output_tokens),
        talks: args.talks * blocks_of(args.talk_tokens + 2 * args.turns * args.turn_tokens),
    }
    most = max(wanted.values())
    began = time.perf_counter()
    worker = ready(args, most, most, length)
    ready_s = time.perf_counter() - began
    answered(worker, Scheduler(worker.limits), [Request(id="warm", prompt_token_ids=[1] * (length - 9),
             sampling=SamplingParams(max_tokens=9))], Found())  # fmt: skip
    results: dict[str, dict[str, Found]] = {}
    for load, blocks in wanted.items():
        small = max(int(blocks * args.share), blocks_of(length) + 1)
        if load is crowd:  # all prompts fit: answers outgrow it
            small = max(small, args.requests * blocks_of(args.prompt_tokens + 1))
        for case in CASES:
            limits = replace(
                worker.limits,
                num_blocks=blocks if case == AMPLE else small,
                host_blocks=most if case == BROUGHT else 0,
            )
            runs = [load(worker, limits, args) for _ in range(args.runs)]
            results.setdefault(load.__name__, {})[case] = min(runs, key=lambda found: found.seconds)
    block = worker._block_bytes()
    told = (
        f"{args.model} {args.dtype}{args.format and '+' + args.format}, {args.device}, ready after {ready_s:.0f} s; a "
        f"block of {BLOCK} tokens is {block / 1e6:.2f} MB, host to device {rate_to(worker.device) / 1e9:.1f} GB/s"
    )  # fmt: skip
    return results, told


def differing(one: Found, other: Found) -> int:
    return sum(one.tokens[name] != other.tokens[name] for name in one.tokens)


def show(results: dict[str, dict[str, Found]], told: str) -> None:
    table = Table(
        "load", "cache", "s", "tok/s", "TTFT ms", "computed", "preempted", "blocks out, in", "other answers"
    )
    for load, cases in results.items():
        for case, found in cases.items():
            generated = sum(map(len, found.tokens.values()))
            ttft = f"{statistics.fmean(found.first_s) * 1e3:,.1f}" if found.first_s else "–"
            table.add_row(
                load,
                case,
                f"{found.seconds:.2f}",
                f"{generated / found.seconds:,.1f}",
                ttft,
                f"{found.computed:,}",
                str(found.preemptions),
                f"{found.blocks_out}, {found.blocks_in}",
                f"{differing(found, cases[AMPLE])} of {len(found.tokens)}",
            )
    console = Console(width=120)
    console.print(table)
    console.print(told)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--format", default="", help="such as kvfp8")
    parser.add_argument(
        "--share", type=float, default=0.72, help="of what a load wants, that the small cache holds"
    )
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--talks", type=int, default=8)
    parser.add_argument("--talk-tokens", type=int, default=8000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--turn-tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    return parser.parse_args(argv)


def main() -> int:
    args = parse()
    results, told = measure(args)
    show(results, told)
    wrong = differing(results["talks"][BROUGHT], results["talks"][AMPLE])
    if args.exact:
        wrong += sum(differing(found, results["crowd"][AMPLE]) for found in results["crowd"].values())
    print(f"answers that differ though they must not: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
