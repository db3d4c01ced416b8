"""The doctor's findings, on injected machines."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest

from cluster.discover import Cpu
from cluster.nvml import read_gpus
from launch import doctor
from launch.facts import gather, leftovers
from launch.findings import Finding, Leftover, MachineFacts, Severity, findings
from tests.fake_nvml import FakeGpu, FakeNvml, dual_4090, dual_h100, no_driver

ERROR, WARNING, INFO = Severity
VERSIONS = {
    "torch": "2.11.0+cu126",
    "ray": "2.55.0",
    "transformers": "5.0.0",
    "safetensors": "0.6",
    "deepspeed": "0.18",
}
HEALTHY = MachineFacts(
    cpu=Cpu("Some CPU", cores=16, memory_bytes=128_000_000_000, free_bytes=100_000_000_000),
    versions=VERSIONS,
    torch_cuda="12.6",
    shm_bytes=64_000_000_000,
)


def on(fake: FakeNvml, **changes: object) -> MachineFacts:
    return replace(HEALTHY, report=read_gpus(fake), **changes)  # type: ignore[arg-type]


def one(fake_gpu: FakeGpu) -> FakeNvml:
    return FakeNvml([fake_gpu])


def h100(**changes: object) -> FakeGpu:
    return FakeGpu("NVIDIA H100 80GB HBM3", 81559, pcie=(5, 5, 16, 16), **changes)  # type: ignore[arg-type]


def seen(facts: MachineFacts) -> list[tuple[Severity, str]]:
    return [(finding.severity, finding.subject) for finding in findings(facts)]


def test_a_healthy_node_has_nothing_to_say() -> None:
    assert findings(on(dual_h100())) == []


MACHINES: dict[str, tuple[MachineFacts, Severity, str, str]] = {
    "no driver": (on(no_driver()), INFO, "NVIDIA driver", "no GPU: NVML Shared Library Not Found"),
    "driver updated, not reloaded": (
        on(FakeNvml([], problem=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH), driver_loaded=True),
        ERROR,
        "NVIDIA driver",
        "NVML does not start: RM has detected an NVML/RM version mismatch.",
    ),
    "all hidden": (on(dual_h100(), visible=""), WARNING, "CUDA_VISIBLE_DEVICES", "'' hides all 2 GPUs"),
    "CPU build of torch": (
        on(dual_h100(), torch_cuda=None),
        ERROR,
        "torch",
        "is a CPU build, beside 2 GPUs: --device cuda cannot start",
    ),
    "driver too old": (
        on(dual_h100(), torch_cuda="13.0"),
        ERROR,
        "NVIDIA driver",
        "550.54.14 runs CUDA up to 12.4; torch 2.11.0+cu126 needs 13.0",
    ),
    "old torch": (
        on(no_driver(), versions={**VERSIONS, "torch": "2.9.1"}),
        ERROR,
        "torch",
        "2.9.1 is older than 2.11",
    ),
    "no torch": (on(no_driver(), versions={**VERSIONS, "torch": None}), ERROR, "torch", "not installed"),
    "no ray": (on(no_driver(), versions={**VERSIONS, "ray": None}), ERROR, "ray", "not installed"),
    "no deepspeed": (
        on(no_driver(), versions={**VERSIONS, "deepspeed": None}),
        WARNING,
        "deepspeed",
        "not installed",
    ),
    "x8 slot": (
        on(one(FakeGpu("NVIDIA GeForce RTX 4090", 24564, pcie=(4, 4, 8, 16)))),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "x8 of x16 PCIe lanes: 50%",
    ),
    "generation 3 slot": (
        on(one(FakeGpu("NVIDIA GeForce RTX 4090", 24564, pcie=(3, 3, 16, 16)))),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "PCIe 3 slot, the card has PCIe 4: 50%",
    ),
    "idle link": (
        on(one(FakeGpu("NVIDIA GeForce RTX 4090", 24564, pcie=(1, 4, 16, 16)))),
        INFO,
        "GPU 0 (GeForce RTX 4090)",
        "link at PCIe 1 now, 4 at most: an idle card lowers it",
    ),
    "memory held": (
        on(one(h100(used_mib=40000, holders={4242: 39000})), processes={4242: "python3"}),
        WARNING,
        "GPU 0 (H100 80GB HBM3)",
        "43.6 of 85.5 GB free; held by python3 (pid 4242) 40.9 GB",
    ),
    "memory full": (
        on(one(h100(used_mib=81000))),
        ERROR,
        "GPU 0 (H100 80GB HBM3)",
        "0.6 of 85.5 GB free; held by processes that this container cannot see",
    ),
    "MIG": (on(one(h100(mig=True))), WARNING, "GPU 0 (H100 80GB HBM3)", "MIG is on"),
    "ECC": (on(one(h100(ecc_errors=3))), WARNING, "GPU 0 (H100 80GB HBM3)", "3 uncorrected memory errors"),
    "persistence": (on(one(h100(persistent=False))), INFO, "persistence mode", "off on GPU 0"),
    "lanes down": (
        on(one(h100(nvlink=("switch",) * 12 + ("down",) * 6))),
        WARNING,
        "GPU 0 (H100 80GB HBM3)",
        "12 of 18 NVLink lanes up: 67%",
    ),
    "no peer access": (
        on(dual_4090()),
        INFO,
        "peer access",
        "none between GPU 0-1: all traffic goes through host memory",
    ),
    "peer access switched off": (on(dual_h100(), peer_access=False), INFO, "NCCL_P2P_DISABLE", "is set"),
    "mixed": (
        on(FakeNvml([h100(), FakeGpu("NVIDIA L40S", 46068, "00000000:02:00.0")])),
        INFO,
        "mixed GPUs",
        "NVIDIA H100 80GB HBM3, NVIDIA L40S",
    ),
    "Docker's /dev/shm": (
        on(dual_h100(), shm_bytes=64 << 20),
        ERROR,
        "/dev/shm",
        "67 MB free; NCCL and Ray need it",
    ),
    "Docker's /dev/shm, no GPU": (
        on(no_driver(), shm_bytes=64 << 20),
        WARNING,
        "/dev/shm",
        "67 MB free; Ray's",
    ),
    "little memory": (
        on(no_driver(), cpu=Cpu("Some CPU", 2, 4_000_000_000, 900_000_000)),
        ERROR,
        "memory",
        "0.9 of 4.0 GB free; Ray and one worker take 2 GB",
    ),
    "full disk": (on(no_driver(), disk_free_bytes=10**9), ERROR, "disk", "/tmp: 1.0 of 1100 GB free"),
    "nearly full disk": (on(no_driver(), disk_free_bytes=50 * 10**9), WARNING, "disk", "at 95% full"),
    "leftovers": (
        on(
            no_driver(),
            leftovers=(Leftover("/tmp/shardwise-gang-1", 5 * 10**8), Leftover("/dev/shm/shardwise-2", 10**8)),
        ),
        WARNING,
        "leftovers",
        "2 of runs that are no more, 0.60 GB",
    ),
    "open token": (on(no_driver(), ray_token_mode=0o644), WARNING, "Ray's token", "has mode 0644"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_each_fault_is_named_with_its_evidence_and_a_fix(name: str) -> None:
    facts, severity, subject, evidence = MACHINES[name]
    [found] = [f for f in findings(facts) if f.subject == subject and evidence in f.evidence]
    assert found.severity is severity
    assert found.fix


@pytest.mark.parametrize("name", MACHINES)
def test_a_fault_brings_no_others_with_it(name: str) -> None:
    """Besides its own finding, at most what a machine without a GPU always has."""
    facts, severity, subject, _ = MACHINES[name]
    expected = {(severity, subject)}
    if not facts.report.gpus and not facts.driver_loaded:
        expected.add((INFO, "NVIDIA driver"))
    assert set(seen(facts)) == expected


def test_a_healthy_token_is_no_finding() -> None:
    assert (WARNING, "Ray's token") not in seen(on(no_driver(), ray_token_mode=0o600))


def test_a_hidden_gpu_is_not_examined() -> None:
    broken = dual_h100()
    broken.gpus[1].ecc_errors = 9
    assert findings(on(broken, visible="0")) == []


def test_errors_come_first() -> None:
    found = findings(on(dual_4090(), shm_bytes=64 << 20, ray_token_mode=0o644))
    assert [f.severity for f in found] == [ERROR, WARNING, INFO]


@pytest.mark.parametrize(("facts", "code"), [(on(no_driver()), 0), (on(dual_h100(), torch_cuda=None), 3)])
def test_exit_code_and_json(
    facts: MachineFacts, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda: facts)
    assert doctor.run(argparse.Namespace(json=True)) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is (code == 0)
    assert [Finding(**found) for found in printed["findings"]] == findings(facts)
    assert set(printed["findings"][0]) == {"severity", "subject", "evidence", "fix"}


def test_people_see_devices_links_and_findings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda: on(dual_4090(), torch_cuda=None))
    assert doctor.run(argparse.Namespace(json=False)) == 3
    shown = capsys.readouterr().out
    for words in (
        "2 × NVIDIA GeForce RTX 4090",
        "host 12",
        "4×16 / 4×16",
        "driver 550.54.14",
        "✗ error torch",
        "1 of these",
    ):
        assert words in shown


def test_gathering_from_this_machine_takes_the_injected_gpus() -> None:
    facts = gather(read_gpus(dual_h100()))
    assert [gpu.name for gpu in facts.report.gpus] == ["NVIDIA H100 80GB HBM3"] * 2
    assert facts.versions["torch"] is not None
    assert facts.disk_free_bytes > 0


def test_leftovers_are_what_no_living_process_has_a_part_in(tmp_path: Path) -> None:
    own = tmp_path / f"sw-{os.getpid()}-abc"
    dead = tmp_path / "sw-999999999-abc"
    held, stranger = tmp_path / "shardwise-held", tmp_path / "other"
    for folder in (own, dead, held, stranger, tmp_path / "sw-weights-1"):
        folder.mkdir()
    (dead / "log").write_bytes(b"x" * 100)
    with (held / "log").open("w"):
        assert list(leftovers((tmp_path, tmp_path / "absent"))) == [Leftover(str(dead), 100)]
