"""`shardwise claims --measure`: guides' promises of graphs, pinned memory, pruning, INT8 and batches, run here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version

from cluster.busy import with_what_is_left
from cluster.children import ChildFailed, Children
from cluster.errors import BadRequest, ShardwiseError
from cluster.measure import meeting_place, targets
from cluster.topology import Topology
from launch.claim_measured import MOST_AT_ONCE, PARTS, Found, Loss, Row, rows_of
from launch.claim_runs import RUNS, run, shape
from launch.machine import found_here
from launch.models import SMOLLM2
from launch.options import EngineOptions, add_engine_arguments, choose_device, engine_options
from launch.progress import Progress
from launch.start import Devices, cluster
from launch.version import our_version
from strategies.scheme import SPARSE24

Started = Callable[[EngineOptions, int, Progress], AbstractContextManager[Devices]]

_MODEL = "llama-3.1-8b"
_PROBE_S = 0.1
_PROBE_LIMIT_S = 120.0
_LOSS_TOKENS = {"cpu": 256, "cuda": 2048}
_LOSS_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Measurement:
    machine: str
    date: str
    versions: Mapping[str, str]
    cores_left: float  # by other programs, of the cores' time, before
    rows: Sequence[Row]

    @property
    def told(self) -> str:
        """The machine, the day and the versions, in a line."""
        words = [self.machine, self.date, *(f"{name} {found}" for name, found in self.versions.items())]
        if self.cores_left < 1:
            words.append(f"other programs left {self.cores_left:.0%} of the cores' time, so times are rough")
        return ", ".join(words)


def parts_of(ids: Sequence[str]) -> list[str]:
    """What is measured of these claims; of all where none is named. Raises BadRequest."""
    wanted = {name.upper() for name in ids}
    found = [part for part, claim in PARTS.items() if not ids or claim in wanted]
    if not found:
        measured = sorted(set(PARTS.values()))
        raise BadRequest(
            f"--measure is of {' and '.join(measured)}, not of {', '.join(ids)}; name one of them, or none"
        )
    return found


def measure(parts: Sequence[str], device: str, progress: Progress, started: Started = cluster) -> Measurement:
    """On the first device of this machine; about a minute. `started`: where ranks come from. Raises UserError."""
    kind = choose_device(device)
    machine = found_here(kind)
    one = replace(machine, devices=machine.devices[:1], links={})
    options, shape_name = _engine(kind, one.devices[0].free_bytes)
    bench = _Bench(one, options, progress, started)
    found = Found(shape_name, kind)
    left = with_what_is_left(one).devices[0].free_share
    with closing(bench.children):
        for named, step in bench.steps:
            wanted = [part for part in named if part in parts]
            try:
                found = step(found, wanted) if wanted else found
            except (ShardwiseError, ChildFailed) as error:
                found = replace(found, absent={**found.absent, **dict.fromkeys(wanted, str(error))})
    versions = {"shardwise": our_version(), "torch": version("torch"), "Ray": version("ray")}
    if machine.driver:
        versions["driver"] = machine.driver
    day = datetime.now(UTC).date().isoformat()
    return Measurement(one.devices[0].name, day, versions, left, rows_of(found, parts))


def _engine(kind: str, free_bytes: int) -> tuple[EngineOptions, str]:
    """With random weights, of a shape that is told by name."""
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    runs = RUNS[kind]
    longest = max(runs.alone.prompt_tokens + runs.alone.output_tokens, runs.crowd.longest)
    flags = f"--weights dummy --device {kind} --max-num-seqs {MOST_AT_ONCE} --no-enable-prefix-caching"
    argv = [_MODEL, *flags.split(), "--max-model-len", str(longest)]
    options = engine_options(parser.parse_args(argv))
    spec, name = shape(options.spec, kind, free_bytes)
    return replace(options, spec=spec), name


class _Bench:
    """Each step adds to what was found: the parts that are wanted of those it can measure."""

    def __init__(self, one: Topology, options: EngineOptions, progress: Progress, started: Started) -> None:
        self._options, self._progress, self._started = options, progress, started
        (self._target,) = targets(one, 1, _PROBE_S)
        self._on_gpu = options.device == "cuda"
        self.children = Children(1, {}, progress.say)
        self.steps: list[tuple[Sequence[str], Callable[[Found, Sequence[str]], Found]]] = [
            (("pruning",), self._pruned),
            (("pinned",), self._copied),
            (("graphs", "adaptive"), self._served),
            (("int8", "pruning"), self._lost),
        ]

    def _pruned(self, found: Found, _: Sequence[str]) -> Found:
        from launch import claim_probes

        self._progress.say("products with pruned weights")
        alone = replace(self._target, threads=1)  # on a CPU its own time counts, whatever else runs
        (products,) = self.children.each(claim_probes.products, [(alone,)], _PROBE_LIMIT_S)
        return replace(found, products=products, weight=claim_probes.weight_name(found.device))

    def _copied(self, found: Found, _: Sequence[str]) -> Found:
        if not self._on_gpu:
            return found
        from cluster import copy_probes

        self._progress.say("copies from host memory")
        jobs = [(self._target, meeting_place())]
        ((copies, _pcie),) = self.children.each(copy_probes.host_copies, jobs, _PROBE_LIMIT_S)
        rates = {copy.pinned: copy.bytes_per_s for copy in copies if copy.to_device and not copy.together}
        return replace(found, pinned_bytes_per_s=rates[True], pageable_bytes_per_s=rates[False])

    def _served(self, found: Found, wanted: Sequence[str]) -> Found:
        self.children.close()  # a GPU's memory is the engine's now
        runs, crowd = RUNS[found.device], "adaptive" in wanted
        graphs = self._on_gpu and "graphs" in wanted
        if not graphs and not crowd:
            return found
        with self._started(self._options, 1, self._progress) as devices:
            alone, drained = run(devices, self._options, runs, self._progress, crowd=crowd)
            found = replace(found, with_graphs=alone, drained=drained, load=str(runs.crowd))
            if graphs:
                self._progress.say("the same without CUDA graphs")
                eager = replace(self._options, enforce_eager=True)
                alone, _ = run(devices, eager, runs, self._progress, crowd=False)
                found = replace(found, eager=alone)
        return found

    def _lost(self, found: Found, _: Sequence[str]) -> Found:
        """A real model's perplexity in fewer bits, where one is here."""
        from launch.quality import config_of, options_of
        from launch.texts import BUNDLED, bundled
        from orchestrator.engine.quality import compared, scored, windows_of
        from orchestrator.text import text_of

        full = options_of(SMOLLM2, found.device, "float32", "tp1")
        text = text_of(full.source)
        assert text is not None, "the package has a tokenizer"
        windows = windows_of(text.encode(bundled()), _LOSS_CONTEXT, _LOSS_TOKENS[found.device])
        rise, tokens = {}, 0
        with self._progress.bar("what INT8 and 2:4 cost SmolLM2", unit_is_bytes=False) as bar:
            reference = list(scored(config_of(full), windows, bar.update))
            for name in ("int8", SPARSE24):
                asked = options_of(SMOLLM2, found.device, "auto", f"tp1+{name}")
                quality = compared(reference, scored(config_of(asked), windows, bar.update), windows)
                rise[name], tokens = quality.rise_percent / 100, quality.tokens
        return replace(found, loss=Loss(full.spec.name, BUNDLED, tokens, rise))
