"""The runs of a comparison: what is left to measure, how long that will take, each layout started once."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.profile import fingerprint_of
from cluster.topology import Topology
from launch.compare_journal import Journal
from launch.compare_layouts import beyond_memory
from launch.options import EngineOptions
from launch.predict import predict
from launch.progress import Progress
from launch.start import cluster
from launch.trial import OnTrial, Trial, measure_truth, run_trials
from strategies.place import count
from strategies.plan import Candidate, Estimate, Layout, Plan
from strategies.quantize import native
from strategies.spec import Workload

START_S = {"cpu": 8.0, "cuda": 20.0}
"""Of a layout, before one was seen here: a 135M model on two cores, an 8B model on an H100."""


def predict_all(
    options: EngineOptions,
    topology: Topology,
    loads: Sequence[Workload],
    layouts: Sequence[Layout] | None,
) -> dict[int, Plan]:
    """A plan for each load, of stages cut as they will be run: for the heaviest."""
    cut_for = max(loads, key=lambda load: load.concurrency)
    return {load.concurrency: predict(options, topology, load, layouts, cut_for=cut_for) for load in loads}


def plans_of(
    options: EngineOptions,
    topology: Topology,
    loads: Sequence[Workload],
    layouts: Sequence[Layout] | None,
) -> dict[int, Plan]:
    """Of the layouts named; else of all in the model's own precision, and of what fits where none of them does."""
    made = predict_all(options, topology, loads, layouts)
    heaviest = max(loads, key=lambda load: load.concurrency)
    runs = [c for c in made[heaviest.concurrency].candidates if c.feasible and c.not_runnable is None]
    if layouts is not None or runs:
        return made
    wide = predict(options, topology, heaviest, None, cut_for=heaviest, wide=True)
    found = beyond_memory(wide, native(options.spec).name, len(topology.devices))
    return predict_all(options, topology, loads, found)


def facts_of(options: EngineOptions, topology: Topology, workload: Workload) -> dict[str, str]:
    """What a measurement is of; a run is gone on with only where all of it is the same."""
    flags = {
        "dtype": options.dtype,
        "weights": "dummy" if options.dummy_weights else _weights(options.source.path),
        "--max-model-len": options.max_model_len,
        "--max-num-seqs": options.max_num_seqs,
        "--max-num-batched-tokens": options.max_num_batched_tokens,
        "--block-size": options.block_size,
        "--num-gpu-blocks-override": options.num_blocks,
        "--gpu-memory-utilization": options.gpu_memory_utilization,
        "--device-memory-gb": options.device_memory_gb,
        "--host-memory-gb": options.host_memory_gb,
        "--resident-layers": options.resident_layers,
        "--offload-dir": options.offload_dir,
        "--offload-io": options.offload_io,
        "--host-kv-gb": options.host_kv_gb,
        "CUDA graphs": not options.enforce_eager,
        "prefix caching": options.prefix_caching,
        "--seed": options.seed,
        "--address": options.address,
    }
    return {
        "model": options.spec.name,
        "model's shape": _digest(options.spec),
        "machine": f"{topology.name}, {fingerprint_of(topology)}",
        "prompt tokens": str(workload.prompt_tokens),
        "output tokens": str(workload.output_tokens),
        **{name: str(value) for name, value in flags.items()},
    }


def _digest(facts: object) -> str:
    return f"{zlib.crc32(repr(facts).encode()):08x}"


def _weights(path: Path | None) -> str:
    """By names, sizes and times of the files: reading gigabytes to tell would take longer than the run."""
    if path is None:
        return "none"
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{path} ({_digest(seen)})"


# --- how long it takes --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    """What is left, in seconds: starts as long as those seen here, runs as predicted times how wrong that was."""

    device: str
    starts_s: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # of a run, measured over predicted

    def saw_start(self, seconds: float) -> None:
        self.starts_s.append(seconds)

    def saw_run(self, predicted: Estimate, load: Workload, seconds: float) -> None:
        self.ratios.append(seconds / run_s(predicted, load))

    def left_s(self, starts: int, runs: Sequence[tuple[Estimate, Workload]]) -> float:
        start_s = statistics.fmean(self.starts_s) if self.starts_s else START_S[self.device]
        ratio = statistics.fmean(self.ratios) if self.ratios else 1.0
        return starts * start_s + ratio * sum(run_s(made, load) for made, load in runs)


def run_s(made: Estimate, load: Workload) -> float:
    """Of one round of a load; short ones are repeated, which the ratio learns."""
    return made.ttft_s + load.output_tokens * made.tpot_s


def told(seconds: float) -> str:
    """`45 s`, `3 min 20 s`."""
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


# --- the runs -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sweep:
    """Every layout under every load, what is in the journal left out."""

    options: EngineOptions
    topology: Topology
    loads: Sequence[Workload]
    plans: Mapping[int, Plan]
    journal: Journal
    progress: Progress
    check_outputs: bool = True

    def candidates(self) -> list[Candidate]:
        """Those to run, smallest first: the first of them is what the others must equal."""
        heaviest = self.plans[max(self.plans)]
        fit = [c for c in heaviest.candidates if c.feasible and c.not_runnable is None]
        return sorted(fit, key=lambda c: (bool(c.format.name), c.dims.world_size, c.dims.dp, c.dims.pp))

    def left(self) -> list[tuple[Candidate, list[Workload]]]:
        """Layouts that something is left to measure of."""
        every = (
            (c, [w for w in self.loads if not self.journal.has(c.layout.name, w.concurrency)])
            for c in self.candidates()
        )
        return [(candidate, loads) for candidate, loads in every if loads]

    def run(self) -> None:
        """All that is left. A KeyboardInterrupt leaves what is done in the journal."""
        left = self.left()
        if not left:
            return
        pending = [(candidate, load) for candidate, loads in left for load in loads]
        before = len(self.loads) * len(self.candidates()) - len(pending)
        if before:
            self.progress.say(f"going on: {before} of {before + len(pending)} runs are in the journal")
        clock = Clock(self.options.device)
        with cluster(self.options, max(c.dims.world_size for c, _ in left), self.progress) as found:
            truth = None
            if self.check_outputs:
                plain = [c.dims for c in self.candidates() if c.layout.is_plain]
                truth = measure_truth(found, self.options, plain, self.topology, self.progress)
            self._say_left(clock, pending, running=None)
            for candidate, loads in left:
                on_trial = self._on_trial(clock, pending, candidate)
                options = self._told(candidate)
                run_trials(found, candidate, options, loads, self.topology, truth, self.progress, on_trial)

    def _told(self, candidate: Candidate) -> EngineOptions:
        """An offloaded layout leaves room for the heaviest load's sequences, as it was planned."""
        most = max(self.loads, key=lambda load: load.concurrency)
        sequences = -(-most.concurrency // candidate.dims.dp)
        return replace(self.options, offload_kv_tokens=sequences * (most.prompt_tokens + most.output_tokens))

    def _on_trial(
        self, clock: Clock, pending: list[tuple[Candidate, Workload]], candidate: Candidate
    ) -> OnTrial:
        """Keeps each trial of a layout as it comes, learns from it how long the rest will take, and says so."""
        begun_s = time.monotonic()
        first = True

        def take(load: Workload, trial: Trial) -> None:
            nonlocal first
            self.journal.add(candidate.layout.name, load.concurrency, trial)
            pending.remove((candidate, load))
            predicted = self.estimate(candidate, load)
            if trial.measured is not None and predicted is not None:
                if first:
                    clock.saw_start(time.monotonic() - begun_s - trial.seconds)
                first = False
                clock.saw_run(predicted, load, trial.seconds)
            if pending:
                self._say_left(clock, pending, running=candidate)

        return take

    def _say_left(
        self, clock: Clock, pending: Sequence[tuple[Candidate, Workload]], *, running: Candidate | None
    ) -> None:
        starts = {c.layout for c, _ in pending} - ({running.layout} if running is not None else set())
        runs = [(made, load) for c, load in pending if (made := self.estimate(c, load)) is not None]
        seconds = clock.left_s(len(starts), runs)
        self.progress.say(f"{count(len(pending), 'run')} to go, about {told(seconds)}")

    def estimate(self, candidate: Candidate, load: Workload) -> Estimate | None:
        same = (c for c in self.plans[load.concurrency].candidates if c.layout == candidate.layout)
        found = next(same, None)
        return None if found is None else found.estimate
