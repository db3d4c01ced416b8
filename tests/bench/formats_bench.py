"""Weights in fewer bits beside the model's own: `python -m tests.bench.formats_bench --formats bf16,int4,fp8,int8`.

One GPU, one process, no Ray and no channels: the scheduler and the runner alone, as profile_steps.py drives them, on
random weights. `single` is one request of 512 prompt tokens, the least of three times with 1 and with 129 tokens;
`decode at 128` the same of 128 requests of 64 prompt tokens, with 1 and 65; `prefill` 64 prompts of 1024 tokens;
`batch` 256 requests of 1024 + 256 tokens at once. A line is printed once a format is through or failed, then a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cluster.loopback import free_port
from launch.models import resolve
from orchestrator.engine_config import EngineConfig
from orchestrator.request import Request, SamplingParams
from orchestrator.scheduler import Scheduler, SchedulerConfig
from orchestrator.worker import Worker
from strategies.formats import FORMATS
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from strategies.source import spec_of
from strategies.spec import Workload

SINGLE, MANY = (512, 129), (64, 65)  # tokens of a prompt, and of an answer
MANY_REQUESTS, PREFILL_REQUESTS, PREFILL_TOKENS = 128, 64, 1024
RUNS = 3

Result = dict[str, float]


def ready(args: argparse.Namespace, kept: str) -> Worker:
    """A worker as launch/start.py gets one ready."""
    source, on_gpu = resolve(args.model), args.device == "cuda"
    spec = spec_of(source)
    worker = Worker()
    config = EngineConfig(
        source, spec, "bfloat16", args.device, format=kept, dummy_weights=True,
        max_num_batched_tokens=args.max_num_batched_tokens, memory_utilization=0.88,
    )  # fmt: skip
    (shard,) = shard_replica(spec, ParallelDims(), workload=Workload(concurrency=256), kept=FORMATS[kept])
    worker.join(config, shard, f"tcp://127.0.0.1:{free_port()}", 0)
    worker.load()
    if on_gpu:
        worker.choose_attention()
    blocks = worker.fit_blocks() if on_gpu else 4096
    worker.allocate(
        SchedulerConfig(
            min(blocks, 256 * 256),
            max_num_batched_tokens=args.max_num_batched_tokens,
            prefix_caching=False,
            run_ahead=on_gpu,
        )
    )
    worker.capture()
    return worker


def seconds(worker: Worker, requests: int, prompt_tokens: int, output_tokens: int) -> float:
    """All requests at once, from the first step to the last token."""
    rnd, vocab = random.Random(0), worker.config.spec.vocab
    scheduler = Scheduler(worker.limits)
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    for i in range(requests):
        prompt = [rnd.randrange(vocab) for _ in range(prompt_tokens)]
        scheduler.add(Request(id=str(i), prompt_token_ids=prompt, sampling=sampling))
    in_flight: deque[Any] = deque()
    began = time.perf_counter()
    while in_flight or scheduler.has_work:
        step = scheduler.schedule() if len(in_flight) < worker.limits.depth else None
        if step is not None:
            in_flight.append(worker.runner.run(step))
        if in_flight and (step is None or len(in_flight) == worker.limits.depth):
            scheduler.update(in_flight.popleft().result())
    return time.perf_counter() - began


def per_token(worker: Worker, requests: int, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
    """Seconds to the first tokens, and from one to the next."""
    first, whole = [
        min(seconds(worker, requests, prompt_tokens, n) for _ in range(RUNS)) for n in (1, output_tokens)
    ]
    return first, (whole - first) / (output_tokens - 1)


def measure(args: argparse.Namespace, kept: str) -> Result:
    began = time.perf_counter()
    worker = ready(args, kept)
    found: Result = {"ready_s": time.perf_counter() - began}
    found["weights_gb"] = sum(p.nbytes for p in worker.model.parameters()) / 1e9
    seconds(worker, 2, 128, 8)
    first_s, found["tpot_ms"] = per_token(worker, 1, *SINGLE)
    found["ttft_ms"] = first_s * 1e3
    found["tpot_ms"] *= 1e3
    found["step_128_ms"] = per_token(worker, MANY_REQUESTS, *MANY)[1] * 1e3
    prefill_s = min(seconds(worker, PREFILL_REQUESTS, PREFILL_TOKENS, 1) for _ in range(2))
    found["prefill_tok_s"] = PREFILL_REQUESTS * PREFILL_TOKENS / prefill_s
    if args.requests:
        batch_s = seconds(worker, args.requests, args.prompt_tokens, args.output_tokens)
        found["batch_out_tok_s"] = args.requests * args.output_tokens / batch_s
    worker.collectives.leave()
    return found


ROWS = (  # key, label, digits, more is better
    ("tpot_ms", "single, TPOT ms", 2, False),
    ("ttft_ms", "single, TTFT ms", 1, False),
    ("step_128_ms", "decode at 128, ms a step", 2, False),
    ("prefill_tok_s", "prefill, tokens/s", 0, True),
    ("batch_out_tok_s", "batch, output tokens/s", 0, True),
    ("weights_gb", "weights, GB", 2, False),
    ("ready_s", "ready after, s", 1, False),
)


def show(results: dict[str, Result]) -> None:
    """Every format, and how many times better it is than the first."""
    base = next(iter(results.values()))
    table = Table("metric", *results)
    for key, label, digits, more in ROWS:
        cells = []
        for found in results.values():
            if key not in found:
                cells.append("–")
                continue
            ratio = found[key] / base[key] if more else base[key] / found[key]
            cells.append(
                f"{found[key]:,.{digits}f} ({ratio:.2f})" if key in base else f"{found[key]:,.{digits}f}"
            )
        table.add_row(label, *cells)
    Console(width=120).print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="bf16,int4,fp8,int8")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=256, help="of the batch; 0: leave it out")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    results: dict[str, Result] = {}
    for name in args.formats.split(","):
        try:
            results[name] = measure(args, "" if name == "bf16" else name)
        except Exception as error:
            print("FAILED", name, type(error).__name__, str(error)[:300].replace("\n", " "), flush=True)
            if "CUDA" in str(error):
                raise  # the context is lost
            continue
        print(
            "RESULT",
            name,
            json.dumps({key: round(value, 4) for key, value in results[name].items()}),
            flush=True,
        )
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if results:
        show(results)


if __name__ == "__main__":
    main()
