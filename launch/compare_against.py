"""An OpenAI endpoint under the loads of a comparison: the same prompts, as many at once, timed from outside by HTTP."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from cluster.errors import UserError
from launch.bench_figures import tpot_s
from launch.bench_load import Answer, Endpoint, Prompt, closed_loop, connected, first_error
from launch.progress import Progress
from launch.trial import WARM_UP_TOKENS, Measured, OnTrial, Trial, enough, middle, prompts_of
from strategies.spec import Workload


def check(urls: Sequence[str]) -> None:
    """Before anything of ours is started. Raises UserError where one does not answer."""

    async def connect(url: str) -> None:
        async with connected(url):
            pass

    for url in urls:
        asyncio.run(connect(url))


def measure(url: str, loads: Sequence[Workload], vocab: int, progress: Progress, on_trial: OnTrial) -> None:
    async def all_loads() -> None:
        async with connected(url) as endpoint:
            await run(endpoint, url, loads, vocab, progress, on_trial)

    asyncio.run(all_loads())


async def run(
    endpoint: Endpoint,
    name: str,
    loads: Sequence[Workload],
    vocab: int,
    progress: Progress,
    on_trial: OnTrial,
) -> None:
    most = max(loads, key=lambda load: load.concurrency)
    warm, _ = await _ask(endpoint, most, "warm-up", vocab, WARM_UP_TOKENS)
    if error := first_error(warm):
        raise UserError(f"--against {name}: {error}; it must take token ids on /v1/completions")
    for load in loads:
        progress.say(f"{name}: measuring {load.concurrency} at once")
        begun_s = time.perf_counter()
        rounds: list[Measured] = []
        failure: str | None = None
        while not rounds or not enough(rounds, time.perf_counter() - begun_s):
            seed = f"{load.concurrency} {len(rounds)}"
            answers, seconds = await _ask(endpoint, load, seed, vocab, load.output_tokens)
            failure = first_error(answers)
            if failure is not None:
                break
            rounds.append(_means(answers, seconds))
        measured = None if failure is not None else middle(rounds)
        took_s = time.perf_counter() - begun_s
        on_trial(load, Trial(measured, failure=failure, rounds=len(rounds), seconds=took_s))


async def _ask(
    endpoint: Endpoint, load: Workload, seed: str, vocab: int, tokens: int
) -> tuple[list[Answer], float]:
    prompts = [Prompt(ids) for ids in prompts_of(seed, vocab, load)]
    start_s = time.perf_counter()
    answers = await closed_loop(endpoint, prompts, tokens, load.concurrency, lambda _: None)
    return answers, time.perf_counter() - start_s


def _means(answers: Sequence[Answer], seconds: float) -> Measured:
    return Measured(
        ttft_s=statistics.fmean(a.first_s for a in answers),
        tpot_s=statistics.fmean(tpot_s(a) for a in answers),
        output_tokens_per_s=sum(a.output_tokens for a in answers) / seconds,
    )
