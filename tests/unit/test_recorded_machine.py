"""Two H100s as they were found, measured and proved on 2026-11-22 (commit b61de72): tests/topologies/2xh100."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import pynvml
import pytest

from cluster import profile, proof
from cluster.discover import discover
from cluster.nvml import GpuReport, read_gpus
from cluster.paths import Op, crossovers, gains_up_to
from cluster.paths import Path as Way
from cluster.topology import LinkKind, Topology
from launch import doctor
from launch.checks import findings
from launch.findings import MachineFacts, Severity
from launch.profile import path_lines
from tests.fake_nvml import FakeNvml, dual_4090, dual_h100
from tests.recorded_nvml import Recorded, Recorder, plain, recorded
from tests.unit.test_doctor import HEALTHY

ANSWERS = Path(__file__).parents[1] / "topologies" / "2xh100_answers.json"
"""All that the driver answered on another such machine, idle, as tests/recorded_nvml.py writes it (2026-11-22)."""

FOLDER = Path(__file__).parents[1] / "topologies" / "2xh100"
MB = 1 << 20


@pytest.fixture(autouse=True)
def _the_software_of_that_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "version", {"torch": "2.11.0"}.__getitem__)
    monkeypatch.setattr(profile, "nccl_version", lambda: "2.28.9")


def machine(*, peers: bool) -> tuple[GpuReport, Topology]:
    binding = recorded(FOLDER / "nvml.json")
    return read_gpus(binding), discover(peer_access=peers, binding=binding)


def facts_of(*, peers: bool) -> MachineFacts:
    report, topology = machine(peers=peers)
    found, proved = profile.kept(FOLDER, topology), proof.kept(FOLDER, topology)
    return replace(HEALTHY, report=report, peer_access=peers, profile=found, proof=proved)


@pytest.mark.parametrize(
    ("peers", "kind", "rate"), [(True, LinkKind.NVLINK, 279e9), (False, LinkKind.HOST, 23.9e9)]
)
def test_what_the_driver_said_gives_the_devices_that_were_measured(
    peers: bool, kind: LinkKind, rate: float
) -> None:
    """Also the names of the files: the GPUs' uuids and kinds of links find a profile again."""
    _, topology = machine(peers=peers)
    assert (topology.link(0, 1).kind, topology.name) == (kind, "2 × NVIDIA H100 80GB HBM3")
    assert topology.link(0, 1).bytes_per_s == pytest.approx(rate, rel=0.01)
    kept = profile.kept(FOLDER, topology)
    assert kept is not None
    told = [(d.name, d.uuid, d.pci, d.memory_bytes, d.free_bytes) for d in kept.devices]
    assert told == [(d.name, d.uuid, d.pci, d.memory_bytes, d.free_bytes) for d in topology.devices]


@pytest.mark.parametrize(
    ("torch", "nccl", "driver"),
    [("2.12.0", "2.28.9", "580.159.04"), ("2.11.0", "2.29.1", "580.159.04"), ("2.11.0", "2.28.9", "590.44")],
)
def test_another_torch_nccl_or_driver_has_it_measured_and_proved_anew(
    monkeypatch: pytest.MonkeyPatch, torch: str, nccl: str, driver: str
) -> None:
    monkeypatch.setattr(profile, "version", {"torch": torch}.__getitem__)
    monkeypatch.setattr(profile, "nccl_version", lambda: nccl)
    topology = replace(machine(peers=True)[1], driver=driver)
    assert profile.read(profile.profile_path(FOLDER, topology)) is not None
    assert profile.kept(FOLDER, topology) is None
    assert proof.kept(FOLDER, topology) is None


def test_the_doctor_shows_what_it_showed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda cache: facts_of(peers=True))
    assert doctor.run(argparse.Namespace(json=False)) == 0
    shown = capsys.readouterr().out
    for line in (
        "0    NVIDIA H100 80GB HBM3  85.5  85.0     1980 / 1980  37  700      5×16 / 5×16      18 to a switch",
        "1    NVIDIA H100 80GB HBM3  85.5  85.0     1980 / 1980  35  700      5×16 / 5×16      18 to a switch",
        " 0     ·    nvlink 279",
        " 1     363  ·",
        "driver 580.159.04 (CUDA 13.0)",
        "measured 2026-11-22; memory 3,031, 3,062 GB/s; 16 KB summed by peer memory in a graph in 2.8 µs",
        "proved   2026-11-22: peer memory, mapped host memory, nccl",
        "· info GPU 1 (H100 80GB HBM3): 55.0 GB/s from the host alone, 26.7 while all GPUs copy both ways",
    ):
        assert line in shown


def test_without_peer_access_one_finding_more() -> None:
    shared = ["GPU 0 (H100 80GB HBM3)", "GPU 1 (H100 80GB HBM3)"]
    assert [f.subject for f in findings(facts_of(peers=True))] == shared
    assert [f.subject for f in findings(facts_of(peers=False))] == [*shared, "NCCL_P2P_DISABLE"]


@pytest.mark.parametrize(("peers", "way", "border"), [(True, Way.PEER, 8 * MB), (False, Way.MAPPED, 4 * MB)])
def test_sums_go_by_what_was_measured(peers: bool, way: Way, border: int) -> None:
    _, topology = machine(peers=peers)
    kept = profile.kept(FOLDER, topology)
    assert kept is not None
    link = profile.apply(kept, topology, "bfloat16").link(0, 1)
    assert crossovers(link.curves, Op.ALL_REDUCE, 2, in_graph=True) == [(4096, way), (border + 1, Way.NCCL)]
    assert gains_up_to(link.curves, way, 2) == border
    [graphs, _] = path_lines(link.curves)
    assert graphs.startswith(
        f"fastest all-reduce of 2 ranks, inside graphs: {way}, nccl from {border // MB} MB"
    )


@pytest.mark.parametrize("fake", [dual_h100(), dual_4090()])
def test_a_recording_gives_the_report_again(fake: FakeNvml) -> None:
    recorder = Recorder(fake)
    report = read_gpus(recorder)
    assert read_gpus(Recorded(json.loads(json.dumps(recorder.answers)))) == report
    assert len(report.gpus) == 2


def test_all_that_a_driver_answered_agrees_with_what_the_screens_showed() -> None:
    """But for names of the one machine, and what changes by the hour: clocks of idle GPUs are low."""
    whole, shown = read_gpus(recorded(ANSWERS)), machine(peers=True)[0]
    assert len(whole.gpus) == len(shown.gpus) == 2
    for answered, screen in zip(whole.gpus, shown.gpus, strict=True):
        changes = {
            "uuid": screen.uuid,
            "sm_clock_mhz": screen.sm_clock_mhz,
            "temperature_c": screen.temperature_c,
        }
        known = {name: value for name, value in asdict(screen).items() if value is not None}
        assert {name: asdict(answered)[name] for name in known} | changes == known
        assert (answered.sm_clock_mhz, answered.ecc, answered.mig, answered.watts_limit_default) == (
            345,
            True,
            False,
            700,
        )
        assert answered.memory_bytes_per_s == pytest.approx(3.352e12, rel=1e-3)
    assert whole.peer_access == {(0, 1): True}


def test_an_idle_machine_as_it_answered_has_nothing_wrong() -> None:
    binding = recorded(ANSWERS)
    report, topology = read_gpus(binding), discover(peer_access=True, binding=binding)
    assert topology.link(0, 1).kind is LinkKind.NVLINK
    found = findings(replace(HEALTHY, report=report, peer_access=True, profile=None, proof=None))
    assert [f for f in found if f.severity in (Severity.ERROR, Severity.WARNING)] == []


def test_a_recording_takes_whole_arrays_of_structures() -> None:
    fields = (pynvml.c_nvmlFieldValue_t * 1)()
    fields[0].nvmlReturn, fields[0].value.uiVal = pynvml.NVML_SUCCESS, 26562
    [kept] = json.loads(json.dumps(plain(fields)))
    assert (kept["nvmlReturn"], kept["value"]["uiVal"]) == (pynvml.NVML_SUCCESS, 26562)
