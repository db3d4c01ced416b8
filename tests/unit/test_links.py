"""What a start tells NCCL of what was proved."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.collectives.protocols import ANY_WAY
from cluster.discover import discover
from cluster.paths import Op, Path, curve_of
from cluster.proof import Outcome, Proof, Step
from cluster.prove import NO_PEERS
from launch import links
from launch.links import only_proved, small_sums
from launch.options import EngineOptions
from launch.progress import Progress
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
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Proof]:
    """Put a proof in under "now"."""
    now: dict[str, Proof] = {}
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setattr(
        links, "found_here", lambda device, **asked: discover(device=device, binding=dual_h100(), **asked)
    )
    monkeypatch.setattr(links, "proved", lambda topology, cache, say: now["now"])
    monkeypatch.setattr(links, "kept", lambda cache, topology: now.get("now"))
    monkeypatch.setattr(links, "kept_profile", lambda cache, topology: None)
    return now


def test_sound_links_change_nothing(found: dict[str, Proof]) -> None:
    found["now"] = proof(Outcome.PASSED, {})
    with only_proved(GPUS, 2, QUIET):
        assert "NCCL_P2P_DISABLE" not in os.environ
    assert small_sums(GPUS, TP2) == {"peer memory": None}  # the other was not proved
    assert not small_sums(replace(GPUS, peer_access=False), TP2)


def test_what_starts_over_bad_links_is_told_and_nothing_after_it(found: dict[str, Proof]) -> None:
    found["now"] = proof(Outcome.HUNG, NO_PEERS)
    with only_proved(GPUS, 2, QUIET):
        assert os.environ["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_DISABLE" not in os.environ
    assert not small_sums(GPUS, TP2)


@pytest.mark.parametrize(
    ("options", "devices"), [(OPTIONS, 2), (GPUS, 1), (replace(GPUS, address="10.0.0.1:6379"), 2)]
)
def test_nothing_is_proved_of_cpus_one_gpu_or_a_cluster_elsewhere(
    found: dict[str, Proof], options: EngineOptions, devices: int
) -> None:
    with only_proved(options, devices, QUIET):
        assert small_sums(options, ParallelDims(dp=devices)) == ANY_WAY


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
    most = small_sums(GPUS, TP2)["peer memory"]
    assert most is not None
    assert 1 << 20 < most < 4 << 20
    assert small_sums(GPUS, ParallelDims(tp=4)) == {"peer memory": None}  # measured of two alone
