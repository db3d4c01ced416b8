"""What a start tells NCCL of what was proved."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.collectives.protocols import ANY_WAY
from cluster.discover import discover
from cluster.errors import GangDied, PlacementFailed
from cluster.paths import Op, Path, curve_of
from cluster.proof import Outcome, Proof, Step
from cluster.prove import NO_PEERS, Rung
from cluster.topology import Topology
from launch import links
from launch.configured import engine_config
from launch.links import only_proved, prove_first_layer, ways_beside_nccl
from launch.options import EngineOptions
from launch.progress import Progress
from orchestrator.engine_config import EngineConfig
from strategies.plan import ParallelDims
from tests.fake_nvml import dual_h100
from tests.unit.test_start import OPTIONS

QUIET = Progress(quiet=True)
GPUS = replace(OPTIONS, device="cuda")
TP2 = ParallelDims(tp=2)


def proof(peer: Outcome, environment: dict[str, str]) -> Proof:
    steps = (Step("sums", Path.PEER, peer), Step("NCCL", Path.NCCL, Outcome.PASSED))
    return Proof(1, "2 × H100", "", "2026-01-01", 2, steps, environment)


@pytest.fixture
def reads() -> list[str]:
    """Of NVML."""
    return []


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> Iterator[dict[str, Proof]]:
    """Put a proof in under "now"."""
    now: dict[str, Proof] = {}
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    links._gpus.cache_clear()

    def found_here(device: str, **asked: Any) -> Topology:
        reads.append(device)
        return discover(device=device, binding=dual_h100(), **asked)

    monkeypatch.setattr(links, "found_here", found_here)
    monkeypatch.setattr(links, "proved", lambda topology, cache, say: now["now"])
    monkeypatch.setattr(links, "kept", lambda cache, topology: now.get("now"))
    monkeypatch.setattr(links, "kept_profile", lambda cache, topology: None)
    yield now
    links._gpus.cache_clear()


def test_sound_links_change_nothing(found: dict[str, Proof]) -> None:
    found["now"] = proof(Outcome.PASSED, {})
    with only_proved(GPUS, 2, QUIET):
        assert "NCCL_P2P_DISABLE" not in os.environ
    assert ways_beside_nccl(GPUS, TP2) == {"peer memory": None}  # the other was not proved
    assert not ways_beside_nccl(replace(GPUS, peer_access=False), TP2)


def test_what_starts_over_bad_links_is_told_and_nothing_after_it(found: dict[str, Proof]) -> None:
    found["now"] = proof(Outcome.HUNG, NO_PEERS)
    with only_proved(GPUS, 2, QUIET):
        assert os.environ["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_DISABLE" not in os.environ
    assert not ways_beside_nccl(GPUS, TP2)


@pytest.mark.parametrize(
    ("options", "devices"), [(OPTIONS, 2), (GPUS, 1), (replace(GPUS, address="10.0.0.1:6379"), 2)]
)
def test_nothing_is_proved_of_cpus_one_gpu_or_a_cluster_elsewhere(
    found: dict[str, Proof], options: EngineOptions, devices: int
) -> None:
    with only_proved(options, devices, QUIET):
        assert ways_beside_nccl(options, ParallelDims(dp=devices)) == ANY_WAY


def test_sums_take_a_way_as_far_as_it_was_measured_to_be_faster(
    found: dict[str, Proof], monkeypatch: pytest.MonkeyPatch
) -> None:
    found["now"] = proof(Outcome.PASSED, {})
    by_size = {Path.PEER: [2e-6, 2e-6, 90e-6], Path.NCCL: [9e-6, 9e-6, 40e-6]}
    sizes = [4 << 10, 1 << 20, 4 << 20]
    curves = [
        curve_of(Op.ALL_REDUCE, path, 2, True, list(zip(sizes, seconds, strict=True)))
        for path, seconds in by_size.items()
    ]
    monkeypatch.setattr(links, "kept_profile", lambda cache, topology: SimpleNamespace(curves=curves))
    most = ways_beside_nccl(GPUS, TP2)["peer memory"]
    assert most is not None
    assert 1 << 20 < most < 4 << 20
    assert ways_beside_nccl(GPUS, ParallelDims(tp=4)) == {"peer memory": None}  # measured of two alone


class Climbing:
    """proved_further, with outcomes put in by path."""

    def __init__(self, outcomes: dict[Path, Outcome]) -> None:
        self.outcomes, self.climbed, self.ranks = outcomes, 0, 0

    def __call__(
        self, proof: Proof, topology: Topology, ranks: int, rungs: Sequence[Rung], cache: File, say: object
    ) -> Proof:
        self.climbed, self.ranks = self.climbed + 1, ranks
        steps = []
        for rung in rungs:
            assert rung.path is not None
            steps.append(Step(rung.name, rung.path, self.outcomes[rung.path], "0.7 off"))
            if steps[-1].outcome is Outcome.PASSED:
                break
        return replace(proof, steps=(*proof.steps, *steps))


@pytest.mark.parametrize(
    ("outcomes", "trusted"),
    [
        ({Path.PEER: Outcome.PASSED}, {"peer memory": None}),
        ({Path.PEER: Outcome.WRONG, Path.NCCL: Outcome.PASSED}, {}),
        ({Path.PEER: Outcome.WRONG, Path.NCCL: Outcome.HUNG}, None),
    ],
)
def test_a_models_first_layer_is_proved_once_over_the_way_that_it_will_take(
    outcomes: dict[Path, Outcome],
    trusted: dict[str, int | None] | None,
    found: dict[str, Proof],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found["now"] = proof(Outcome.PASSED, {})
    climbing = Climbing(outcomes)

    def further(*asked: Any) -> Proof:
        found["now"] = climbing(*asked)
        return found["now"]

    monkeypatch.setattr(links, "proved_further", further)

    def start() -> None:
        config = EngineConfig(GPUS.source, GPUS.spec, "bfloat16", "cuda", ways=ways_beside_nccl(GPUS, TP2))
        prove_first_layer(GPUS, TP2, config, QUIET)

    for _ in range(2):
        if trusted is None:
            with pytest.raises(GangDied, match=r", nccl: 0\.7 off; use a replica a GPU \(--layout dp2\)"):
                start()
        else:
            start()
            assert ways_beside_nccl(GPUS, TP2) == trusted
    assert (climbing.climbed, climbing.ranks) == (1, 2)


@pytest.mark.parametrize("rest", [Outcome.MEMORY, Outcome.PASSED])
def test_a_first_layer_without_memory_is_no_fault_of_the_links(
    rest: Outcome, found: dict[str, Proof], monkeypatch: pytest.MonkeyPatch
) -> None:
    found["now"] = proof(Outcome.PASSED, {})
    monkeypatch.setattr(links, "proved_further", Climbing({Path.PEER: Outcome.MEMORY, Path.NCCL: rest}))
    config = EngineConfig(GPUS.source, GPUS.spec, "bfloat16", "cuda", ways=ways_beside_nccl(GPUS, TP2))
    with pytest.raises(PlacementFailed) as told:
        prove_first_layer(GPUS, TP2, config, QUIET)
    assert str(told.value) == (
        "no memory for the first layer of SmolLM2-135M, float32, at tp2: 0.7 off; free it (`shardwise doctor` says "
        "who holds it), or take a layout that needs less of each GPU"
    )


def test_a_start_reads_nvml_once(
    found: dict[str, Proof], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found["now"] = proof(Outcome.PASSED, {})
    monkeypatch.setattr(links, "proved_further", Climbing({Path.PEER: Outcome.PASSED}))
    with only_proved(GPUS, 2, QUIET):
        prove_first_layer(GPUS, TP2, engine_config(GPUS, TP2), QUIET)
        engine_config(GPUS, TP2)
    assert reads == ["cuda"]


def test_one_gpu_a_stage_has_no_sums_to_prove(
    found: dict[str, Proof], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "proved_further", None)  # not to be called
    config = EngineConfig(GPUS.source, GPUS.spec, "bfloat16", "cuda")
    prove_first_layer(GPUS, ParallelDims(pp=2), config, QUIET)
    prove_first_layer(OPTIONS, TP2, config, QUIET)  # on a CPU
