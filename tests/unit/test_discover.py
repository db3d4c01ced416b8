"""This machine as a Topology, on injected machines."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from cluster import rocm
from cluster.catalog import sheet
from cluster.discover import Cpu, cpu_topology, device_vitals, discover, gpu_topology, numa_node, read_cpu
from cluster.errors import PlacementFailed
from cluster.nvml import read_gpus, read_pcie
from cluster.topology import LinkKind, Provenance
from tests.fake_nvml import FakeGpu, FakeNvml, dual_4090, dual_h100, no_driver

MIB = 2**20


def test_dual_4090_has_no_peer_access_and_the_drivers_memory() -> None:
    topology = discover(binding=dual_4090())
    assert topology.name == "2 × NVIDIA GeForce RTX 4090"
    first = topology.devices[0]
    assert (first.memory_bytes, first.free_bytes) == (24564 * MIB, 24164 * MIB)
    assert first.bandwidth_bytes_per_s == 1008e9
    assert first.pci == "0000:01:00.0"
    assert first.provenance is Provenance.DATASHEET
    assert topology.link(0, 1).kind is LinkKind.HOST


def test_two_h100_with_all_lanes_get_the_whole_nvlink() -> None:
    fake = dual_h100()
    link = discover(binding=fake).link(0, 1)
    assert link.kind is LinkKind.NVLINK
    assert link.bytes_per_s == pytest.approx(0.62 * 450e9, rel=0.01)  # the catalogue's share of 18 × 25 GB/s
    assert fake.sessions == 0, "every nvmlInit has its nvmlShutdown"


def test_lanes_that_are_down_take_their_share_of_bandwidth() -> None:
    whole, half = dual_h100(), dual_h100()
    for gpu in half.gpus:
        gpu.nvlink = ("switch",) * 9 + ("down",) * 9
    ratio = discover(binding=half).link(0, 1).bytes_per_s / discover(binding=whole).link(0, 1).bytes_per_s
    assert ratio == pytest.approx(0.5)


def test_direct_lanes_are_counted_to_each_neighbour() -> None:
    """A V100 mesh: one neighbour by four lanes, the other by two."""
    buses = ["00000000:0A:00.0", "00000000:0B:00.0", "00000000:0C:00.0"]
    lanes = [(1, 1, 1, 1, 2, 2), (0, 0, 0, 0, 2, 2), (0, 0, 1, 1)]
    gpus = [
        FakeGpu("Tesla V100-SXM2-16GB", 16384, bus, nvlink=tuple(buses[to] for to in own))
        for bus, own in zip(buses, lanes, strict=True)
    ]
    topology = discover(binding=FakeNvml(gpus))
    assert topology.link(0, 1).bytes_per_s == pytest.approx(2 * topology.link(0, 2).bytes_per_s, rel=0.01)


def test_peer_access_switched_off_makes_every_link_host_staged() -> None:
    assert discover(peer_access=False, binding=dual_h100()).link(0, 1).kind is LinkKind.HOST


def test_an_x8_slot_halves_the_link() -> None:
    narrow = dual_4090()
    narrow.gpus[1].pcie = (4, 4, 8, 16)
    full = discover(binding=dual_4090()).link(0, 1).bytes_per_s
    assert discover(binding=narrow).link(0, 1).bytes_per_s == pytest.approx(full / 2)


def test_an_idle_card_in_generation_1_is_not_a_slow_link() -> None:
    idle = dual_4090()
    for gpu in idle.gpus:
        gpu.pcie = (1, 4, 16, 16)
    assert discover(binding=idle).link(0, 1) == discover(binding=dual_4090()).link(0, 1)


def test_mixed_and_unknown_cards() -> None:
    """A card that the catalogue lacks is priced by its clocks: here those of a 4090."""
    known = FakeGpu("NVIDIA GeForce RTX 3090", 24576, "00000000:01:00.0")
    unknown = FakeGpu("NVIDIA Imaginary 1", 24564, "00000000:02:00.0", pcie=(4, 4, 8, 16))
    topology = discover(binding=FakeNvml([known, unknown], peer_access=True))
    assert topology.name == "1 × NVIDIA GeForce RTX 3090 + 1 × NVIDIA Imaginary 1"
    assert topology.devices[1].bandwidth_bytes_per_s == pytest.approx(1008e9, rel=1e-3)
    assert topology.devices[1].flops_per_s["bfloat16"] == pytest.approx(165.2e12, rel=1e-2)
    assert topology.link(0, 1).kind is LinkKind.PCIE


def test_cuda_visible_devices_chooses_and_orders() -> None:
    fake = dual_4090()
    one, two = (gpu.uuid for gpu in fake.gpus)
    seen = {
        text: [device.uuid for device in discover(visible=text, binding=fake).devices]
        for text in ("1,0", f"{two}", "0,7,1")
    }
    assert seen == {"1,0": [two, one], two: [two], "0,7,1": [one]}


def test_no_driver_is_a_cpu_machine() -> None:
    topology = discover(2, binding=no_driver())
    assert [device.kind for device in topology.devices] == ["cpu", "cpu"]
    assert topology.link(0, 1).kind is LinkKind.LOOPBACK


@pytest.mark.parametrize(
    ("world_size", "fake", "visible", "words"),
    [
        (4, dual_4090(), None, "4 GPUs asked for, 2 here"),
        (None, no_driver(), None, "NVML Shared Library Not Found"),
        (None, dual_4090(), "", "CUDA_VISIBLE_DEVICES='' hides all 2"),
    ],
)
def test_more_than_is_here_is_the_users_error(
    world_size: int | None, fake: FakeNvml, visible: str | None, words: str
) -> None:
    with pytest.raises(PlacementFailed, match=words):
        discover(world_size, "cuda", visible=visible, binding=fake)


def test_cpu_ranks_share_one_pool() -> None:
    topology = cpu_topology(3, Cpu("Some CPU", cores=4, memory_bytes=8 << 30, free_bytes=6 << 30))
    assert len({device.pool for device in topology.devices}) == 1
    assert topology.devices[0].pool.startswith("cpu:")
    assert [device.index for device in topology.devices] == [0, 1, 2]
    assert (
        topology.devices[0].flops_per_s["float32"] == sheet("cpu").flops_per_s["float32"] / 2
    )  # 4 of 8 cores
    assert len(cpu_topology(None, Cpu("Big", 96, 1 << 40, 1 << 40)).devices) == 8


def proc_of(root: Path, membership: str) -> Path:
    proc = root / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    900 kB\n")
    (proc / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\n")
    (proc / "self" / "cgroup").write_text(membership)
    return proc


def test_cpu_memory_without_a_limit_is_the_machines(tmp_path: Path) -> None:
    cpu = read_cpu(proc_of(tmp_path, "0::/\n"), tmp_path / "cgroup")
    assert (cpu.name, cpu.memory_bytes, cpu.free_bytes) == ("Some CPU @ 2.00GHz", 1000 * 1024, 900 * 1024)


@pytest.mark.parametrize(
    ("membership", "folder", "limit", "used"),
    [
        ("0::/job/step\n", "job", "memory.max", "memory.current"),
        ("0::/elsewhere\n", "", "memory.max", "memory.current"),  # a container: its group is the root
        ("4:cpu,memory:/job\n", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_cpu_memory_honours_control_groups(
    tmp_path: Path, membership: str, folder: str, limit: str, used: str
) -> None:
    group = tmp_path / "cgroup" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("500000\n")
    (group / used).write_text("120000\n")
    cpu = read_cpu(proc_of(tmp_path, membership), tmp_path / "cgroup")
    assert (cpu.memory_bytes, cpu.free_bytes) == (500000, 380000)


def test_a_cpu_quota_counts_as_fewer_cores(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert read_cpu(cgroup=tmp_path).cores == 1


def test_numa_node_of_a_pci_device(tmp_path: Path) -> None:
    for pci, node in (("0000:01:00.0", "1"), ("0000:02:00.0", "-1")):
        (tmp_path / pci).mkdir()
        (tmp_path / pci / "numa_node").write_text(f"{node}\n")
    assert [numa_node(f"0000:{bus}:00.0", tmp_path) for bus in ("01", "02", "03")] == [1, 0, 0]


def test_vitals_name_what_throttles() -> None:
    fake = dual_4090()
    fake.gpus[1].throttle = pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonGpuIdle
    topology = discover(binding=fake)
    first, second = device_vitals(topology.devices, fake)
    assert first.throttled_by == ()
    assert second.throttled_by == ("power cap",)
    assert (second.watts, second.watts_limit, second.temperature_c) == (71.5, 450.0, 41)
    assert device_vitals(cpu_topology(1).devices) == ()


def test_a_broken_driver_says_so() -> None:
    broken = FakeNvml([], problem=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    assert read_gpus(broken).problem == "RM has detected an NVML/RM version mismatch."
    assert read_gpus(broken).gpus == ()


def test_what_the_driver_says_of_a_card() -> None:
    fake = dual_h100()
    fake.gpus[0].holders, fake.gpus[0].drawers = {7: 100, 8: 5}, {8: 20, 9: 30}
    fake.gpus[0].watts_limit, fake.gpus[0].watts_default = 500, 700
    fake.gpus[0].throttle = pynvml.nvmlClocksThrottleReasonSwPowerCap
    gpu = read_gpus(fake).gpus[0]
    assert dict(gpu.holders) == {7: 100 * MIB, 8: 20 * MIB, 9: 30 * MIB}
    assert (gpu.watts_limit, gpu.watts_limit_default, gpu.throttled_by) == (500, 700, ("power cap",))
    assert (gpu.nvlink_lanes, gpu.nvlink_lane_bytes_per_s, gpu.ecc) == (18, 26.562e9, True)
    assert (gpu.sm_clock_mhz, gpu.sm_clock_mhz_max, gpu.temperature_c) == (2520, 2520, 41)
    assert read_gpus(dual_4090()).gpus[0].nvlink_lane_bytes_per_s is None


def test_where_paths_meet_and_why_a_pair_has_no_peer_access() -> None:
    fake = dual_4090()
    fake.gpus[1].socket = 1
    report = read_gpus(fake)
    assert report.ancestors == {(0, 1): "across sockets"}
    assert report.refusals == {(0, 1): "chipset not supported"}
    assert report.peer_access == {(0, 1): False}
    assert read_gpus(dual_h100()).refusals == {}


def test_the_link_under_load_is_asked_of_one_card() -> None:
    fake = dual_4090()
    fake.gpus[1].pcie = (3, 4, 8, 16)
    assert read_pcie(fake.gpus[1].uuid, fake) == (3, 8)
    assert read_pcie("GPU-0", no_driver()) == (None, None)


def test_a_bridge_between_cards_that_nobody_knows_has_the_drivers_speed() -> None:
    bus = ["00000000:01:00.0", "00000000:02:00.0"]
    cards = [
        FakeGpu("NVIDIA Imaginary 1", 24564, own, nvlink=(other,) * 4, lane_mb_per_s=14062)
        for own, other in (bus, bus[::-1])
    ]
    link = discover(binding=FakeNvml(cards)).link(0, 1)
    assert link.bytes_per_s == pytest.approx(0.62 * 4 * 14.062e9)


class FakeRocm:
    """What cluster.rocm asks of a ROCm build of torch, which names AMD's cards as CUDA ones."""

    version = SimpleNamespace(hip="6.4.43482")

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count

    @property
    def cuda(self) -> FakeRocm:
        return self

    def device_count(self) -> int:
        return self.count

    def can_device_access_peer(self, a: int, b: int) -> bool:
        return self.name.startswith("AMD Instinct")

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 190 << 30, 191 << 30

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(
            name=self.name, uuid=f"ab{index}", pci_domain_id=0, pci_bus_id=0xC1 + index, pci_device_id=0
        )


def test_amds_cards_are_found_through_torch() -> None:
    report = rocm.read_gpus(FakeRocm("AMD Instinct MI300X", 2))
    topology = gpu_topology(report, report.gpus)
    assert topology.name == "2 × AMD Instinct MI300X"
    first, second = topology.devices
    assert (first.uuid, second.pci) == ("GPU-ab0", "0000:c2:00.0")
    assert (first.memory_bytes, first.free_bytes) == (191 << 30, 190 << 30)
    assert first.bandwidth_bytes_per_s == 5300e9
    assert topology.link(0, 1).kind is LinkKind.NVLINK, "its Infinity Fabric"
    desktop = rocm.read_gpus(FakeRocm("AMD Radeon RX 7900 XTX", 2))
    assert gpu_topology(desktop, desktop.gpus).link(0, 1).kind is LinkKind.HOST
    assert rocm.read_gpus(FakeRocm("", 0)).problem == "torch sees no ROCm device"


def test_what_torch_was_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('importing torch takes seconds')")
    monkeypatch.syspath_prepend(tmp_path)
    for cuda, hip in ((None, "6.4.43482-0f2d60242"), ("13.0", None), (None, None)):
        text = f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = {hip!r}\n"
        (tmp_path / "torch" / "version.py").write_text(text)
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")),
        )
        assert rocm.torch_build() == (cuda, hip)
