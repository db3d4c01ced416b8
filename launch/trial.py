"""One layout, run for real: how fast it was, and whether its outputs are what they should be."""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.discover import device_vitals
from cluster.errors import BadLayout, PlacementFailed
from cluster.nvml import Vitals
from cluster.topology import Topology
from launch.options import EngineOptions
from launch.progress import Progress
from launch.start import Deployment, Devices, deployment
from orchestrator.coordinator import Coordinator
from orchestrator.request import Completion, SamplingParams
from strategies.plan import Candidate, ParallelDims
from strategies.spec import Workload

FORCED_TOKENS = 16  # whose logits are compared in half precision
WARM_UP_TOKENS = 4
HALF_PRECISION_SLACK = 1.5
"""A layout's error against float64 may be so many times that of one process in the same dtype: sums in another
order round otherwise."""
VITALS_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds and tokens, as the cost model's Estimate has them: means over the requests."""

    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Trial:
    measured: Measured | None  # None: it could not be run, see `failure`
    token_ids: tuple[tuple[int, ...], ...] = ()  # each request's greedy output
    forced_error: float | None = (
        None  # of the logits on forced tokens, relative L2 to float64; None in float32
    )
    allowed_error: float | None = None
    vitals: tuple[Vitals, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Truth:
    """Logits on forced tokens: in float64, and how far one process in the dtype at hand is from them."""

    logits: NDArray[np.float32]
    own_error: float


def forced_tokens(vocab: int) -> list[int]:
    rnd = random.Random(1)
    return [rnd.randrange(vocab) for _ in range(FORCED_TOKENS)]


def measure_truth(
    found: Devices,
    options: EngineOptions,
    feasible: Sequence[ParallelDims],
    topology: Topology,
    progress: Progress,
) -> Truth | None:
    """None in float32, where tokens are compared; also where one device cannot hold the model in float64."""
    one = ParallelDims()
    needed = 8 * options.spec.total_params
    if options.dtype == "float32" or one not in feasible or needed > 0.8 * topology.devices[0].free_bytes:
        return None
    progress.say("float64 reference of one process")
    score = forced_tokens(options.spec.vocab)
    scored = []
    for dtype in ("float64", options.dtype):
        asked = replace(options, dtype=dtype, max_num_seqs=1, max_model_len=None, num_blocks=None)
        asked = replace(asked, max_num_batched_tokens=FORCED_TOKENS)
        with deployment(found, one, asked, Progress(quiet=True), score=score) as started:
            scored.append(np.frombuffer(started.scored, np.float32))
    return Truth(scored[0], _distance(scored[1], scored[0]))


def run_trial(
    found: Devices,
    candidate: Candidate,
    options: EngineOptions,
    workload: Workload,
    topology: Topology,
    truth: Truth | None,
    progress: Progress,
) -> Trial:
    """Start the layout, warm it up, answer the workload's requests at once."""
    dims = candidate.dims
    if candidate.format.name:
        truth = None  # which is of other weights
    score = forced_tokens(options.spec.vocab) if truth is not None else ()
    placed = deployment(found, dims, options, progress, shards=candidate.shards, score=score)
    try:
        with placed as started, _watched(topology, dims) as vitals:
            progress.say(f"{candidate.layout.name}: measuring")
            done, seconds = asyncio.run(_answer(started, options, workload))
            scored = np.frombuffer(started.scored, np.float32)
    except (BadLayout, PlacementFailed) as error:
        return Trial(None, failure=str(error))
    return Trial(
        measured=_means(done, seconds),
        token_ids=tuple(tuple(c.token_ids) for c in done),
        forced_error=_distance(scored, truth.logits) if truth is not None else None,
        allowed_error=HALF_PRECISION_SLACK * truth.own_error if truth is not None else None,
        vitals=tuple(vitals),
    )


async def _answer(
    started: Deployment, options: EngineOptions, workload: Workload
) -> tuple[list[Completion], float]:
    rnd = random.Random(0)
    async with started.coordinator(options, None) as coordinator:
        warm_up = [_prompt(rnd, options, workload) for _ in range(2 * started.dims.dp)]
        await _ask(coordinator, warm_up, WARM_UP_TOKENS)
        # Drawn anew, so that every layout gets the same prompts and none is known from the warm-up.
        rnd = random.Random(2)
        prompts = [_prompt(rnd, options, workload) for _ in range(workload.concurrency)]
        start = time.perf_counter()
        done = await _ask(coordinator, prompts, workload.output_tokens)
        return done, time.perf_counter() - start


def _prompt(rnd: random.Random, options: EngineOptions, workload: Workload) -> list[int]:
    return [rnd.randrange(options.spec.vocab) for _ in range(workload.prompt_tokens)]


async def _ask(coordinator: Coordinator, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    answers = await asyncio.gather(*(coordinator.complete(prompt, sampling) for prompt in prompts))
    return [answer[0] for answer in answers]


def _means(done: Sequence[Completion], seconds: float) -> Measured:
    """TTFT, TPOT and throughput as vLLM's benchmark defines them."""
    gaps = [(c.latency_s - c.ttft_s) / (len(c.token_ids) - 1) for c in done if len(c.token_ids) > 1]
    return Measured(
        ttft_s=statistics.fmean(c.ttft_s for c in done),
        tpot_s=statistics.fmean(gaps) if gaps else 0.0,
        output_tokens_per_s=sum(len(c.token_ids) for c in done) / seconds,
    )


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


@contextmanager
def _watched(topology: Topology, dims: ParallelDims) -> Iterator[list[Vitals]]:
    """Each device's state at its busiest moment that was seen (the most watts); empty on a CPU."""
    devices = topology.devices[: dims.world_size]
    busiest: list[Vitals] = []
    ended = threading.Event()

    def look() -> None:
        while True:
            now = device_vitals(devices)
            if sum(v.watts or 0 for v in now) >= sum(v.watts or 0 for v in busiest):
                busiest[:] = now
            if not now or ended.wait(VITALS_EVERY_S):
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield busiest
    finally:
        ended.set()
        watcher.join()
