"""What HTTP and batches cost beside the engine alone, and vLLM's server: `python -m tests.bench.serve_bench`.

So many streams at once, each asking again when it is answered: by calls to the coordinator in this process, then over
HTTP from a process of its own, at the same engine. Then all requests at once, as `generate` asks them, and as the lines
of a batch file with its journal. With --vllm-site and --vllm-model (a directory with a config; weights are random) also
over HTTP at vLLM's server. Prompts are random token ids, answers run past any end of text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

from launch.api.batches import answerer
from launch.api.metrics import Facts
from launch.api.server import serve_http
from launch.api.service import Service
from launch.options import EngineOptions, add_engine_arguments, engine_options
from launch.progress import Progress
from launch.start import cluster, deployment
from orchestrator.coordinator import Coordinator
from orchestrator.jobs import Job, examine
from orchestrator.journal import Journal
from orchestrator.request import SamplingParams
from strategies.plan import ParallelDims
from tests.bench.vs_vllm import VLLM_ENVIRONMENT

Result = dict[str, float]
Ask = Callable[[list[int]], Awaitable[tuple[float, int]]]
ALONE, AT_ONCE = "engine alone", "all at once"
COMPLETIONS = "/v1/completions"
VLLM_START_S = 300.0


# --- load -------------------------------------------------------------------------------------------------------


async def load(
    args: argparse.Namespace, vocab: int, ask: Callable[[list[int]], Awaitable[tuple[float, int]]]
) -> Result:
    """`ask` answers a prompt: seconds to the first token, and tokens."""
    rnd, left = random.Random(1), args.requests
    ttfts_s: list[float] = []
    tokens = 0

    async def stream() -> None:
        nonlocal left, tokens
        while left > 0:
            left -= 1
            ttft_s, count = await ask([rnd.randrange(vocab) for _ in range(args.prompt_tokens)])
            ttfts_s.append(ttft_s)
            tokens += count

    begun_s = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(args.streams)))
    seconds = time.perf_counter() - begun_s
    ttfts_s.sort()
    return {
        "tokens_per_s": tokens / seconds,
        "ttft_p50_ms": ttfts_s[len(ttfts_s) // 2] * 1e3,
        "ttft_p99_ms": ttfts_s[int(len(ttfts_s) * 0.99)] * 1e3,
        "tokens": tokens,
    }


_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


class Streamed(asyncio.Protocol):
    """One streamed completion."""

    def __init__(self, request: bytes) -> None:
        self._request, self._held = request, b""
        self.first_s, self.begun_s = 0.0, 0.0
        self.tokens: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.begun_s = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.first_s and b"data: " in data:
            self.first_s = time.perf_counter()
        self._held = (self._held + data)[-4096:]
        if b"data: [DONE]" in self._held and not self.tokens.done():
            self.tokens.set_result(int(_USAGE.findall(self._held)[-1]))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.tokens.done():
            self.tokens.set_exception(ConnectionError(self._held[-300:].decode(errors="replace")))


def generate(args: argparse.Namespace) -> Result:
    """Against a server, from here."""

    async def ask(prompt: list[int]) -> tuple[float, int]:
        body = json.dumps(
            {
                "model": args.name,
                "prompt": prompt,
                "max_tokens": args.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
        ).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        request = head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        transport, made = await asyncio.get_running_loop().create_connection(
            lambda: Streamed(request), "127.0.0.1", args.generate
        )
        try:
            tokens = await made.tokens
        finally:
            transport.close()
        return made.first_s - made.begun_s, tokens

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        return loop.run(load(args, args.vocab, ask))


async def generated(args: argparse.Namespace, port: int, name: str, vocab: int) -> Result:
    """By a process of its own."""
    command = [sys.executable, "-m", "tests.bench.serve_bench", *sys.argv[1:]]
    command += ["--generate", str(port), "--name", name, "--vocab", str(vocab)]
    child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    out, _ = await child.communicate()
    assert child.returncode == 0, "the load generator failed"
    found: Result = json.loads(out.splitlines()[-1])
    return found


# --- ours -------------------------------------------------------------------------------------------------------


def measure_ours(args: argparse.Namespace, options: EngineOptions) -> dict[str, Result]:
    dims, progress = ParallelDims.parse(args.layout), Progress()
    with (
        cluster(options, dims.world_size, progress) as found,
        deployment(found, dims, options, progress) as served,
    ):

        async def measure() -> dict[str, Result]:
            async with served.coordinator(options, None) as coordinator:
                await offline(args, coordinator, options, warm=True)
                alone = await offline(args, coordinator, options)
                over = await over_http(args, coordinator, options)
                again = await offline(args, coordinator, options)
                at_once = [await all_at_once(args, coordinator, options) for _ in range(2)]
                batch = await as_batch(args, coordinator, options, served.limits.max_num_seqs * dims.dp)
            return {
                ALONE: max(alone, again, key=_rate),
                "over HTTP": over,
                AT_ONCE: max(at_once, key=_rate),
                "a batch": batch,
            }

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            return loop.run(measure())


async def offline(
    args: argparse.Namespace, coordinator: Coordinator, options: EngineOptions, *, warm: bool = False
) -> Result:
    tokens = 8 if warm else args.output_tokens
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)

    async def ask(prompt: list[int]) -> tuple[float, int]:
        (done,) = await coordinator.complete(prompt, sampling)
        return done.ttft_s, len(done.token_ids)

    return await load(args, options.spec.vocab, ask)


def _rate(result: Result) -> float:
    return result["tokens_per_s"]


def _prompts(args: argparse.Namespace, options: EngineOptions) -> list[list[int]]:
    rnd = random.Random(2)
    return [
        [rnd.randrange(options.spec.vocab) for _ in range(args.prompt_tokens)] for _ in range(args.requests)
    ]


async def all_at_once(args: argparse.Namespace, coordinator: Coordinator, options: EngineOptions) -> Result:
    sampling = SamplingParams(max_tokens=args.output_tokens, ignore_eos=True)
    begun_s = time.perf_counter()
    await asyncio.gather(*(coordinator.complete(prompt, sampling) for prompt in _prompts(args, options)))
    tokens = args.requests * args.output_tokens
    return {"tokens_per_s": tokens / (time.perf_counter() - begun_s), "tokens": tokens}


async def as_batch(
    args: argparse.Namespace, coordinator: Coordinator, options: EngineOptions, at_once: int
) -> Result:
    body = {"model": "m", "max_tokens": args.output_tokens, "temperature": 0, "ignore_eos": True}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "input.jsonl")
        with path.open("w") as file:
            for number, prompt in enumerate(_prompts(args, options)):
                asked = {"custom_id": str(number), "method": "POST", "url": COMPLETIONS}
                file.write(json.dumps({**asked, "body": {**body, "prompt": prompt}}) + "\n")
        begun_s = time.perf_counter()
        journal = Journal(Path(directory))
        service = Service(coordinator, ["m"], {}, Facts("m", args.layout, 1, {}))
        await Job(path, examine(path), journal, answerer(service, COMPLETIONS, ""), window=2 * at_once).run()
        await journal.close()
        seconds = time.perf_counter() - begun_s
        assert (journal.completed, journal.failed) == (args.requests, 0), "not every line was answered"
    tokens = args.requests * args.output_tokens
    return {"tokens_per_s": tokens / seconds, "tokens": tokens}


async def over_http(args: argparse.Namespace, coordinator: Coordinator, options: EngineOptions) -> Result:
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    service = Service(coordinator, ["m"], {}, Facts("m", args.layout, 1, {}))
    quiet = Progress(quiet=True)
    serving = asyncio.create_task(
        serve_http(service, listener, keys=[], progress=quiet, drain_s=1, takes_signals=False)
    )
    try:
        return await generated(args, listener.getsockname()[1], "m", options.spec.vocab)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


# --- vLLM's --------------------------------------------------------------------------------------------------------


def measure_vllm(args: argparse.Namespace, vocab: int) -> Result:
    """Its server as its users start it, with random weights."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dims = ParallelDims.parse(args.layout)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(args.vllm_model)]
    command += ["--load-format", "dummy", "--skip-tokenizer-init", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "m", "--no-enable-prefix-caching"]
    command += ["--max-model-len", str(args.max_model_len), "--max-num-seqs", str(args.max_num_seqs)]
    command += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
    command += ["-tp", str(dims.tp), "-pp", str(dims.pp), "-dp", str(dims.dp), *args.vllm_flag]
    environment = {
        **os.environ,
        **VLLM_ENVIRONMENT,
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONPATH": str(args.vllm_site.resolve()),
    }
    with subprocess.Popen(command, env=environment) as server:
        try:
            _wait_for(server, port)
            warm = argparse.Namespace(**{**vars(args), "requests": args.streams, "output_tokens": 8})
            asyncio.run(generated_by(warm, port, vocab))
            return asyncio.run(generated_by(args, port, vocab))
        finally:
            server.terminate()


async def generated_by(args: argparse.Namespace, port: int, vocab: int) -> Result:
    return await asyncio.to_thread(
        generate, argparse.Namespace(**{**vars(args), "generate": port, "name": "m", "vocab": vocab})
    )


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    import http.client

    end_s = time.monotonic() + VLLM_START_S
    while time.monotonic() < end_s and server.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("vLLM's server did not start")


# --- the command -----------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_engine_arguments(parser)
    parser.add_argument("--layout", default="tp1")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--vllm-site", type=Path, help="the folder that vLLM is installed in")
    parser.add_argument("--vllm-model", type=Path, help="a directory with the model's config")
    parser.add_argument("--vllm-flag", action="append", default=[], help="another flag for its server")
    parser.add_argument("--generate", type=int, help="only the load, against a port: what the child does")
    parser.add_argument("--name", default="m")
    parser.add_argument("--vocab", type=int, default=0)
    args = parser.parse_args()
    args.max_model_len = args.max_model_len or args.prompt_tokens + args.output_tokens
    return args


def main() -> None:
    args = parse()
    if args.generate is not None:
        print(json.dumps(generate(args)), flush=True)
        return
    args.no_enable_prefix_caching = True
    options = engine_options(args)
    found = measure_ours(args, options)
    show(found)
    if args.vllm_site is not None and args.vllm_model is not None:
        found["vLLM's server"] = measure_vllm(args, options.spec.vocab)
        show(found)


def show(found: dict[str, Result]) -> None:
    """Also before vLLM's server is tried: it may not start."""
    table = Table("", "tokens/s", "of the engine, asked so", "TTFT p50 ms", "TTFT p99 ms")
    for name, result in found.items():
        beside = found[ALONE if "ttft_p50_ms" in result else AT_ONCE]
        figures = (result["tokens_per_s"], result.get("ttft_p50_ms"), result.get("ttft_p99_ms"))
        rate, p50, p99 = ("–" if figure is None else f"{figure:,.1f}" for figure in figures)
        table.add_row(name, rate, f"{_rate(result) / _rate(beside):.1%}", p50, p99)
    Console(width=100).print(table)
    print(json.dumps({"command": " ".join(sys.argv[1:]), **found}), flush=True)


if __name__ == "__main__":
    main()
