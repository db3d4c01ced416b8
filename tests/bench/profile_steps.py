"""Where a step's time goes on the GPU, by kernel and gap: `python -m tests.bench.profile_steps --layout tp2 …`.

A process a rank, without Ray or channels: each drives a scheduler of its own, which comes to the same steps, since
every request runs to its full length. Prints each stage's kernels of some prefill steps and of some decode steps, and
leaves their traces in a folder if asked to.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from cluster.loopback import free_port
from launch.models import resolve
from orchestrator.engine_config import EngineConfig
from orchestrator.request import Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.step import Step, StepResult
from orchestrator.worker import Worker
from strategies.pipeline import shard_replica
from strategies.plan import Layout
from strategies.source import spec_of
from strategies.spec import Workload

WARM_UP_STEPS, PREFILL_STEPS, DECODE_STEPS = 4, 3, 8
SHOWN = 16  # kernels in a table


class Driver:
    """Runs the scheduler's steps on one rank, as the leader does, with made-up tokens where a rank learns none."""

    def __init__(self, worker: Worker, args: argparse.Namespace, done: Any) -> None:
        """`done`: a queue from the last stage to the first, of steps that came to their end."""
        self.worker, self.scheduler, self._done = worker, Scheduler(worker.limits), done
        self._in_flight: deque[tuple[Step, Any]] = deque()
        sampling = SamplingParams(max_tokens=2 * DECODE_STEPS + 64, ignore_eos=True)
        for i in range(args.requests):
            prompt = [(i * 7919 + j) % worker.config.spec.vocab for j in range(args.prompt_tokens)]
            self.scheduler.add(Request(id=f"{i}", prompt_token_ids=prompt, sampling=sampling))

    def step(self) -> Step:
        step = self.scheduler.schedule()
        assert step is not None, "the requests came to their end"
        self._in_flight.append((step, self.worker.runner.run(step)))
        if len(self._in_flight) == self.worker.limits.depth:
            self.take_in()
        return step

    def finish(self) -> None:
        while self._in_flight:
            self.take_in()

    def take_in(self) -> None:
        step, pending = self._in_flight.popleft()
        shard = self.worker.shard
        if pending is not None:
            pending.result()
            if shard.pp > 1:
                self._done.put(step.id)
        elif shard.rank == 0:
            assert self._done.get() == step.id
        self.scheduler.update(StepResult(step.id, [0] * sum(row.samples for row in step.rows)))


def run_rank(rank: int, args: argparse.Namespace, port: int, done: Any) -> None:
    worker = Worker()
    join_ranks(worker, rank, args, port)
    driver = Driver(worker, args, done)
    for _ in range(WARM_UP_STEPS):  # which allocate, and set up what is set up at a first use
        driver.step()
    profile(driver, PREFILL_STEPS, "prefill", args.traces)
    if not args.prefill_only:
        while max(row.count for row in driver.step().rows) > 1:
            pass
        for _ in range(3):
            driver.step()
        profile(driver, DECODE_STEPS, "decode", args.traces)
    driver.finish()
    worker.collectives.leave()
    sys.stdout.flush()
    os._exit(0)  # freeing what the profiler saw of gloo's threads crashes (torch 2.13)


def join_ranks(worker: Worker, rank: int, args: argparse.Namespace, port: int) -> None:
    """As launch/start.py gets a rank ready."""
    source, layout = resolve(args.model), Layout.parse(args.layout)
    spec, on_gpu, dims = spec_of(source), args.device == "cuda", layout.dims
    config = EngineConfig(
        source,
        spec,
        "bfloat16",
        args.device,
        format=layout.format.name,
        dummy_weights=True,
        max_num_batched_tokens=args.max_num_batched_tokens,
        memory_utilization=0.88,
        memory_cap_bytes=None if args.device_memory_gb is None else int(args.device_memory_gb * 1e9),
    )
    shards = shard_replica(spec, dims, workload=Workload(concurrency=args.requests), kept=layout.format)
    worker.join(config, shards[rank], f"tcp://127.0.0.1:{port}", rank)
    worker.load()
    attention = worker.choose_attention() if on_gpu else ("torch's SDPA", "no GPU")
    if on_gpu:
        print("products by {}: {}".format(*worker.choose_products()), flush=True)
    blocks = worker.fit_blocks()
    limits = SchedulerConfig(
        min(blocks, args.requests * (args.prompt_tokens + 256) // 16),
        max_num_seqs=max(args.requests, 8),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        groups=dims.pp,
        prefix_caching=False,
        run_ahead=on_gpu,
    )
    worker.allocate(limits)
    if not args.prefill_only:
        worker.capture()
    if not rank:
        print(f"attention of prompts by {': '.join(attention)}")
        print(f"{blocks * 16} KV tokens; small sums through {worker.collectives.stage.path}")


def profile(driver: Driver, steps: int, name: str, traces: Path | None) -> None:
    on_gpu, shard = driver.worker.device.type == "cuda", driver.worker.shard
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    tokens = 0
    _synchronize(on_gpu)
    began = time.perf_counter()
    for _ in range(steps):
        driver.step()
    _synchronize(on_gpu)
    alone_s = time.perf_counter() - began
    with torch.profiler.profile(activities=[activity]) as found:
        began = time.perf_counter()
        for _ in range(steps):
            tokens += sum(row.count for row in driver.step().rows)
        host_s = time.perf_counter() - began
        _synchronize(on_gpu)
        wall_s = time.perf_counter() - began
    if traces is not None:
        found.export_chrome_trace(str(traces / f"{name}-{shard.rank}.json.gz"))
    if shard.tp_rank:
        return
    kernels = [
        (event.name(), event.start_ns() / 1e6, event.duration_ns() / 1e6)
        for event in found.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.device_type() != torch.autograd.DeviceType.CPU or not on_gpu
    ]
    print(
        f"\n{name}, stage {shard.stage}: {steps} steps of {tokens / steps:.0f} tokens, "
        f"{wall_s / steps * 1e3:.2f} ms each, of which the host {host_s / steps * 1e3:.2f}; "
        f"{alone_s / steps * 1e3:.2f} ms before, when nobody looked"
    )
    show(kernels, steps)


def show(kernels: Sequence[tuple[str, float, float]], steps: int) -> None:
    """Of (name, start in ms, ms): by name the sums, and how much later they ended than all before, for they overlap;
    and what no kernel covers. All by step."""
    total_ms: dict[str, float] = defaultdict(float)
    later_ms: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    gaps_ms, end_ms = [], kernels[0][1] if kernels else 0.0
    for name, start_ms, ms in sorted(kernels, key=lambda kernel: kernel[1]):
        total_ms[name] += ms
        count[name] += 1
        if start_ms > end_ms:
            gaps_ms.append(start_ms - end_ms)
        later_ms[name] += max(0.0, start_ms + ms - max(end_ms, start_ms))
        end_ms = max(end_ms, start_ms + ms)
    long = [gap for gap in gaps_ms if gap > 0.02]
    print(
        f"  busy {sum(later_ms.values()) / steps:.3f} ms, kernels added up {sum(total_ms.values()) / steps:.3f}, ",
        end="",
    )
    print(
        f"gaps {sum(gaps_ms) / steps:.3f}, of these over 20 us {sum(long) / steps:.3f} in {len(long) / steps:.1f}"
    )
    for name in sorted(total_ms, key=lambda name: -later_ms[name])[:SHOWN]:
        each_us = total_ms[name] / count[name] * 1e3
        print(
            f"  {later_ms[name] / steps:9.3f} ms of {total_ms[name] / steps:9.3f} {count[name] / steps:6.1f} x "
            f"{each_us:8.2f} us  {name[:100]}"
        )


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", default="tp1", help="tp1, pp2, tp2+int4")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument(
        "--max-model-len", type=int, default=4096, help="what attention's kernels are made for"
    )
    parser.add_argument("--device-memory-gb", type=float, help="of each card, such as 25.3")
    parser.add_argument("--traces", type=Path, help="a folder for Chrome's traces")
    parser.add_argument("--prefill-only", action="store_true", help="spares the start its graphs")
    args = parser.parse_args()
    world_size = Layout.parse(args.layout).dims.world_size
    done = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(run_rank, (args, free_port(), done), nprocs=world_size)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
