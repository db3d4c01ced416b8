"""A fake of the pynvml module: injected machines for cluster.nvml and what is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml


@dataclass
class FakeGpu:
    name: str
    memory_mib: int
    pci: str = "00000000:01:00.0"
    used_mib: int = 400
    holders: Mapping[int, int] = field(default_factory=dict)  # pid -> MiB
    pcie: tuple[int, int, int, int] = (4, 4, 16, 16)  # generation now and at most, lanes now and at most
    nvlink: tuple[str, ...] = ()  # for each lane: "switch", "down", or the neighbour's PCI address
    mig: bool | None = None
    persistent: bool = True
    ecc_errors: int | None = None
    memory_clock_mhz: int = 10501
    bus_bits: int = 384
    sm_clock_mhz: int = 2520
    cores: int = 16384
    throttle: int = 0
    drawers: Mapping[int, int] = field(default_factory=dict)  # pid -> MiB of a desktop's processes
    watts_limit: int = 450
    watts_default: int = 450
    lane_mb_per_s: int = 26562
    socket: int = 0
    watts: float = 71.5
    joules: float | None = None  # None: the card does not count

    @property
    def uuid(self) -> str:
        return f"GPU-{self.pci}"


class FakeNvml:
    """Answers what cluster.nvml asks; raises NVMLError_NotSupported where the card would."""

    NVMLError = pynvml.NVMLError
    NVML_FEATURE_ENABLED = pynvml.NVML_FEATURE_ENABLED
    NVML_DEVICE_MIG_ENABLE = pynvml.NVML_DEVICE_MIG_ENABLE
    NVML_NVLINK_DEVICE_TYPE_SWITCH = pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
    NVML_P2P_STATUS_OK = pynvml.NVML_P2P_STATUS_OK
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_CLOCK_MEM = pynvml.NVML_CLOCK_MEM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    NVML_VOLATILE_ECC = pynvml.NVML_VOLATILE_ECC
    NVML_SUCCESS = pynvml.NVML_SUCCESS
    NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON = pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON

    def __init__(
        self,
        gpus: list[FakeGpu],
        peer_access: bool = True,
        problem: int | None = None,
        refusal: int = pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED,
    ) -> None:
        """`problem` is the NVML error code with which nvmlInit fails; `refusal` why there is no peer access."""
        self.gpus, self.peer_access, self.problem, self.refusal = gpus, peer_access, problem, refusal
        self.sessions = 0

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's names
        if self.problem is not None:
            raise pynvml.NVMLError(self.problem)
        self.sessions += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.sessions -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:  # noqa: N802
        return next(gpu for gpu in self.gpus if gpu.uuid == uuid)

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, lane: int) -> int:  # noqa: N802
        if lane >= len(gpu.nvlink):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return int(gpu.nvlink[lane] != "down")

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu: FakeGpu, lane: int) -> int:  # noqa: N802
        is_switch = gpu.nvlink[lane] == "switch"
        return pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH if is_switch else pynvml.NVML_NVLINK_DEVICE_TYPE_GPU

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: FakeGpu, lane: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=gpu.nvlink[lane].encode())

    def nvmlDeviceGetP2PStatus(self, a: FakeGpu, b: FakeGpu, capability: int) -> int:  # noqa: N802
        joined = ("switch" in a.nvlink and "switch" in b.nvlink) or b.pci in a.nvlink
        assert isinstance(capability, int), "ctypes takes no tuple"
        answer = joined if capability == pynvml.NVML_P2P_CAPS_INDEX_NVLINK else self.peer_access or joined
        return pynvml.NVML_P2P_STATUS_OK if answer else self.refusal

    def nvmlDeviceGetTopologyCommonAncestor(self, a: FakeGpu, b: FakeGpu) -> int:  # noqa: N802
        return pynvml.NVML_TOPOLOGY_NODE if a.socket == b.socket else pynvml.NVML_TOPOLOGY_SYSTEM

    def nvmlDeviceGetFieldValues(self, gpu: FakeGpu, fields: list[int]) -> list[Any]:  # noqa: N802
        assert fields == [self.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=gpu.lane_mb_per_s))]

    def nvmlDeviceGetEccMode(self, gpu: FakeGpu) -> list[int]:  # noqa: N802
        self._supported(gpu.ecc_errors)
        return [1, 1]

    def nvmlDeviceGetTotalEccErrors(self, gpu: FakeGpu, error: int, counter: int) -> int:  # noqa: N802
        return self._supported(gpu.ecc_errors)

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:  # noqa: N802
        return [int(self._supported(gpu.mig)), 0]

    def nvmlDeviceGetClockInfo(self, gpu: FakeGpu, clock: int) -> int:  # noqa: N802
        return gpu.sm_clock_mhz if clock == self.NVML_CLOCK_SM else gpu.memory_clock_mhz

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo

    def _supported(self, value: Any) -> Any:
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def __getattr__(self, name: str) -> Any:
        """The questions whose answer is one field of the card."""
        simple = {
            "nvmlDeviceGetCount": lambda: len(self.gpus),
            "nvmlDeviceGetHandleByIndex": lambda i: self.gpus[i],
            "nvmlSystemGetDriverVersion": lambda: b"550.54.14",
            "nvmlSystemGetCudaDriverVersion": lambda: 12040,
            "nvmlDeviceGetName": lambda gpu: gpu.name,
            "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
            "nvmlDeviceGetPciInfo": lambda gpu: SimpleNamespace(busId=gpu.pci.encode()),
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(
                total=gpu.memory_mib * 2**20, free=(gpu.memory_mib - gpu.used_mib) * 2**20
            ),
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [
                SimpleNamespace(pid=pid, usedGpuMemory=mib * 2**20) for pid, mib in gpu.holders.items()
            ],
            "nvmlDeviceGetGraphicsRunningProcesses": lambda gpu: [
                SimpleNamespace(pid=pid, usedGpuMemory=mib * 2**20) for pid, mib in gpu.drawers.items()
            ],
            "nvmlDeviceGetPowerManagementDefaultLimit": lambda gpu: gpu.watts_default * 1000,
            "nvmlDeviceGetCurrPcieLinkGeneration": lambda gpu: gpu.pcie[0],
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda gpu: gpu.pcie[1],
            "nvmlDeviceGetCurrPcieLinkWidth": lambda gpu: gpu.pcie[2],
            "nvmlDeviceGetMaxPcieLinkWidth": lambda gpu: gpu.pcie[3],
            "nvmlDeviceGetPersistenceMode": lambda gpu: int(gpu.persistent),
            "nvmlDeviceGetMemoryBusWidth": lambda gpu: gpu.bus_bits,
            "nvmlDeviceGetNumGpuCores": lambda gpu: gpu.cores,
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 41,
            "nvmlDeviceGetPowerUsage": lambda gpu: int(gpu.watts * 1000),
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: int(self._supported(gpu.joules) * 1000),
            "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: gpu.watts_limit * 1000,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: gpu.throttle,
        }
        if name not in simple:
            raise AttributeError(name)
        return simple[name]


def dual_4090() -> FakeNvml:
    return FakeNvml(
        [FakeGpu("NVIDIA GeForce RTX 4090", 24564, f"00000000:{bus}:00.0") for bus in ("01", "02")],
        peer_access=False,
    )


def dual_h100() -> FakeNvml:
    """Two H100 SXM joined by 18 lanes through a switch."""
    return FakeNvml(
        [
            FakeGpu(
                "NVIDIA H100 80GB HBM3",
                81559,
                f"00000000:{bus}:00.0",
                pcie=(5, 5, 16, 16),
                nvlink=("switch",) * 18,
                mig=False,
                ecc_errors=0,
            )
            for bus in ("1B", "43")
        ]
    )


def no_driver() -> FakeNvml:
    return FakeNvml([], problem=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
