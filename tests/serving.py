"""A deployment on plain processes of this host, driven through the coordinator: all of the product but Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from cluster.errors import GangDied, ShardwiseError
from cluster.gang import Call, Gang, Member, results
from launch.models import resolve
from launch.options import EngineOptions
from launch.progress import Progress
from launch.start import Deployment, Devices, deployment
from orchestrator.replica import Replica
from orchestrator.request import Completion, SamplingParams, Token
from strategies.plan import ParallelDims
from strategies.source import spec_of
from tests.fakes import ProcessGang
from tests.oracle import next_logits
from tests.workers import ReusedWorker

PATIENCE_S = 60.0
ENDLESS_TOKENS = 8000  # some 10 s: whoever strikes in the middle need not hurry


class Slice:
    """Some members of a bigger gang, as a gang. Killing it makes them ready for the next."""

    def __init__(self, pool: Pool, taken: Sequence[int]) -> None:
        self._pool, self._taken = pool, taken
        self._loops: list[Call] = []

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(replace(self._pool.gang.members[t], index=i) for i, t in enumerate(self._taken))

    def call(self, index: int, method: str, *args: object) -> Call:
        call = self._pool.gang.call(self._taken[index], method, *args)
        if method in ("lead", "follow"):
            self._loops.append(call)
        return call

    def call_all(self, method: str, per_member_args: Sequence[Sequence[object]] | None = None) -> list[Call]:
        given = per_member_args or [()] * len(self._taken)
        return [self.call(i, method, *args) for i, args in enumerate(given)]

    async def died(self) -> GangDied:
        return await self._pool.gang.died()

    def watch(self, on_death: Callable[[GangDied], None]) -> None:
        self._pool.gang.watch(on_death)

    def kill(self) -> None:
        if self._taken:
            self.call(0, "stop").result(30)
            results(self._loops, 30)
            results(self.call_all("start_afresh"), 30)
            self._pool.free += self._taken
            self._taken = []


class Pool:
    """Satisfies launch.start.Devices with processes that are started once."""

    def __init__(self, size: int) -> None:
        self.gang = ProcessGang(ReusedWorker, size)
        self.free = list(range(size))
        self.given: list[Slice] = []  # of the newest deployment

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float
    ) -> Sequence[Gang]:
        self.given = []
        for size in sizes:
            taken, self.free = self.free[:size], self.free[size:]
            self.given.append(Slice(self, taken))
        return self.given

    def seen_logits(self) -> dict[tuple[int, ...], bytes]:
        """Of the newest deployment: token ids so far → logits of the next, float32."""
        seen: dict[tuple[int, ...], bytes] = {}
        for part in self.given:
            for found in results(part.call_all("seen_logits"), 30):
                seen |= found
        return seen


class Processes:
    """Satisfies launch.start.Devices without Ray."""

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float
    ) -> Sequence[Gang]:
        firsts = accumulate(sizes[:-1], initial=0)

        def start(first: int, size: int) -> ProcessGang:
            gpus = range(first, first + size) if device == "cuda" else None
            return ProcessGang(worker_class, size, gpus=gpus)

        with ThreadPoolExecutor(len(sizes)) as starters:  # most of a start is importing torch
            return list(starters.map(start, firsts, sizes))


class Hosting:
    """Devices that host another class than they are asked to, and remember their gangs."""

    def __init__(self, devices: Devices, worker_class: type) -> None:
        self._devices, self._worker_class = devices, worker_class
        self.gangs: list[Gang] = []

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float
    ) -> Sequence[Gang]:
        gangs = self._devices.acquire(self._worker_class, sizes, device, timeout_s=timeout_s)
        self.gangs += gangs
        return gangs


class Tapped:
    """A replica that tells when its first tokens have come."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.submit, self.abort, self.load = replica.submit, replica.abort, replica.load
        self.flowing = asyncio.Event()

    async def steps(self) -> AsyncIterator[list[Token]]:
        async for tokens in self._replica.steps():
            self.flowing.set()
            yield tokens


def options(model: Path | str, **changes: Any) -> EngineOptions:
    """Small enough that chunked prefill and preemption happen with a handful of short prompts."""
    source = resolve(str(model))
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "dummy_weights": False,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 24,
        "block_size": 8,
        "num_blocks": None,
        "prefix_caching": True,
        "seed": 0,
        "address": None,
        "peer_access": True,
    }
    return EngineOptions(source=source, spec=spec_of(source), **(defaults | changes))


@contextmanager
def served(
    layout: str, asked: EngineOptions, where: Devices | None = None, *, score: Sequence[int] = ()
) -> Iterator[Deployment]:
    dims, quiet = ParallelDims.parse(layout), Progress(quiet=True)
    with deployment(where or Processes(), dims, asked, quiet, score=score) as found:
        yield found


def answers(
    found: Deployment,
    asked: EngineOptions,
    *rounds: Sequence[tuple[Sequence[int], SamplingParams]],
) -> list[Completion]:
    """The first answer of each prompt. Prompts of a round go at once, rounds one after another."""

    async def ask() -> list[list[Completion]]:
        done: list[list[Completion]] = []
        async with found.coordinator(asked, None) as coordinator:
            for prompts in rounds:
                done += await asyncio.gather(
                    *(coordinator.complete(ids, sampling) for ids, sampling in prompts)
                )
        return done

    return [done[0] for done in asyncio.run(ask())]


def struck(
    found: Deployment, asked: EngineOptions, prompt: Sequence[int], strike: Callable[[], None]
) -> tuple[ShardwiseError, float]:
    """How a request without end fails after `strike`, which comes once its first tokens have, and after how long."""

    async def ask() -> tuple[ShardwiseError, float]:
        replica = Tapped(found.replicas[0])
        sampling = SamplingParams(max_tokens=ENDLESS_TOKENS, ignore_eos=True)
        async with replace(found, replicas=(replica,)).coordinator(asked, None) as coordinator:
            asking = asyncio.ensure_future(coordinator.complete(prompt, sampling))
            await asyncio.wait_for(replica.flowing.wait(), PATIENCE_S)
            assert not asking.done()
            strike()
            start_s = time.monotonic()
            try:
                await asyncio.wait_for(asking, PATIENCE_S)
            except ShardwiseError as error:
                return error, time.monotonic() - start_s
            raise AssertionError("the request was answered all the same")

    return asyncio.run(ask())


def assert_logits_agree(
    model: Any, prompt: Sequence[int], output: Sequence[int], seen: dict[tuple[int, ...], bytes]
) -> None:
    """float32 logits that the ranks saw, against transformers' on the same tokens: relative L2 under 1e-4."""
    tokens = [*prompt, *output]
    found = b"".join(seen[tuple(tokens[:end])] for end in range(len(prompt), len(tokens)))
    ours = torch.frombuffer(bytearray(found), dtype=torch.float32).view(len(output), -1)
    expected = next_logits(model, prompt, output)
    assert (ours - expected).norm() / expected.norm() < 1e-4
