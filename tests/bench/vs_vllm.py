"""Ours and vLLM in turns, on one machine at the same work: `python -m tests.bench.vs_vllm --layout tp2 …`.

`single` is one request of 512 random prompt tokens, the least of three times with 1 and with 129 tokens; `batch` is
all requests at once. Both engines run random weights, greedily, past any end of text, without a prefix cache, on the
same share of GPU memory. vLLM runs in a script of its own (--vllm-script), which takes --n, --isl, --osl, --tp, --pp,
--barrier, --no-custom-ar and --quantization, and prints a line `RESULT {…}`. Layouts with `host` at the end run with
NCCL_P2P_DISABLE=1, as cards without peer access do. Every run is a process of its own with a time limit; one that
fails leaves the others' results.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.nvml import read_gpus
from launch.models import resolve
from launch.options import EngineOptions, add_engine_arguments, engine_options
from launch.progress import Progress
from launch.start import Deployment, cluster, deployment
from orchestrator.coordinator import Coordinator
from orchestrator.request import Completion, SamplingParams
from strategies.plan import Layout, ParallelDims
from strategies.source import spec_of
from tests.bench import roofline
from tests.bench.child import run_child
from tests.bench.held import most_held, visible

SINGLE_PROMPT_TOKENS, SINGLE_OUTPUT_TOKENS, SINGLE_RUNS = 512, 129, 3
LIMIT_S = {"start": 45, "ours": 90, "vllm": 150}  # of a child; vLLM's start alone takes up to 90
VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "INFO",  # which tells how many KV tokens fit
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Metric:
    key: str  # in a RESULT line
    label: str
    digits: int
    higher_is_better: bool


METRICS = (
    Metric("ttft_ms", f"TTFT at {SINGLE_PROMPT_TOKENS} tokens, ms", 1, False),
    Metric("tpot_ms", "TPOT of one request, ms", 2, False),
    Metric("single_tok_s", "single, tokens/s", 0, True),
    Metric("batch_out_tok_s", "batch, output tokens/s", 0, True),
    Metric("kv_tokens", "KV tokens that fit", 0, True),
    Metric("held_gb", "most memory held on a GPU, GB", 1, False),
    Metric("start_s", "process start to first token, s", 1, False),
    Metric("load_s", "engine start, imports left out, s", 1, False),
)
TO_REACH: Mapping[tuple[str, str], float] = {  # (layout, metric): Llama-3.1-8B in bfloat16 on 2 × H100
    ("tp1", "single_tok_s"): 178,
    ("tp1", "ttft_ms"): 16,
    ("tp1", "start_s"): 25,
    ("tp2", "single_tok_s"): 300,
    ("pp2", "single_tok_s"): 174,
    ("dp2", "batch_out_tok_s"): 10_500,
    ("tp2", "batch_out_tok_s"): 9_900,
    ("pp2", "batch_out_tok_s"): 9_700,
    ("tp2host", "batch_out_tok_s"): 5_300,
}

Result = dict[str, float]  # by a Metric's key; also batch_s and batch_prefill_s, which the table leaves out


# --- ours ---------------------------------------------------------------------------------------------------


def measure_ours(options: EngineOptions, dims: ParallelDims, args: argparse.Namespace) -> Result:
    """The whole product, in this process: Ray, channels, coordinator."""
    began = time.perf_counter()
    progress = Progress()
    with (
        cluster(options, dims.world_size, progress) as found,
        deployment(found, dims, options, progress) as started,
    ):
        load_s = time.perf_counter() - began
        timed = asyncio.run(_timed(started, options, args))
        kv_tokens = started.limits.num_blocks * started.limits.block_size * dims.dp
        return {**timed, "kv_tokens": kv_tokens, "load_s": load_s}


async def _timed(started: Deployment, options: EngineOptions, args: argparse.Namespace) -> Result:
    rnd, vocab, dp = random.Random(0), options.spec.vocab, started.dims.dp
    async with started.coordinator(options, None) as coordinator:

        async def seconds(n: int, prompt_tokens: int, output_tokens: int) -> tuple[float, list[Completion]]:
            prompts = [[rnd.randrange(vocab) for _ in range(prompt_tokens)] for _ in range(n)]
            start = time.perf_counter()
            done = await _ask(coordinator, prompts, output_tokens)
            return time.perf_counter() - start, done

        await seconds(2 * dp, 128, 16)
        await seconds(min(64 * dp, args.requests), args.prompt_tokens, 8)
        first, whole = [
            min([(await seconds(1, SINGLE_PROMPT_TOKENS, tokens))[0] for _ in range(SINGLE_RUNS)])
            for tokens in (1, SINGLE_OUTPUT_TOKENS)
        ]
        batch_s, done = await seconds(args.requests, args.prompt_tokens, args.output_tokens)
    tpot = (whole - first) / (SINGLE_OUTPUT_TOKENS - 1)
    return {
        "ttft_ms": first * 1e3,
        "tpot_ms": tpot * 1e3,
        "single_tok_s": 1 / tpot,
        "batch_s": batch_s,
        "batch_out_tok_s": args.requests * args.output_tokens / batch_s,
        "batch_prefill_s": max(c.ttft_s for c in done),
    }


async def _ask(
    coordinator: Coordinator, prompts: Sequence[Sequence[int]], output_tokens: int
) -> list[Completion]:
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    answers = await asyncio.gather(*(coordinator.complete(prompt, sampling) for prompt in prompts))
    done = [answer[0] for answer in answers]
    assert all(len(c.token_ids) == output_tokens for c in done), "an answer is short"
    return done


def options_of(args: argparse.Namespace) -> EngineOptions:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    options = engine_options(parser.parse_args([args.model, *_engine_flags(args)]))
    return replace(options, format=layout_of(args.layout).format.name)


def _engine_flags(args: argparse.Namespace) -> list[str]:
    return [
        *("--weights", "dummy", "--device", args.device, "--no-enable-prefix-caching"),
        *("--max-model-len", str(args.max_model_len), "--max-num-seqs", str(args.max_num_seqs)),
        *("--max-num-batched-tokens", str(args.max_num_batched_tokens)),
        *("--gpu-memory-utilization", str(args.gpu_memory_utilization)),
    ]


# --- the children -------------------------------------------------------------------------------------------


def environment(layout: str, **more: str) -> dict[str, str]:
    host = {"NCCL_P2P_DISABLE": "1"} if "host" in layout else {}
    return {**os.environ, "PYTHONUNBUFFERED": "1", **host, **more}


def ours(args: argparse.Namespace) -> Result | None:
    command = [sys.executable, "-m", "tests.bench.vs_vllm", *sys.argv[1:], "--in-process"]
    text, _ = run_child(command, environment(args.layout), Path.cwd(), args.limit_s["ours"], until="RESULT ")
    return parse_result(text)


def start_s(args: argparse.Namespace) -> float | None:
    """Seconds from a command to its first token, as a user waits for it."""
    with tempfile.TemporaryDirectory() as directory:
        prompts = Path(directory, "prompt.jsonl")
        prompts.write_text(json.dumps({"prompt_token_ids": list(range(SINGLE_PROMPT_TOKENS))}) + "\n")
        command = [sys.executable, "-m", "launch", "generate", args.model, *_engine_flags(args)]
        command += [
            "--layout",
            layout_of(args.layout).name,
            "--prompts",
            str(prompts),
            "--max-tokens",
            "1",
            "--json",
        ]
        limit = args.limit_s["start"]
        return run_child(command, environment(args.layout), Path.cwd(), limit, until='{"token_ids"')[1]


def vllm(args: argparse.Namespace) -> Result | None:
    dims = dims_of(args.layout)
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(dims.dp) as pool:
        barrier = str(Path(directory, "barrier"))
        found = list(pool.map(lambda replica: _vllm_replica(args, dims, replica, barrier), range(dims.dp)))
    done = [result for result in found if result is not None]
    return together(done) if len(done) == dims.dp else None


def _vllm_replica(args: argparse.Namespace, dims: ParallelDims, replica: int, barrier: str) -> Result | None:
    script = args.vllm_script.resolve()
    command = [sys.executable, str(script), *vllm_flags(args.layout, dims, barrier)]
    command += ["--n", str(args.requests // dims.dp), "--isl", str(args.prompt_tokens)]
    command += ["--osl", str(args.output_tokens), "--max-seqs", str(args.max_num_seqs)]
    own = environment(args.layout, PYTHONPATH=str(args.vllm_site.resolve()), **VLLM_ENVIRONMENT)
    if dims.replica_size == 1:
        own["CUDA_VISIBLE_DEVICES"] = str(visible(dims.dp)[replica])
    text, _ = run_child(command, own, script.parent, args.limit_s["vllm"], until="RESULT ")
    return parse_result(text)


def vllm_flags(layout: str, dims: ParallelDims, barrier: str) -> list[str]:
    flags = ["--tag", layout, "--tp", str(dims.tp), "--pp", str(dims.pp)]
    if dims.dp > 1:  # its processes begin to measure together
        flags += ["--barrier", barrier]
    if "host" in layout and dims.tp > 1:  # its own all-reduce wants peer access
        flags.append("--no-custom-ar")
    if layout_of(layout).format.name == "fp8":  # vLLM makes it at load too
        flags += ["--quantization", "fp8"]
    return flags


def dims_of(layout: str) -> ParallelDims:
    return layout_of(layout).dims


def layout_of(layout: str) -> Layout:
    return Layout.parse(layout.replace("host", ""))


# --- results ------------------------------------------------------------------------------------------------


def parse_result(text: str) -> Result | None:
    """Numbers of the last RESULT line, with vLLM's KV tokens where its log tells them; None without such a line."""
    lines = re.findall(r"^.*?RESULT (\{.*\})\s*$", text, re.MULTILINE)
    if not lines:
        return None
    found = {key: value for key, value in json.loads(lines[-1]).items() if isinstance(value, int | float)}
    sizes = [int(size.replace(",", "")) for size in re.findall(r"GPU KV cache size: ([\d,]+) tokens", text)]
    return {**found, "kv_tokens": min(sizes)} if sizes else found


def together(replicas: Sequence[Result]) -> Result:
    """Of replicas that ran side by side: throughput and room add up, the slowest start counts, else means."""
    added, slowest = ("batch_out_tok_s", "kv_tokens"), ("batch_s", "load_s")
    keys = [key for key in replicas[0] if all(key in found for found in replicas)]
    ways = {key: sum if key in added else max if key in slowest else statistics.fmean for key in keys}
    return {key: way([found[key] for found in replicas]) for key, way in ways.items()}


def median(rounds: Sequence[Result]) -> Result:
    """Of the rounds that were not cut short, metric by metric."""
    keys = dict.fromkeys(key for found in rounds for key in found)
    return {key: statistics.median(found[key] for found in rounds if key in found) for key in keys}


def rows(layout: str, own: Result, theirs: Result, *, with_goals: bool) -> list[tuple[str, ...]]:
    """metric, ours, vLLM's, ratio (over 1: ours is better), to reach"""
    found = []
    for metric in METRICS:
        a, b = own.get(metric.key), theirs.get(metric.key)
        if a is None and b is None:
            continue
        ratio = f"{a / b if metric.higher_is_better else b / a:.2f}" if a and b else ""
        goal = TO_REACH.get((layout, metric.key)) if with_goals else None
        sign = "≥" if metric.higher_is_better else "≤"
        to_reach = f"{sign} {goal:,.0f}" if goal is not None else ""
        found.append((metric.label, _shown(a, metric), _shown(b, metric), ratio, to_reach))
    return found


def _shown(value: float | None, metric: Metric) -> str:
    return "–" if value is None else f"{value:,.{metric.digits}f}"


# --- the command --------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", required=True, help="tp1, dp2, tp2, pp2, tp2host, pp2host, tp1+int4")
    parser.add_argument("--vllm-site", type=Path, help="the folder that vLLM is installed in")
    parser.add_argument("--vllm-script", type=Path, help="what times it, beside its model's config")
    parser.add_argument("--only", choices=("ours", "vllm"))
    parser.add_argument("--rounds", type=int, default=1, help="of ours and vLLM in turn; medians are printed")
    parser.add_argument("--model", default="llama-3.1-8b", help="ours; vLLM's is the script's own")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.88, help="the vLLM script's own")
    parser.add_argument("--patience", type=float, default=1.0, help=f"times the limits {LIMIT_S}, in seconds")
    parser.add_argument("--commit", help="which is measured, where git does not tell")
    parser.add_argument("--in-process", action="store_true", help="measure ours here: what the children do")
    args = parser.parse_args(argv)
    args.limit_s = {name: args.patience * limit for name, limit in LIMIT_S.items()}
    if args.only != "ours" and not args.in_process and None in (args.vllm_site, args.vllm_script):
        parser.error("vLLM needs --vllm-site and --vllm-script; or give --only ours")
    return args


def main() -> None:
    args = parse()
    if args.in_process:
        found = measure_ours(options_of(args), dims_of(args.layout), args)
        print("RESULT", json.dumps(found), flush=True)
        return
    measured: dict[str, list[Result]] = {"ours": [], "vllm": []}
    for _ in range(args.rounds):
        if args.only != "vllm":
            waited = start_s(args) if (args.layout, "start_s") in TO_REACH else None
            measured["ours"].append(_with_held(ours, args) | ({"start_s": waited} if waited else {}))
        if args.only != "ours":
            measured["vllm"].append(_with_held(vllm, args))
    show(args, median(measured["ours"]), median(measured["vllm"]))
    print(json.dumps({**provenance(args), **measured}))
    if not all("ttft_ms" in found for rounds in measured.values() for found in rounds):
        sys.exit(1)  # some run failed: its last lines are above


def _with_held(run: Callable[[argparse.Namespace], Result | None], args: argparse.Namespace) -> Result:
    """Both engines get the same share of the memory, and not all of what they hold counts as within it."""
    with most_held(visible(dims_of(args.layout).world_size)) as held:
        found = run(args) or {}
    return found | ({"held_gb": held[0] / 1e9} if held[0] else {})


def show(args: argparse.Namespace, own: Result, theirs: Result) -> None:
    goals = args.device == "cuda" and resolve(args.model).name == "Llama-3.1-8B"
    table = Table("metric", "ours", "vLLM", "ratio", "to reach", title=args.layout)
    for row in rows(args.layout, own, theirs, with_goals=goals):
        table.add_row(*row)
    Console(width=100).print(table)
    if args.device == "cuda" and "tpot_ms" in own:
        print("\n".join(roofline_lines(args, own)))


def roofline_lines(args: argparse.Namespace, own: Result) -> list[str]:
    spec, dims = spec_of(resolve(args.model)), dims_of(args.layout)
    context = SINGLE_PROMPT_TOKENS + SINGLE_OUTPUT_TOKENS / 2
    # One request is on tp devices at a time, a batch on all.
    step_bytes = roofline.decode_bytes(spec, spec.dtype, context) / dims.tp
    single = roofline.prefill_flops(spec, SINGLE_PROMPT_TOKENS) / dims.tp
    batch = args.requests * roofline.prefill_flops(spec, args.prompt_tokens) / dims.world_size
    gpus = read_gpus().gpus
    most = roofline.limits_of(gpus[0].name if gpus else "")
    until = "prefill, batch, until the last first token"
    return [
        roofline.memory_line("decode, single", step_bytes, own["tpot_ms"] / 1e3, most),
        roofline.compute_line("prefill, single (TTFT)", single, own["ttft_ms"] / 1e3, most),
        roofline.compute_line(until, batch, own["batch_prefill_s"], most),
    ]


def provenance(args: argparse.Namespace) -> dict[str, object]:
    report = read_gpus()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or git.stdout.strip() or None,
        "command": " ".join(sys.argv[1:]),
        "torch": _version("torch", sys.path),
        "gpus": [gpu.name for gpu in report.gpus],
        "driver": report.driver,
        "vllm_version": _version("vllm", [str(args.vllm_site)]) if args.vllm_site else None,
        "layout": args.layout,
    }


def _version(name: str, path: Sequence[str]) -> str | None:
    found = importlib.metadata.distributions(name=name, path=list(path))
    return next((distribution.version for distribution in found), None)


if __name__ == "__main__":
    main()
