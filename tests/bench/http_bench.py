"""What the server itself costs, with a replica that computes nothing: `python -m tests.bench.http_bench`.

The server and the load generator are two processes of one host, so both share its cores. A token's text is the number
of the step that gave it, and steps leave their times in a file that both map: its added latency is the time at which
its bytes were read, less the time of its step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import multiprocessing
import re
import resource
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import uvloop

from launch.api.metrics import Facts
from launch.api.server import serve_http
from launch.api.service import Service
from launch.progress import Progress
from orchestrator.admission import QueueLimits
from orchestrator.coordinator import Coordinator
from orchestrator.request import FinishReason, Request, SamplingParams, Token
from orchestrator.router import AHEAD
from orchestrator.scheduler import Load, SchedulerConfig
from orchestrator.text import Text

STEPS = 100_000
LIMITS = SchedulerConfig(num_blocks=10**6, max_num_seqs=4096, max_model_len=4096)
FEW = replace(LIMITS, max_num_seqs=32)  # for a replica that can be overloaded
FEW_STEP_S = 0.05
QUEUE = QueueLimits(requests=64)
TOKENS = 16  # of an answer


class Numbers:
    """Stands in for a tokenizer: token i reads `i `; a prompt is a token a character."""

    special_ids: frozenset[int] = frozenset()
    template = ""

    def __init__(self) -> None:
        self.pieces = [b"%d " % i for i in range(STEPS)]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * len(text)

    def encode_chat(self, messages: Sequence[Any], tools: Any = None, options: Any = None) -> list[int]:
        return [1] * sum(len(message["content"]) for message in messages)


class Ticking:
    """A replica that gives every request a token a step, `most` of them at a time."""

    def __init__(self, step_s: float, most: int, times: mmap.mmap | None = None) -> None:
        self._step_s, self._most, self._times = step_s, most, times
        self._left: dict[str, int] = {}
        self._work = asyncio.Event()

    async def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._left[request.id] = request.sampling.max_tokens
        self._work.set()

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._left.pop(request_id, None)

    async def steps(self) -> AsyncIterator[list[Token]]:
        step, due_s = 0, time.monotonic()
        while True:
            await self._work.wait()
            due_s = max(due_s + self._step_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            tokens = []
            step = (step + 1) % STEPS
            for request_id, left in list(islice(self._left.items(), self._most)):
                reason = FinishReason.LENGTH if left == 1 else None
                tokens.append(Token(request_id, step, reason))
                if reason is None:
                    self._left[request_id] = left - 1
                else:
                    del self._left[request_id]
            if self._times is not None:
                struct.pack_into("d", self._times, 8 * step, time.monotonic())
            if not self._left:
                self._work.clear()
            yield tokens

    async def load(self) -> Load:
        return Load(0, len(self._left), 0, 0, 0)


def coordinator(step_s: float, limits: SchedulerConfig, times: mmap.mmap | None = None) -> Coordinator:
    replica = Ticking(step_s, limits.max_num_seqs, times)
    queue = QueueLimits() if limits is LIMITS else QUEUE
    return Coordinator([replica], limits, vocab=STEPS, text=cast(Text, Numbers()), queue=queue)


# --- the coordinator alone --------------------------------------------------------------------------------------


async def _coordinator_cost(requests: int, tokens: int) -> float:
    """CPU seconds of so many requests at once."""
    async with coordinator(0.0, LIMITS) as made:
        sampling = SamplingParams(max_tokens=tokens)
        begun_s = time.process_time()
        await asyncio.gather(*(made.complete([1] * 128, sampling) for _ in range(requests)))
        return time.process_time() - begun_s


def coordinator_cost() -> dict[str, float]:
    short, long, requests = 2, 202, 400
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
        loop.run(_coordinator_cost(requests, short))  # warm
        few = min(loop.run(_coordinator_cost(requests, short)) for _ in range(5))
        many = min(loop.run(_coordinator_cost(requests, long)) for _ in range(5))
    a_token = (many - few) / requests / (long - short)
    return {
        "coordinator: µs a token (replica's part included)": a_token * 1e6,
        "coordinator: µs a request (replica's part included)": (few / requests - short * a_token) * 1e6,
    }


# --- over HTTP -----------------------------------------------------------------------------------------------------


def _serve(
    listener: socket.socket, step_s: float, limits: SchedulerConfig, times_path: str, profile: str | None
) -> None:
    async def serve() -> None:
        with Path(times_path).open("r+b") as file:
            times = mmap.mmap(file.fileno(), 0)
        async with coordinator(step_s, limits, times) as made:
            service = Service(made, ["m"], {}, Facts("m", "tp1", 1, {}))
            await serve_http(service, listener, keys=[], progress=Progress(quiet=True), drain_s=1)

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            loop.run(serve())

    if profile is None:
        run()
    else:
        import cProfile

        profiler = cProfile.Profile()
        profiler.runcall(run)
        profiler.dump_stats(profile)


_STEP = re.compile(rb'"content":"(\d+) "')
_END = b"data: [DONE]"


class Stream(asyncio.Protocol):
    """One streamed chat after another on one connection."""

    def __init__(
        self, body: bytes, times: mmap.mmap, late_s: list[float], done: asyncio.Future[None]
    ) -> None:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self._request = head + b"content-length: %d\r\n\r\n" % len(body) + body
        self._times, self._late_s, self._done = times, late_s, done
        self._tail = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        data = self._tail + data
        end = 0
        for found in _STEP.finditer(data):
            (given_s,) = struct.unpack_from("d", self._times, 8 * int(found[1]))
            self._late_s.append(now_s - given_s)
            end = found.end()
        if _END in data:
            self._transport.close()
            if not self._done.done():
                self._done.set_result(None)
        self._tail = data[max(end, len(data) - 40) :]


async def _streams(port: int, times: mmap.mmap, streams: int, tokens: int) -> dict[str, float]:
    loop, late_s = asyncio.get_running_loop(), list[float]()
    body = json.dumps(
        {"messages": [{"role": "user", "content": "x" * 64}], "max_tokens": tokens, "stream": True}
    )
    ends = [loop.create_future() for _ in range(streams)]
    begun_s = time.monotonic()
    for i, end in enumerate(ends):
        await loop.create_connection(lambda e=end: Stream(body.encode(), times, late_s, e), "127.0.0.1", port)  # type: ignore[misc]
        if i % 20 == 0:
            await asyncio.sleep(0.01)
    await asyncio.gather(*ends)
    seconds = time.monotonic() - begun_s
    late_s.sort()
    return {
        "tokens/s": len(late_s) / seconds,
        "tokens seen of 1": len(late_s) / (streams * tokens),
        "added latency p50 ms": late_s[len(late_s) // 2] * 1e3,
        "added latency p99 ms": late_s[int(len(late_s) * 0.99)] * 1e3,
        "added latency max ms": late_s[-1] * 1e3,
    }


class Whole(asyncio.Protocol):
    """Requests one after another on one connection, each answered whole."""

    def __init__(self, body: bytes) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self._request = head + b"content-length: %d\r\n\r\n" % len(body) + body
        self._held = b""
        self.answered: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self) -> bytes:
        self.answered = asyncio.get_running_loop().create_future()
        self._transport.write(self._request)
        return await self.answered

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, end, body = self._held.partition(b"\r\n\r\n")
        if end and len(body) == int(re.search(rb"content-length: (\d+)", head)[1]):  # type: ignore[index]
            assert self.answered is not None
            self._held = b""
            self.answered.set_result(head[9:12])


async def _requests(
    port: int, rate: float | None, seconds: float, tokens: int, ideal_s: float, connections: int = 64
) -> dict[str, float]:
    """`rate` a second, whether the last were answered or not; None: as many as the connections take."""
    loop = asyncio.get_running_loop()
    body = json.dumps({"prompt": "x" * 64, "max_tokens": tokens}).encode()
    free: asyncio.LifoQueue[Whole] = asyncio.LifoQueue()
    for _ in range(connections if rate is None else 256):
        _, made = await loop.create_connection(lambda: Whole(body), "127.0.0.1", port)
        free.put_nowait(made)
    late_s: list[float] = []

    async def one() -> None:
        connection = await free.get()
        begun_s = time.monotonic()
        assert await connection.ask() == b"200"
        late_s.append(time.monotonic() - begun_s - ideal_s)
        free.put_nowait(connection)

    begun_s, asked = time.monotonic(), []
    if rate is None:

        async def closed() -> None:
            while time.monotonic() - begun_s < seconds:
                await one()

        asked = [asyncio.create_task(closed()) for _ in range(connections)]
    else:
        for i in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begun_s + i / rate - time.monotonic()))
            asked.append(asyncio.create_task(one()))
    await asyncio.gather(*asked)
    took_s = time.monotonic() - begun_s
    late_s.sort()
    return {
        "requests/s": len(late_s) / took_s,
        "added latency p50 ms": late_s[len(late_s) // 2] * 1e3,
        "added latency p99 ms": late_s[int(len(late_s) * 0.99)] * 1e3,
    }


async def overload(port: int, pid: int, seconds: float, step_s: float) -> dict[str, float]:
    """Ten times what the replica can do, beside a queue that is full and refuses nobody."""
    loop = asyncio.get_running_loop()
    body = json.dumps({"prompt": "x" * 64, "max_tokens": TOKENS}).encode()
    full = FEW.max_num_seqs + max(1, int(FEW.max_num_seqs * AHEAD)) + (QUEUE.requests or 0)
    free: asyncio.LifoQueue[Whole] = asyncio.LifoQueue()
    for _ in range(4 * full):
        _, made = await loop.create_connection(lambda: Whole(body), "127.0.0.1", port)
        free.put_nowait(made)
    late_s: dict[bytes, list[float]] = {b"200": [], b"429": []}

    async def one() -> None:
        connection = await free.get()
        begun_s = time.monotonic()
        status = await connection.ask()
        late_s[status].append(time.monotonic() - begun_s)
        free.put_nowait(connection)

    async def again_and_again(end_s: float) -> None:
        while time.monotonic() < end_s:
            await one()

    end_s = time.monotonic() + seconds / 2
    await asyncio.gather(*(again_and_again(end_s) for _ in range(full)))
    # All of them came at once at first, so that the later ones are what a full queue costs.
    full_s = sorted(late_s[b"200"][full:])
    refused_before = len(late_s[b"429"])
    late_s = {b"200": [], b"429": []}
    before_mb, rate = _resident_mb(pid), 10 * FEW.max_num_seqs / (TOKENS * step_s)
    begun_s, asked = time.monotonic(), set[asyncio.Task[None]]()
    for i in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun_s + i / rate - time.monotonic()))
        task = asyncio.create_task(one())
        asked.add(task)
        task.add_done_callback(asked.discard)
    took_s = time.monotonic() - begun_s
    await asyncio.gather(*asked)
    taken, refused = sorted(late_s[b"200"]), sorted(late_s[b"429"])
    decode_s = (TOKENS - 1) * step_s
    ttft_full, ttft = (found[int(len(found) * 0.99)] - decode_s for found in (full_s, taken))
    return {
        "refused while the queue was just full": refused_before,
        "asked/s": (len(taken) + len(refused)) / took_s,
        "taken/s": len(taken) / took_s,
        "429 p50 ms": refused[len(refused) // 2] * 1e3,
        "429 p99 ms": refused[int(len(refused) * 0.99)] * 1e3,
        "TTFT p99 of a full queue, ms": ttft_full * 1e3,
        "TTFT p99 of what was taken, ms": ttft * 1e3,
        "their ratio": ttft / ttft_full,
        "memory of the server before, MB": before_mb,
        "memory of the server after, MB": _resident_mb(pid),
    }


def _resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def over_http(
    what: str, step_s: float, profile: str | None, ask: Any, limits: SchedulerConfig = LIMITS
) -> dict[str, float]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8 * STEPS))
        file.flush()
        times = mmap.mmap(file.fileno(), 0)
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        server = multiprocessing.get_context("fork").Process(
            target=_serve, args=(listener, step_s, limits, file.name, profile)
        )
        server.start()
        port = listener.getsockname()[1]
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
                loop.run(_requests(port, None, 0.5, 2, 0.0, connections=8))  # warm
                before_s = Path(f"/proc/{server.pid}/stat").read_text().split()[13:15]
                found = loop.run(ask(port, times, server.pid))
                after_s = Path(f"/proc/{server.pid}/stat").read_text().split()[13:15]
        finally:
            server.terminate()
            server.join()
        for name, after, before in zip(("user", "system"), after_s, before_s, strict=True):
            found[f"server's CPU s, {name}"] = (int(after) - int(before)) / 100  # of a hundred a second
    return {f"{what}: {name}": value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("coordinator", "streams", "rate", "most", "overload"))
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rate", type=float, default=11_000, help="tokens a second, of all streams together")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the overload")
    parser.add_argument("--profile", help="a file for cProfile's figures of the server")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    step_s = args.streams / args.rate
    found: dict[str, float] = {}
    if args.only in (None, "coordinator"):
        found |= coordinator_cost()
    if args.only in (None, "streams"):
        name = f"{args.streams} streams"
        found |= over_http(
            name, step_s, args.profile, lambda p, t, _: _streams(p, t, args.streams, args.tokens)
        )
    if args.only in (None, "rate"):
        found |= over_http(
            "400 req/s", 0.005, args.profile, lambda p, *_: _requests(p, 400, 5, 16, 16 * 0.005)
        )
    if args.only in (None, "most"):
        found |= over_http(
            "64 at once", 0.001, args.profile, lambda p, *_: _requests(p, None, 5, 16, 16 * 0.001)
        )
    if args.only in (None, "overload"):
        ask = lambda p, _, pid: overload(p, pid, args.seconds, FEW_STEP_S)  # noqa: E731
        found |= over_http("10 × capacity", FEW_STEP_S, args.profile, ask, FEW)
    for name, value in found.items():
        print(f"{name:60} {value:10.2f}")


if __name__ == "__main__":
    main()
