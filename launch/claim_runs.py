"""What requests to our engine say of the guides' claims: one at a time, and many in batches made by some rule."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from launch.claim_measured import CONTINUOUS, RULE, Alone, adaptive
from launch.options import EngineOptions
from launch.progress import Progress
from launch.start import Deployment, Devices, deployment
from launch.trial import Measured, enough, means, middle, prompts_of
from orchestrator.coordinator import Coordinator
from orchestrator.request import SamplingParams
from strategies.plan import ParallelDims
from strategies.spec import ModelSpec, Workload

TURNS = 2  # of which the faster counts: what else runs only ever adds
FIXED = (4, 16)  # batches that the rule is put beside


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that wait all at once, of outputs of unlike lengths."""

    requests: int
    prompt_tokens: int
    output_tokens: tuple[int, int]  # from, to

    @property
    def longest(self) -> int:
        return self.prompt_tokens + self.output_tokens[1]

    def __str__(self) -> str:
        least, most = self.output_tokens
        return f"{self.requests} waiting requests of {self.prompt_tokens} + {least} to {most} tokens"


@dataclass(frozen=True, slots=True)
class Runs:
    """A shape and its loads, of a kind of device."""

    alone: Workload
    crowd: Load


RUNS = {
    "cpu": Runs(Workload(64, 16), Load(40, 16, (2, 12))),
    "cuda": Runs(Workload(128, 64), Load(72, 64, (8, 64))),
}
# 72 and 40: the rule then makes batches of each of its three kinds.

_LAYERS = 16
_FREE_SHARE = 0.6


def shape(spec: ModelSpec, kind: str, free_bytes: int) -> tuple[ModelSpec, str]:
    """Of an 8B model as many layers as a quick run wants, and as fit; on a CPU a small one. And its name."""
    if kind == "cpu":
        small = replace(
            spec, layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, intermediate=1536, vocab=32_000
        )
        return small, "a Llama of 8 layers and 512 hidden columns"
    tables = 2 * 2 * spec.vocab * spec.hidden
    fit = int((_FREE_SHARE * free_bytes - tables) / (2 * spec.layer_params))
    layers = max(1, min(_LAYERS, fit))
    return replace(spec, layers=layers), f"{layers} layers of {spec.name}'s shape"


def run(
    found: Devices, options: EngineOptions, runs: Runs, progress: Progress, *, crowd: bool
) -> tuple[Alone, Mapping[str, float]]:
    """One request at a time; and, if asked, tokens a second of the crowd, by how its batches are made."""
    with deployment(found, ParallelDims(), options, progress) as started:
        return asyncio.run(_both(started, options, runs, progress, crowd=crowd))


async def _both(
    started: Deployment, options: EngineOptions, runs: Runs, progress: Progress, *, crowd: bool
) -> tuple[Alone, Mapping[str, float]]:
    vocab = options.spec.vocab
    rates: dict[str, float] = {}
    async with started.coordinator(options, None) as coordinator:
        progress.say("one request at a time")
        alone = await _alone(coordinator, vocab, runs.alone)
        if crowd:
            few = replace(runs.crowd, output_tokens=(2, 2))
            await drained(coordinator, vocab, few, "warm-up", lambda queued: queued)
        for turn in range(TURNS if crowd else 0):
            for how, rule in rules().items():
                progress.say(f"{runs.crowd}: {how}, {turn + 1} of {TURNS}")
                rate = await drained(coordinator, vocab, runs.crowd, f"{how} {turn}", rule)
                rates[how] = max(rate, rates.get(how, 0.0))
    return alone, rates


def rules() -> dict[str, Callable[[int], int]]:
    """How many of those that wait are asked together, and all waited for, before the next are."""
    made: dict[str, Callable[[int], int]] = {RULE: adaptive}
    for size in FIXED:
        made[f"batches of {size}"] = lambda queued, size=size: min(size, queued)  # type: ignore[misc]
    made[CONTINUOUS] = lambda queued: queued
    return made


async def _alone(coordinator: Coordinator, vocab: int, load: Workload) -> Alone:
    async def ask(number: int) -> Measured:
        (prompt,) = prompts_of(f"alone {number}", vocab, load)
        done = await coordinator.complete(prompt, sampling)
        return means(done, done[0].latency_s)

    sampling = SamplingParams(max_tokens=load.output_tokens, ignore_eos=True)
    await ask(0)  # kernels are chosen and compiled at the first step of a size
    rounds: list[Measured] = []
    begun_s = time.perf_counter()
    while not rounds or not enough(rounds, time.perf_counter() - begun_s):
        rounds.append(await ask(1 + len(rounds)))
    found = middle(rounds)
    return Alone(found.ttft_s, found.tpot_s)


async def drained(
    coordinator: Coordinator, vocab: int, load: Load, seed: str, rule: Callable[[int], int]
) -> float:
    """Tokens a second until nobody waits."""
    prompts = prompts_of(seed, vocab, Workload(load.prompt_tokens, load.output_tokens[1], load.requests))
    waiting = list(zip(prompts, lengths(load), strict=True))
    tokens, begun_s = 0, time.perf_counter()
    while waiting:
        count = rule(len(waiting))
        batch, waiting = waiting[:count], waiting[count:]
        tokens += sum(await asyncio.gather(*(_one(coordinator, prompt, most) for prompt, most in batch)))
    return tokens / (time.perf_counter() - begun_s)


async def _one(coordinator: Coordinator, prompt: Sequence[int], tokens: int) -> int:
    done = await coordinator.complete(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))
    return len(done[0].token_ids)


def lengths(load: Load) -> list[int]:
    """The same for every rule."""
    rnd = random.Random("lengths")
    return [rnd.randint(*load.output_tokens) for _ in range(load.requests)]
