"""What a start tells NCCL of what was proved."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from cluster.discover import discover
from cluster.paths import Path
from cluster.proof import Outcome, Proof, Step
from cluster.prove import NO_PEERS
from launch import links
from launch.links import only_proved, peers_trusted
from launch.options import EngineOptions
from launch.progress import Progress
from tests.fake_nvml import dual_h100
from tests.unit.test_start import OPTIONS

QUIET = Progress(quiet=True)
GPUS = replace(OPTIONS, device="cuda")


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
    return now


def test_sound_links_change_nothing(found: dict[str, Proof]) -> None:
    found["now"] = proof(Outcome.PASSED, {})
    with only_proved(GPUS, 2, QUIET):
        assert "NCCL_P2P_DISABLE" not in os.environ
    assert peers_trusted(GPUS, 2)
    assert not peers_trusted(replace(GPUS, peer_access=False), 2)


def test_what_starts_over_bad_links_is_told_and_nothing_after_it(found: dict[str, Proof]) -> None:
    found["now"] = proof(Outcome.HUNG, NO_PEERS)
    with only_proved(GPUS, 2, QUIET):
        assert os.environ["NCCL_P2P_DISABLE"] == "1"
    assert "NCCL_P2P_DISABLE" not in os.environ
    assert not peers_trusted(GPUS, 2)


@pytest.mark.parametrize(
    ("options", "devices"), [(OPTIONS, 2), (GPUS, 1), (replace(GPUS, address="10.0.0.1:6379"), 2)]
)
def test_nothing_is_proved_of_cpus_one_gpu_or_a_cluster_elsewhere(
    found: dict[str, Proof], options: EngineOptions, devices: int
) -> None:
    with only_proved(options, devices, QUIET):
        assert peers_trusted(options, devices)
