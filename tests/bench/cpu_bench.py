"""What the CPU path costs, on SmolLM2 in float32: `python -m tests.bench.cpu_bench`. Wants an idle machine.

Decode is timed through the whole product (Ray, channel, coordinator), beside transformers' `generate` with the same
threads, in turns. TPOT is the mean time between an answer's tokens, its first one left out.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from cluster.channel import Address, Reader, Via, Writer
from launch.options import EngineOptions
from launch.progress import Progress
from launch.start import Deployment, cluster, deployment
from orchestrator.engine.slots import Slots
from orchestrator.engine.told import told_of_decodes
from orchestrator.request import Completion, Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import StepResult
from strategies.plan import ParallelDims
from tests.oracle import generated
from tests.serving import options
from tests.tiny import smollm2

PROMPT_TOKENS, OUTPUT_TOKENS, ROUNDS, AT_ONCE = 32, 48, 3, 16
CONTROL_STEPS = 500
HOST_SEQUENCES = 256


def main() -> None:
    table = Table("what", "measured", "to reach")
    for row in (*decode_rows(), control_row(), host_row(), *command_rows()):
        table.add_row(*row)
    Console(width=110).print(table)


def decode_rows() -> list[tuple[str, str, str]]:
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    model = smollm2()
    asked = options(
        "smollm2", max_model_len=256, max_num_batched_tokens=2048, max_num_seqs=AT_ONCE, block_size=16
    )
    rnd = random.Random(0)
    prompts = [[rnd.randrange(asked.spec.vocab) for _ in range(PROMPT_TOKENS)] for _ in range(AT_ONCE)]
    theirs: list[float] = []

    def ask_transformers() -> None:
        start = time.perf_counter()
        generated(model, prompts[0], 1)
        first = time.perf_counter() - start
        generated(model, prompts[0], OUTPUT_TOKENS)
        whole = time.perf_counter() - start - first
        theirs.append((whole - first) / (OUTPUT_TOKENS - 1))

    with (
        cluster(asked, 1, Progress()) as found,
        deployment(found, ParallelDims(), asked, Progress()) as served,
    ):
        one, many = asyncio.run(_rounds(served, asked, prompts, ask_transformers))
    ours, ratio = min(one), min(theirs) / min(one)
    rates = 1 / ours, max(many)
    return [
        ("transformers, batch 1, TPOT", f"{min(theirs) * 1e3:.1f} ms", ""),
        (
            f"ours tp1, batch 1, TPOT ({threads} threads)",
            f"{ours * 1e3:.1f} ms, {ratio:.2f} × as fast",
            "≥ 1 ×",
        ),
        (
            f"ours tp1, {AT_ONCE} requests, tokens/s in decode",
            f"{rates[1]:.0f}, {rates[1] / rates[0]:.1f} × one stream's {rates[0]:.1f}",
            "≥ 3 ×",
        ),
    ]


async def _rounds(
    served: Deployment, asked: EngineOptions, prompts: Sequence[Sequence[int]], between: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds a token of one stream, tokens a second of all at once; transformers in turns with them."""
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    one, many = [], []
    async with served.coordinator(asked, None) as coordinator:
        for _ in range(ROUNDS):
            (single,) = await coordinator.complete(prompts[0], sampling)
            one.append(_tpot(single))
            answers = await asyncio.gather(*(coordinator.complete(p, sampling) for p in prompts))
            many.append(len(prompts) / statistics.fmean(_tpot(a[0]) for a in answers))
            between()
    return one, many


def _tpot(done: Completion) -> float:
    return (done.latency_s - done.ttft_s) / (len(done.token_ids) - 1)


def control_row() -> tuple[str, str, str]:
    """A decode step's control at 16 sequences: schedule, encode, send to a follower, update."""
    scheduler = Scheduler(SchedulerConfig(num_blocks=4096, max_num_seqs=AT_ONCE))
    writer = Writer.create([Via.MEMORY])
    reader = multiprocessing.get_context("spawn").Process(target=_follow, args=(writer.address(0),))
    reader.start()
    for i in range(AT_ONCE):
        sampling = SamplingParams(max_tokens=CONTROL_STEPS + 1)
        scheduler.add(Request(id=str(i), prompt_token_ids=[i] * PROMPT_TOKENS, sampling=sampling))
    times = []
    for _ in range(CONTROL_STEPS):
        start = time.perf_counter()
        step = scheduler.schedule()
        assert step is not None
        writer.send(msgspec.msgpack.encode(step))
        tokens = scheduler.update(StepResult(step.id, [7] * len(step.rows)))
        msgspec.msgpack.encode(tokens)
        times.append(time.perf_counter() - start)
    writer.send(b"")
    reader.join()
    writer.close()
    median, worst = statistics.median(times), sorted(times)[int(0.99 * len(times))]
    return (
        f"control of a step, {AT_ONCE} sequences",
        f"{median * 1e3:.3f} ms (p99 {worst * 1e3:.3f})",
        "< 0.5 ms",
    )


def host_row() -> tuple[str, str, str]:
    """All that the leader's Python does in a GPU's decode step at 256 sequences, one step ahead, but launching it."""
    limits = SchedulerConfig(
        num_blocks=32768, max_num_seqs=HOST_SEQUENCES, max_num_batched_tokens=8192, run_ahead=True
    )
    scheduler, slots = Scheduler(limits), Slots(HOST_SEQUENCES, limits.max_model_len, limits.block_size)
    for i in range(HOST_SEQUENCES):
        sampling = SamplingParams(max_tokens=CONTROL_STEPS + 8)
        scheduler.add(Request(id=str(i), prompt_token_ids=[i] * PROMPT_TOKENS, sampling=sampling))
    in_flight: deque[StepResult] = deque()
    times = []
    for _ in range(CONTROL_STEPS):
        start = time.perf_counter()
        step = scheduler.schedule()
        assert step is not None
        msgspec.msgpack.encode(step)
        slots.remember(step)
        decodes = all(row.count == 1 for row in step.rows)
        if decodes:
            told_of_decodes(step.rows, slots, HOST_SEQUENCES, HOST_SEQUENCES)
        assert slots.all_plain(step.rows)
        in_flight.append(StepResult(step.id, [7] * sum(row.samples for row in step.rows)))
        if len(in_flight) == limits.depth:
            msgspec.msgpack.encode(scheduler.update(in_flight.popleft()))
        if decodes:
            times.append(time.perf_counter() - start)
    return (
        f"host side of a decode step, {HOST_SEQUENCES} sequences",
        f"{statistics.median(times) * 1e3:.2f} ms",
        "< 1.5 ms",
    )


def _follow(address: Address) -> None:
    reader = Reader.open(address)
    while (message := reader.recv(timeout_s=30)) != b"":
        assert message is not None, "the writer fell silent"


def command_rows() -> list[tuple[str, str, str]]:
    plan = ["plan", "llama-3.3-70b", "--on", "launch/recipes/dual-4090.yaml"]
    return [
        ("shardwise plan, wall time", f"{_seconds(plan):.2f} s", "< 1.5 s"),
        ("shardwise --help, wall time", f"{_seconds(['--help']):.2f} s", "< 0.3 s"),
    ]


def _seconds(arguments: Sequence[str]) -> float:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "launch", *arguments], capture_output=True, check=False)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(5))


if __name__ == "__main__":
    main()
