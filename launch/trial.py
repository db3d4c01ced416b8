"""One layout, started once and run at each load: how fast it was, and whether its outputs are what they should be."""

from __future__ import annotations

import asyncio
import hashlib
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.discover import device_vitals
from cluster.errors import BadLayout, BadModel, GangDied, PlacementFailed, WorkerFailed
from cluster.topology import Topology
from launch.compare_vitals import Health, joules_per_token, watched
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

ENOUGH_S = 2.0
MOST_ROUNDS = 5
"""A load is run again, with other prompts, until so many seconds were measured or it was run so often: one short run
says little. The middle one counts."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds and tokens, as the cost model's Estimate has them: means over the requests."""

    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Trial:
    """A layout under one load."""

    measured: Measured | None  # None: it could not be run, see `failure`
    tokens_digest: str = ""  # of each request's greedy output
    forced_error: float | None = (
        None  # of the logits on forced tokens, relative L2 to float64; None in float32
    )
    allowed_error: float | None = None
    health: tuple[Health, ...] = ()
    joules_per_token: float | None = None
    failure: str | None = None
    rounds: int = 0
    seconds: float = 0.0  # that measuring took

    @property
    def throttled_by(self) -> tuple[str, ...]:
        """Of all its GPUs; empty where none was held back for long."""
        return tuple(sorted({r for h in self.health if h.is_throttled for r in h.throttled_by}))


@dataclass(frozen=True, slots=True)
class Truth:
    """Logits on forced tokens: in float64, and how far one process in the dtype at hand is from them."""

    logits: NDArray[np.float32]
    own_error: float


OnTrial = Callable[[Workload, Trial], None]


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
        asked = replace(
            options, dtype=dtype, max_num_seqs=1, max_model_len=None, num_blocks=None, host_kv_gb=None
        )
        asked = replace(asked, max_num_batched_tokens=FORCED_TOKENS)
        with deployment(found, one, asked, Progress(quiet=True), score=score) as started:
            scored.append(np.frombuffer(started.scored, np.float32))
    return Truth(scored[0], _distance(scored[1], scored[0]))


def run_trials(
    found: Devices,
    candidate: Candidate,
    options: EngineOptions,
    loads: Sequence[Workload],
    topology: Topology,
    truth: Truth | None,
    progress: Progress,
    on_trial: OnTrial,
) -> None:
    """Start the layout, warm it up, put each load on it. `on_trial` is told of each as soon as it is done."""
    dims = candidate.dims
    options = replace(options, format=candidate.format.name, offload=candidate.offload)
    if not candidate.offload:
        options = replace(options, resident_layers=None, offload_dir=None)
    if candidate.zero3:
        options = replace(options, zero3=True, compatible=True, prefix_caching=False, host_kv_gb=None)
    own_weights = candidate.zero3 and options.dummy_weights  # transformers fills them in its own way
    if candidate.format.name or own_weights:
        truth = None  # which is of other weights
    score = forced_tokens(options.spec.vocab) if truth is not None else ()
    placed = deployment(found, dims, options, progress, shards=candidate.shards, score=score)
    left = list(loads)
    try:
        with placed as started:
            scored = np.frombuffer(started.scored, np.float32)
            checked = Trial(
                None,
                forced_error=_distance(scored, truth.logits) if truth is not None else None,
                allowed_error=HALF_PRECISION_SLACK * truth.own_error if truth is not None else None,
            )

            def tell(load: Workload, trial: Trial) -> None:
                left.remove(load)
                on_trial(load, trial)

            asyncio.run(
                _measure_all(
                    started, candidate.layout.name, options, loads, topology, checked, progress, tell
                )
            )
    except (BadLayout, BadModel, PlacementFailed, GangDied, WorkerFailed) as error:
        for load in left:
            on_trial(load, Trial(None, failure=str(error)))


async def _measure_all(
    started: Deployment,
    name: str,
    options: EngineOptions,
    loads: Sequence[Workload],
    topology: Topology,
    checked: Trial,
    progress: Progress,
    on_trial: OnTrial,
) -> None:
    dims = started.dims
    devices = topology.devices[: dims.world_size]
    async with started.coordinator(options, None) as coordinator:

        async def ask(load: Workload, seed: str, tokens: int) -> list[Completion]:
            return await _ask(coordinator, prompts_of(seed, options.spec.vocab, load), tokens)

        # Kernels are chosen and compiled at the first step of a size. A CPU has none to compile.
        most = max(loads, key=lambda load: load.concurrency)
        first = most if options.device == "cuda" else replace(most, concurrency=2 * dims.dp)
        await ask(first, "warm-up", WARM_UP_TOKENS)
        for load in loads:
            progress.say(f"{name}: measuring {load.concurrency} at once")
            begun_s = time.perf_counter()
            rounds: list[Measured] = []
            digest, tokens = "", 0
            with watched(lambda: device_vitals(devices)) as watch:
                while not rounds or not enough(rounds, time.perf_counter() - begun_s):
                    start_s = time.perf_counter()
                    done = await ask(load, f"{load.concurrency} {len(rounds)}", load.output_tokens)
                    rounds.append(means(done, time.perf_counter() - start_s))
                    digest = digest or digest_of(done)
                    tokens += sum(len(c.token_ids) for c in done)
            health = watch.health()
            trial = replace(
                checked,
                measured=middle(rounds),
                tokens_digest="" if options.zero3 and options.dummy_weights else digest,
                health=health,
                joules_per_token=joules_per_token(health, tokens),
                rounds=len(rounds),
                seconds=time.perf_counter() - begun_s,
            )
            on_trial(load, trial)


def enough(rounds: Sequence[Measured], seconds: float) -> bool:
    return seconds >= ENOUGH_S or len(rounds) >= MOST_ROUNDS


def prompts_of(seed: str, vocab: int, load: Workload) -> list[list[int]]:
    """Equal for every layout; others for every seed, so that no prefix is known from before."""
    rnd = random.Random(f"shardwise {seed}")
    return [[rnd.randrange(vocab) for _ in range(load.prompt_tokens)] for _ in range(load.concurrency)]


async def _ask(coordinator: Coordinator, prompts: Sequence[Sequence[int]], tokens: int) -> list[Completion]:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    answers = await asyncio.gather(*(coordinator.complete(prompt, sampling) for prompt in prompts))
    return [answer[0] for answer in answers]


def means(done: Sequence[Completion], seconds: float) -> Measured:
    """TTFT, TPOT and throughput as vLLM's benchmark defines them."""
    gaps = [(c.latency_s - c.ttft_s) / (len(c.token_ids) - 1) for c in done if len(c.token_ids) > 1]
    return Measured(
        ttft_s=statistics.fmean(c.ttft_s for c in done),
        tpot_s=statistics.fmean(gaps) if gaps else 0.0,
        output_tokens_per_s=sum(len(c.token_ids) for c in done) / seconds,
    )


def middle(rounds: Sequence[Measured]) -> Measured:
    """The median of each figure: a round that something else disturbed does not count."""
    return Measured(
        ttft_s=statistics.median(r.ttft_s for r in rounds),
        tpot_s=statistics.median(r.tpot_s for r in rounds),
        output_tokens_per_s=statistics.median(r.output_tokens_per_s for r in rounds),
    )


def digest_of(done: Sequence[Completion]) -> str:
    return hashlib.sha256(repr([c.token_ids for c in done]).encode()).hexdigest()[:16]


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))
