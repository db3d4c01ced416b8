"""The doctor's findings, on injected machines."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pynvml
import pytest

from cluster.discover import Cpu, gpu_topology
from cluster.nvml import GpuReport, read_gpus
from cluster.paths import Op, curve_of
from cluster.paths import Path as Way
from cluster.pci import Hop, Slot, gb_per_s
from cluster.profile import FORMAT, Detail, HostCopy, HostPull, MachineProfile, PairCopy
from cluster.proof import Outcome, Proof, Step
from launch import doctor
from launch.checks import findings
from launch.checks.host import LEAST_OPEN_FILES
from launch.facts import clashes, gather, leftovers, ray_cluster
from launch.findings import Clash, Finding, Leftover, MachineFacts, RayCluster, Severity
from tests.fake_nvml import FakeGpu, FakeNvml, dual_4090, dual_h100, no_driver

ERROR, WARNING, INFO = Severity
VERSIONS = {
    "torch": "2.11.0+cu126",
    "ray": "2.55.0",
    "transformers": "5.0.0",
    "safetensors": "0.6",
    "deepspeed": "0.18",
}
SOUND = Proof(
    1,
    "2 × NVIDIA H100 80GB HBM3",
    "",
    "2026-11-22T07:00:00+00:00",
    2,
    (Step("sums through peer memory", Way.PEER, Outcome.PASSED), Step("NCCL's", Way.NCCL, Outcome.PASSED)),
    {},
)
HEALTHY = MachineFacts(
    cpu=Cpu("Some CPU", cores=16, memory_bytes=128_000_000_000, free_bytes=100_000_000_000),
    versions=VERSIONS,
    torch_cuda="12.6",
    shm_bytes=64_000_000_000,
)


def on(fake: FakeNvml, **changes: object) -> MachineFacts:
    """A machine that was measured and proved, unless `changes` say otherwise."""
    report = read_gpus(fake)
    known = {"profile": profile_of(report)} if len(report.gpus) > 1 else {}
    return replace(HEALTHY, report=report, **{**known, **changes})  # type: ignore[arg-type]


def profile_of(
    report: GpuReport,
    *,
    from_host: tuple[float, float] | None = None,
    read: float = 0.92,
    pcie: tuple[int | None, int | None] = (None, None),
    all_reduce: float = 0.7,
) -> MachineProfile:
    """As measured on sound links: copies `from_host` at 80 % of the slot alone and at 65 % together, reads of 92 % of
    the data sheet's memory bandwidth."""
    topology = gpu_topology(report, report.gpus)
    details, copies = [], []
    for index, (gpu, device) in enumerate(zip(report.gpus, topology.devices, strict=True)):
        rate = read * device.bandwidth_bytes_per_s
        details.append(Detail(rate, rate, {}, 8192, 4e-6, 1e-6, *pcie))
        slot = gb_per_s(gpu.pcie_generation_max or 0, gpu.pcie_lanes or 0) * 1e9
        alone, together = from_host or (0.8 * slot, 0.65 * slot)
        copies += [
            HostCopy(index, True, True, at_once, r) for at_once, r in ((False, alone), (True, together))
        ]
    wire = topology.link(0, 1).bytes_per_s
    sizes = (4096, 1 << 20, 1 << 28)
    curve = curve_of(Op.ALL_REDUCE, Way.NCCL, 2, True, [(n, 1e-5 + n / (all_reduce * wire)) for n in sizes])
    hop = curve_of(Op.SEND_RECV, Way.NCCL, 2, True, [(n, 1e-5 + n / wire) for n in sizes])
    return MachineProfile(
        format=FORMAT,
        machine=topology.name,
        fingerprint="",
        measured_at="2026-11-22T07:00:00+00:00",
        torch_version="2.11.0",
        driver=report.driver,
        nccl_version="2.28",
        devices=topology.devices,
        links=(),
        rates=(),
        curves=(curve, hop),
        details=tuple(details),
        host_copies=tuple(copies),
        pair_copies=(PairCopy(0, 1, wire), PairCopy(1, 0, wire)),
    )


def profiled(fake: FakeNvml, **figures: object) -> MachineFacts:
    return on(fake, profile=profile_of(read_gpus(fake), **figures))  # type: ignore[arg-type]


def with_pulls(facts: MachineFacts, alone: float, together: float) -> MachineFacts:
    assert facts.profile is not None
    pulls = tuple(HostPull(n, alone, together) for n in range(len(facts.gpus)))
    return replace(facts, profile=replace(facts.profile, host_pulls=pulls))


def failed(rung: str, path: Way | None, outcome: Outcome, evidence: str, fix: str, *others: Step) -> Proof:
    return replace(SOUND, steps=(Step(rung, path, outcome, evidence, fix), *others))


def pair(name: str, mib: int, **changes: object) -> list[FakeGpu]:
    return [FakeGpu(name, mib, f"00000000:0{n}:00.0", **changes) for n in (1, 2)]  # type: ignore[arg-type]


def slots(**slot: object) -> dict[str, Slot]:
    return {f"0000:0{n}:00.0": Slot(**slot) for n in (1, 2)}  # type: ignore[arg-type]


def across(name: str, mib: int) -> FakeNvml:
    one, other = pair(name, mib)
    other.socket = 1
    return FakeNvml([one, other])


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
    "x8 and far below it": (
        profiled(FakeNvml(pair("NVIDIA GeForce RTX 4090", 24564), peer_access=False), from_host=(6.1e9, 5e9)),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "6.1 GB/s from pinned memory, of 32 that PCIe 4 x16 has",
    ),
    "an IOMMU in the way to the host": (
        replace(
            profiled(
                FakeNvml(pair("NVIDIA GeForce RTX 4090", 24564), peer_access=False), from_host=(9e9, 8e9)
            ),
            slots=slots(iommu="DMA-FQ"),
        ),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "9.0 GB/s from pinned memory",
    ),
    "a riser that stays at PCIe 1": (
        profiled(dual_4090(), pcie=(1, 16)),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "link at PCIe 1 of 4 also while it copied",
    ),
    "two cards behind one switch": (
        profiled(dual_4090(), from_host=(26e9, 9e9)),
        INFO,
        "GPU 0 (GeForce RTX 4090)",
        "26.0 GB/s from the host alone, 9.0 while all GPUs copy both ways",
    ),
    "two cards behind one switch, as they pull": (
        with_pulls(profiled(dual_4090(), from_host=(26e9, 20e9)), 26e9, 12e9),
        INFO,
        "GPU 0 (GeForce RTX 4090)",
        "26.0 GB/s from the host alone, 12.0 while all GPUs pull",
    ),
    "memory at half its rate": (
        profiled(dual_4090(), read=0.5),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "its memory reads 504 GB/s, 50% of the data sheet's",
    ),
    "chipset slot, AMD": (
        on(
            one(FakeGpu("NVIDIA GeForce RTX 4090", 24564)),
            slots=slots(
                hops=(Hop("0000:02:00.2", 4, 4), Hop("0000:04:00.0", 4, 16), Hop("0000:01:00.0", 4, 16))
            ),
        ),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "PCIe 4 x16 behind 0000:02:00.2, which has PCIe 4 x4 to the host: 25% of its bandwidth",
    ),
    "chipset slot, Intel": (
        on(
            one(FakeGpu("NVIDIA GeForce RTX 4090", 24564, pcie=(4, 4, 16, 16))),
            slots=slots(hops=(Hop("0000:01:00.0", 4, 4),), chipset=True),
        ),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "in a slot of the chipset (PCIe 4 x4)",
    ),
    "IOMMU under peer access": (
        on(FakeNvml(pair("NVIDIA L40S", 46068)), slots=slots(iommu="DMA-FQ"), proof=None),
        WARNING,
        "IOMMU",
        "it translates addresses (DMA-FQ), and GPU 0-1 use peer access over PCIe",
    ),
    "peer access refused by the board": (
        on(FakeNvml(pair("NVIDIA L40S", 46068), peer_access=False)),
        WARNING,
        "peer access",
        "none between GPU 0-1, which could have it: chipset not supported; paths meet: same NUMA node",
    ),
    "two sockets": (
        on(across("NVIDIA L40S", 46068)),
        INFO,
        "sockets",
        "GPU 0-1 hang on different processors",
    ),
    "held to half its power": (
        on(one(FakeGpu("NVIDIA GeForce RTX 4090", 24564, watts_limit=225))),
        INFO,
        "GPU 0 (GeForce RTX 4090)",
        "held to 225 of 450 W",
    ),
    "too hot": (
        on(
            one(
                FakeGpu(
                    "NVIDIA GeForce RTX 4090",
                    24564,
                    throttle=pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
                )
            )
        ),
        WARNING,
        "GPU 0 (GeForce RTX 4090)",
        "slowed by hardware thermal at 41 °C",
    ),
    "a worker of a dead run holds memory": (
        on(one(h100(used_mib=40000, holders={4242: 39000})), processes={4242: "ray::Worker"}),
        WARNING,
        "GPU 0 (H100 80GB HBM3)",
        "held by ray::Worker (pid 4242) 40.9 GB",
    ),
    "peer writes hang": (
        on(
            dual_h100(),
            proof=failed(
                "writes between peers",
                None,
                Outcome.HUNG,
                "no sign of life for 15 s",
                "turn off ACS",
                *SOUND.steps,
            ),
        ),
        WARNING,
        "writes between peers, not trusted",
        "hung: no sign of life for 15 s",
    ),
    "peer access granted, data wrong": (
        on(
            dual_h100(),
            proof=failed(
                "sums through peer memory", Way.PEER, Outcome.WRONG, "3 of 100 rounds", "update", *SOUND.steps
            ),
        ),
        WARNING,
        "sums through peer memory, not trusted",
        "wrong data: 3 of 100 rounds",
    ),
    "NCCL hangs whatever it is told": (
        on(
            dual_h100(),
            proof=failed("NCCL's collectives", Way.NCCL, Outcome.HUNG, "no answer", "use replicas"),
        ),
        ERROR,
        "NCCL's collectives, not trusted",
        "hung: no answer",
    ),
    "NCCL takes a slow way": (
        profiled(dual_h100(), all_reduce=0.05),
        WARNING,
        "NCCL",
        "where a copy goes at 279.0",
    ),
    "NCCL kept from shared memory": (
        on(dual_h100(), nccl_environment={"NCCL_SHM_DISABLE": "1", "NCCL_DEBUG": "INFO"}),
        WARNING,
        "NCCL_SHM_DISABLE",
        "is 1: NCCL goes through sockets",
    ),
    "never measured": (on(dual_h100(), profile=None), INFO, "profile", "never measured in full"),
    "driver updated since it was measured": (
        on(dual_h100(), profile_changes=("driver was 550.54.14, is 580.65",)),
        INFO,
        "profile",
        "taken 2026-11-22, and since then driver was 550.54.14",
    ),
    "packages that clash": (
        on(no_driver(), clashes=(Clash("torch 2.11.0", "triton==3.6.0", "3.4.0"),)),
        WARNING,
        "triton",
        "3.4.0 is installed, and torch 2.11.0 wants triton==3.6.0",
    ),
    "an optional package lacks what we do not use of it": (
        on(
            no_driver(),
            clashes=(
                Clash("flashinfer-python 0.6.14", "cuda-tile>=1.4.0", None, spared=True),
                Clash("flashinfer-python 0.6.14", "nvidia-cutlass-dsl>=4.5.0", None, spared=True),
            ),
        ),
        INFO,
        "flashinfer-python",
        "0.6.14 names packages that are not installed: cuda-tile>=1.4.0, nvidia-cutlass-dsl>=4.5.0",
    ),
    "few open files": (on(no_driver(), open_files=1024), WARNING, "open files", "a process may have 1024"),
    "a Ray cluster that wants a token": (
        on(no_driver(), ray_cluster=RayCluster("10.0.0.1:6379", 401)),
        WARNING,
        "Ray cluster",
        "10.0.0.1:6379 asks for a token; RAY_AUTH_MODE is unset",
    ),
    "a Ray cluster with another token": (
        on(no_driver(), ray_cluster=RayCluster("10.0.0.1:6379", 403), ray_auth_mode="token"),
        WARNING,
        "Ray cluster",
        "refuses the token; RAY_AUTH_MODE is token",
    ),
    "a dead Ray cluster": (
        on(no_driver(), ray_cluster=RayCluster("127.0.0.1:6379", None)),
        WARNING,
        "Ray cluster",
        "does not answer",
    ),
    "another Ray": (
        on(no_driver(), ray_cluster=RayCluster("10.0.0.1:6379", 200, "2.54.0")),
        WARNING,
        "Ray cluster",
        "runs ray 2.54.0, and 2.55.0 is installed here",
    ),
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
    """Besides its own finding, on each GPU, at most what a machine without a GPU or two GeForce cards always have."""
    facts, severity, subject, _ = MACHINES[name]
    expected = {(severity, subject)}
    if not facts.report.gpus and not facts.driver_loaded:
        expected.add((INFO, "NVIDIA driver"))
    if len(facts.gpus) > 1 and "GeForce" in facts.gpus[1].name:
        expected.add((INFO, "peer access"))
    assert {(found, whom.replace("GPU 1", "GPU 0")) for found, whom in seen(facts)} == expected


def test_two_3090s_without_a_bridge_are_told_what_one_gives() -> None:
    cards = pair("NVIDIA GeForce RTX 3090", 24576)
    facts = on(FakeNvml(cards, peer_access=False))
    assert {f.subject for f in findings(facts)} == {"NVLink bridge", "peer access"}
    [bridge] = [f for f in findings(facts) if f.subject == "NVLink bridge"]
    assert "none on GPU 0, 1: traffic takes PCIe, 32 GB/s at most" in bridge.evidence
    assert "56 GB/s" in bridge.fix
    for card, other in zip(cards, cards[::-1], strict=True):
        card.nvlink = (other.pci,) * 4
    assert findings(on(FakeNvml(cards, peer_access=False))) == []


def test_acs_is_seen_where_cards_under_one_switch_are_kept_apart() -> None:
    fake = FakeNvml(pair("NVIDIA L40S", 46068))
    report = replace(read_gpus(fake), ancestors={(0, 1): "one PCIe switch"})
    apart = {f"0000:0{n}:00.0": Slot(iommu_group=n) for n in (1, 2)}
    [found] = findings(replace(on(fake), report=report, slots=apart))
    assert (found.severity, found.subject) == (WARNING, "ACS")
    assert findings(replace(on(fake), report=report, slots=slots(iommu_group=1))) == []


def test_an_iommu_that_was_proved_to_work_is_left_alone() -> None:
    facts = on(FakeNvml(pair("NVIDIA L40S", 46068)), slots=slots(iommu="DMA"), proof=SOUND)
    assert findings(facts) == []
    assert findings(on(dual_h100(), slots=slots(iommu="DMA"))) == [], "NVLink does not pass it"


def test_why_a_copy_is_slow_is_told_by_what_is_known() -> None:
    slow = profiled(dual_4090(), from_host=(6e9, 5e9))
    fixes = {f.fix for facts in (slow, replace(slow, slots=slots(iommu="DMA"))) for f in findings(facts)}
    assert any("iommu=pt" in fix for fix in fixes)
    assert any("M.2 disks" in fix for fix in fixes)


def test_rocm_is_no_cpu_build() -> None:
    assert findings(on(dual_h100(), torch_cuda=None, torch_hip="6.4")) == []


def test_enough_open_files_are_no_finding() -> None:
    assert "open files" not in {f.subject for f in findings(on(no_driver(), open_files=LEAST_OPEN_FILES))}


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
    monkeypatch.setattr(doctor, "gather", lambda cache: facts)
    assert doctor.run(argparse.Namespace(json=True)) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is (code == 0)
    assert [Finding(**found) for found in printed["findings"]] == findings(facts)
    assert set(printed["findings"][0]) == {"severity", "subject", "evidence", "fix"}


def test_people_see_devices_links_and_findings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda cache: on(dual_4090(), torch_cuda=None))
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


def test_what_was_measured_and_proved_stands_beside_what_the_driver_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda cache: on(dual_h100(), proof=SOUND))
    assert doctor.run(argparse.Namespace(json=False)) == 0
    shown = capsys.readouterr().out
    for words in (
        "nvlink 279",
        "16 KB summed by nccl in a graph",
        "proved   2026-11-22: peer memory, nccl",
        "18 to a switch",
    ):
        assert words in shown


def test_the_links_of_eight_devices_fit_on_a_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [card, _] = dual_h100().gpus
    node = FakeNvml([replace(card, pci=f"00000000:{bus:02X}:00.0") for bus in range(8)])
    monkeypatch.setattr(doctor, "gather", lambda cache: on(node))
    doctor.run(argparse.Namespace(json=False))
    shown = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(shown) if line.split()[:1] == ["link"])
    matrix = shown[first : first + 9]
    assert sum(line.count("nvlink") for line in matrix) == 28
    assert max(map(len, matrix)) <= 100


def test_metadata_tells_what_clashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, release, wants in (
        (
            "torch",
            "9.1",
            ("triton==9.6.0", "absent-one; extra == 'test'", "absent-two>1", "numpy", "sympy>=1.0"),
        ),
        ("flashinfer-python", "9.0", ("absent-three>=2", "triton<9.1")),
        ("triton", "9.4.0", ()),
        ("sympy", "1.14", ()),
    ):
        info = tmp_path / f"{name.replace('-', '_')}-{release}.dist-info"
        info.mkdir()
        lines = [f"Name: {name}", f"Version: {release}", *(f"Requires-Dist: {line}" for line in wants)]
        (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(clashes(["torch", "not-there", "flashinfer-python"])) == [
        Clash("torch 9.1", "triton==9.6.0", "9.4.0"),
        Clash("torch 9.1", "absent-two>1", None),
        Clash("flashinfer-python 9.0", "absent-three>=2", None, spared=True),
        Clash("flashinfer-python 9.0", "triton<9.1", "9.4.0"),
    ]


class Dashboard(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        right = self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if right else 403 if self.headers["Authorization"] else 401)
        self.end_headers()
        if right:
            self.wfile.write(b'{"ray_version": "2.54.0"}')

    def log_message(self, *args: object) -> None:
        pass


def test_a_ray_cluster_is_asked_for_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr("launch.facts.RAY_DASHBOARD_PORT", server.server_port)
    answers = []
    for content in (None, "wrong", "secret"):
        if content is not None:
            token.write_text(content)
        answers.append(ray_cluster(token))
    server.shutdown()
    server.server_close()
    answers.append(ray_cluster(token))
    expected = [(401, ""), (403, ""), (200, "2.54.0"), (None, "")]
    assert answers == [RayCluster("127.0.0.1:6379", status, version) for status, version in expected]


def test_gathering_from_this_machine_takes_the_injected_gpus(tmp_path: Path) -> None:
    facts = gather(tmp_path, read_gpus(dual_h100()))
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
    killed, building = (
        tmp_path / "extensions" / "py311_cu130" / name / "lock" for name in ("aio", "cpu_adam")
    )
    for lock in (killed, building):
        lock.parent.mkdir(parents=True)
        lock.touch()
    with (held / "log").open("w"), building.open("w"):
        found = list(leftovers((tmp_path, tmp_path / "absent"), tmp_path / "extensions"))
    assert found == [Leftover(str(dead), 100), Leftover(str(killed), 0)]
