"""Simulated waits beside real ones: the same arrivals at a real deployment on this CPU."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import pytest

from orchestrator.request import Completion, SamplingParams
from orchestrator.simulate import Arrival, percentile, poisson, simulate
from strategies.cost_ops import Pass
from tests.serving import options, served
from tests.tiny import make_model

PROMPT, OUTPUT, REQUESTS = 16, 24, 40
WITHIN = 3.0
"""Times that a median may be off: machines that tests run on are shared, and steps of a tiny model mostly noise."""


@pytest.mark.slow
def test_waits_at_a_rate_are_of_the_size_simulated(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", max_position_embeddings=256)
    asked = options(tmp_path, max_num_batched_tokens=64, prefix_caching=False)
    sampling = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    prompt = [7] * PROMPT

    async def measure(found) -> tuple[list[Completion], list[Completion], list[Arrival]]:
        async with found.coordinator(asked, None) as coordinator:

            async def ask(wait_s: float) -> Completion:
                await asyncio.sleep(wait_s)
                (answer,) = await coordinator.complete(prompt, sampling)
                return answer

            await ask(0.0)
            alone = [await ask(0.0) for _ in range(5)]
            life_s = statistics.median(c.latency_s for c in alone)
            # Twice what one at a time could take: waits come from sharing steps and slots.
            arrivals = poisson(REQUESTS, 2 / life_s, PROMPT, OUTPUT, seed=2)
            start_s = time.perf_counter()
            answers = await asyncio.gather(
                *(ask(arrival.at_s - (time.perf_counter() - start_s)) for arrival in arrivals)
            )
            return alone, answers, arrivals

    with served("tp1", asked) as found:
        alone, answers, arrivals = asyncio.run(measure(found))
        config = found.limits
    first_s = statistics.median(c.ttft_s for c in alone)
    token_s = statistics.median((c.latency_s - c.ttft_s) / (OUTPUT - 1) for c in alone)

    def step_s(work: Pass) -> tuple[float]:
        return (token_s + max(0.0, first_s - token_s) * min(1.0, work.prompt_tokens / PROMPT),)

    simulated = simulate(config, arrivals, step_s)
    for name, seen, real in (
        ("TTFT", simulated.ttft_s(50), percentile([c.ttft_s for c in answers], 50)),
        (
            "latency",
            percentile([a.latency_s for a in simulated.answered], 50),
            percentile([c.latency_s for c in answers], 50),
        ),
    ):
        assert real / WITHIN < seen < real * WITHIN, f"{name}: {seen:.4f} s simulated, {real:.4f} s measured"
