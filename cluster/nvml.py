"""What the NVIDIA driver says of the GPUs here, through NVML: the one module that imports pynvml.

Every question may go unanswered (old cards, containers, virtual GPUs): such a fact is None, never a guess.
The binding is handed in by tests (tests/fake_nvml.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Binding: TypeAlias = Any
"""The pynvml module, which has no types, or its fake."""

_MOST_LANES = 18
"""NVLink lanes to ask about: an H100 or B200 has 18, the most of any card so far."""

# nvml.h. The binding has the first one as a tuple, by a comma too many, and its own call then refuses it.
_P2P_READ = 0
_P2P_NVLINK = 2

_P2P_REFUSALS = {
    1: "chipset not supported",
    2: "GPU not supported",
    3: "topology not supported",
    4: "disabled by a registry key",
    5: "not supported",
}
"""nvmlGpuP2PStatus_t (nvml.h)."""

_ANCESTORS = {
    0: "same board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "host bridge",
    40: "same NUMA node",
    50: "across sockets",
}
"""nvmlGpuTopologyLevel_t (nvml.h): nvidia-smi's PIX, PXB, PHB, NODE and SYS after the first."""

_THROTTLE = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal",
    0x040: "hardware thermal",
    0x080: "power brake",
    0x100: "display clocks",
}
"""Bits of nvmlClocksEventReasons (nvml.h). Idle (0x1) and clocks that a user set (0x2) are no throttling."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver sees it. None: the driver did not say."""

    index: int  # NVML's own order: by PCI address
    name: str
    uuid: str
    pci: str  # 0000:01:00.0
    memory_bytes: int
    free_bytes: int
    holders: tuple[tuple[int, int], ...] = ()  # (pid, bytes) of processes that compute on it
    pcie_generation: int | None = None  # now: an idle card lowers it
    pcie_generation_max: int | None = None  # of card and slot together
    pcie_lanes: int | None = None
    pcie_lanes_max: int | None = None  # of the card
    nvlink_lanes: int = 0  # active
    nvlink_lanes_down: int = 0
    nvlink_lanes_to: Mapping[str, int] = field(default_factory=dict)  # PCI address -> lanes, without a switch
    nvlink_switched: bool = False
    nvlink_lane_bytes_per_s: float | None = None  # one lane, one direction, before encoding
    sm_clock_mhz: int | None = None
    sm_clock_mhz_max: int | None = None
    memory_clock_mhz_max: int | None = None
    temperature_c: int | None = None
    watts_limit: float | None = None
    watts_limit_default: float | None = None
    throttled_by: tuple[str, ...] = ()
    ecc: bool | None = None
    mig: bool | None = None
    persistent: bool | None = None
    uncorrected_ecc_errors: int | None = None
    memory_bytes_per_s: float | None = None  # clock × width, for cards that the catalogue lacks
    float32_flops_per_s: float | None = None  # cores × clock × 2, for the same


@dataclass(frozen=True, slots=True)
class GpuReport:
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""  # "550.54.14"; empty without one
    cuda: tuple[int, int] = (0, 0)  # the newest CUDA that the driver runs
    peer_access: Mapping[tuple[int, int], bool] = field(default_factory=dict)  # (low, high), where known
    refusals: Mapping[tuple[int, int], str] = field(default_factory=dict)  # pairs without peer access -> why
    ancestors: Mapping[tuple[int, int], str] = field(default_factory=dict)  # what their PCIe paths meet at
    nvlink: frozenset[tuple[int, int]] = frozenset()  # pairs joined by NVLink, directly or through a switch
    problem: str = ""  # why NVML did not start


@dataclass(frozen=True, slots=True)
class Vitals:
    """A GPU's state at one moment, to judge a measurement by. None: the driver did not say."""

    uuid: str
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    watts: float | None
    watts_limit: float | None
    throttled_by: tuple[str, ...] = ()
    joules: float | None = None  # since the driver was loaded; cards before Volta do not count them


def read_gpus(binding: Binding = None) -> GpuReport:
    """All GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says.

    Without a driver: no GPUs, and the problem.
    """
    nvml = _pynvml() if binding is None else binding
    try:
        with _session(nvml):
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            cuda = _ask(nvml, "nvmlSystemGetCudaDriverVersion") or 0
            peers = dict(_pairs(nvml, handles, _P2P_READ))
            return GpuReport(
                gpus=tuple(_gpu(nvml, i, handle) for i, handle in enumerate(handles)),
                driver=_text(_ask(nvml, "nvmlSystemGetDriverVersion") or ""),
                cuda=(cuda // 1000, cuda % 1000 // 10),
                peer_access={pair: reason is None for pair, reason in peers.items()},
                refusals={pair: reason for pair, reason in peers.items() if reason is not None},
                ancestors=dict(_ancestors(nvml, handles)),
                nvlink=frozenset(p for p, reason in _pairs(nvml, handles, _P2P_NVLINK) if reason is None),
            )
    except nvml.NVMLError as error:
        return GpuReport(problem=str(error))


def read_vitals(uuids: Sequence[str], binding: Binding = None) -> tuple[Vitals, ...]:
    """The state now of the GPUs with these UUIDs, in that order; empty where NVML does not start."""
    nvml = _pynvml() if binding is None else binding
    try:
        with _session(nvml):
            return tuple(_vitals(nvml, uuid, nvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids)
    except nvml.NVMLError:
        return ()


@contextmanager
def memory_watch(indices: Sequence[int], binding: Binding = None) -> Iterator[Callable[[], tuple[int, ...]]]:
    """A question to ask often: the bytes that are held on each of these GPUs, one call of the driver a GPU.

    Empty where NVML does not start; GPUs that are not there are left out.
    """
    nvml = _pynvml() if binding is None else binding
    with ExitStack() as open_session:
        handles: list[Any] = []
        with suppress(nvml.NVMLError):
            open_session.enter_context(_session(nvml))
            count = nvml.nvmlDeviceGetCount()
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in indices if i < count]

        def held() -> tuple[int, ...]:
            answers = (_ask(nvml, "nvmlDeviceGetMemoryInfo", handle) for handle in handles)
            return tuple(int(memory.total - memory.free) for memory in answers if memory is not None)

        yield held


def read_pcie(uuid: str, binding: Binding = None) -> tuple[int | None, int | None]:
    """(generation, lanes) of a GPU's link at this moment."""
    nvml = _pynvml() if binding is None else binding
    try:
        with _session(nvml):
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            names = ("nvmlDeviceGetCurrPcieLinkGeneration", "nvmlDeviceGetCurrPcieLinkWidth")
            generation, lanes = (_ask(nvml, name, handle) for name in names)
            return generation, lanes
    except nvml.NVMLError:
        return None, None


def _pynvml() -> Binding:
    import pynvml

    return pynvml


@contextmanager
def _session(nvml: Binding) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _ask(nvml: Binding, name: str, *args: Any) -> Any:
    """The driver's answer, or None: not supported, not permitted, or too old to know the question."""
    try:
        return getattr(nvml, name)(*args)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    """Old bindings answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _gpu(nvml: Binding, index: int, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    processes = _processes(nvml, handle)
    mig = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    ecc = _ask(nvml, "nvmlDeviceGetEccMode", handle)
    persistent = _ask(nvml, "nvmlDeviceGetPersistenceMode", handle)
    active, down, lanes_to, switched = _nvlink(nvml, handle)
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        pci=_pci(nvml.nvmlDeviceGetPciInfo(handle)),
        memory_bytes=int(memory.total),
        free_bytes=int(memory.free),
        holders=processes,
        pcie_generation=_ask(nvml, "nvmlDeviceGetCurrPcieLinkGeneration", handle),
        pcie_generation_max=_ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_lanes=_ask(nvml, "nvmlDeviceGetCurrPcieLinkWidth", handle),
        pcie_lanes_max=_ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle),
        nvlink_lanes=active,
        nvlink_lanes_down=down,
        nvlink_lanes_to=lanes_to,
        nvlink_switched=switched,
        mig=None if mig is None else mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        persistent=None if persistent is None else bool(persistent),
        uncorrected_ecc_errors=_ask(
            nvml,
            "nvmlDeviceGetTotalEccErrors",
            handle,
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        ),
        nvlink_lane_bytes_per_s=_lane_bytes_per_s(nvml, handle) if active else None,
        sm_clock_mhz=_ask(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        sm_clock_mhz_max=_ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM),
        memory_clock_mhz_max=_ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_MEM),
        temperature_c=_ask(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        watts_limit=_thousandths(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle),
        watts_limit_default=_thousandths(nvml, "nvmlDeviceGetPowerManagementDefaultLimit", handle),
        throttled_by=_throttled_by(nvml, handle),
        ecc=None if ecc is None else ecc[0] == nvml.NVML_FEATURE_ENABLED,
        memory_bytes_per_s=_memory_bytes_per_s(nvml, handle),
        float32_flops_per_s=_float32_flops_per_s(nvml, handle),
    )


def _pci(info: Any) -> str:
    """`00000000:01:00.0` of NVML → `0000:01:00.0`, as the kernel writes it."""
    domain, _, rest = _text(info.busId).lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _nvlink(nvml: Binding, handle: Any) -> tuple[int, int, dict[str, int], bool]:
    """Lanes active, lanes down, active lanes by the neighbour's PCI address, and if there is a switch."""
    active = down = 0
    lanes_to: dict[str, int] = {}
    switched = False
    for lane in range(_MOST_LANES):
        state = _ask(nvml, "nvmlDeviceGetNvLinkState", handle, lane)
        if state is None:  # no such lane, or no NVLink at all
            break
        if state != nvml.NVML_FEATURE_ENABLED:
            down += 1
            continue
        active += 1
        kind = _ask(nvml, "nvmlDeviceGetNvLinkRemoteDeviceType", handle, lane)
        if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            switched = True
        elif (remote := _ask(nvml, "nvmlDeviceGetNvLinkRemotePciInfo", handle, lane)) is not None:
            lanes_to[_pci(remote)] = lanes_to.get(_pci(remote), 0) + 1
    return active, down, lanes_to, switched


def _memory_bytes_per_s(nvml: Binding, handle: Any) -> float | None:
    """Two transfers a clock over the bus: 10501 MHz × 384 bits gives the 1008 GB/s of an RTX 4090's sheet."""
    clock_mhz = _ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_MEM)
    width_bits = _ask(nvml, "nvmlDeviceGetMemoryBusWidth", handle)
    return 2 * clock_mhz * 1e6 * width_bits / 8 if clock_mhz and width_bits else None


def _float32_flops_per_s(nvml: Binding, handle: Any) -> float | None:
    """A multiplication and an addition a core and clock."""
    clock_mhz = _ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM)
    cores = _ask(nvml, "nvmlDeviceGetNumGpuCores", handle)
    return 2 * cores * clock_mhz * 1e6 if clock_mhz and cores else None


def _processes(nvml: Binding, handle: Any) -> tuple[tuple[int, int], ...]:
    """(pid, bytes) of those that compute or draw on it; one that does both counts once, with the more bytes."""
    found: dict[int, int] = {}
    for kind in ("Compute", "Graphics"):
        for process in _ask(nvml, f"nvmlDeviceGet{kind}RunningProcesses", handle) or []:
            found[process.pid] = max(found.get(process.pid, 0), process.usedGpuMemory or 0)
    return tuple(found.items())


def _lane_bytes_per_s(nvml: Binding, handle: Any) -> float | None:
    """As nvidia-smi nvlink -s prints it: 26.562 GB/s of an H100, 14.062 of an RTX 3090."""
    values = _ask(nvml, "nvmlDeviceGetFieldValues", handle, [nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON])
    if not values or values[0].nvmlReturn != nvml.NVML_SUCCESS or not values[0].value.uiVal:
        return None
    return float(values[0].value.uiVal) * 1e6


def _thousandths(nvml: Binding, name: str, handle: Any) -> float | None:
    """Of what the driver tells in thousandths."""
    milliwatts = _ask(nvml, name, handle)
    return None if milliwatts is None else milliwatts / 1000


def _throttled_by(nvml: Binding, handle: Any) -> tuple[str, ...]:
    reasons = _ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
    return tuple(name for bit, name in _THROTTLE.items() if reasons & bit)


def _pairs(
    nvml: Binding, handles: Sequence[Any], capability: int
) -> Iterator[tuple[tuple[int, int], str | None]]:
    """For each pair of GPUs that the driver answers for, why it lacks `capability`; None: it has it."""
    for (i, a), (j, b) in itertools.combinations(enumerate(handles), 2):
        status = _ask(nvml, "nvmlDeviceGetP2PStatus", a, b, capability)
        if status is not None:
            granted = status == nvml.NVML_P2P_STATUS_OK
            yield (i, j), None if granted else _P2P_REFUSALS.get(status, "for a reason it does not tell")


def _ancestors(nvml: Binding, handles: Sequence[Any]) -> Iterator[tuple[tuple[int, int], str]]:
    for (i, a), (j, b) in itertools.combinations(enumerate(handles), 2):
        level = _ask(nvml, "nvmlDeviceGetTopologyCommonAncestor", a, b)
        if level in _ANCESTORS:
            yield (i, j), _ANCESTORS[level]


def _vitals(nvml: Binding, uuid: str, handle: Any) -> Vitals:
    return Vitals(
        uuid=uuid,
        sm_clock_mhz=_ask(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
        memory_clock_mhz=_ask(nvml, "nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM),
        temperature_c=_ask(nvml, "nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
        watts=_thousandths(nvml, "nvmlDeviceGetPowerUsage", handle),
        watts_limit=_thousandths(nvml, "nvmlDeviceGetEnforcedPowerLimit", handle),
        throttled_by=_throttled_by(nvml, handle),
        joules=_thousandths(nvml, "nvmlDeviceGetTotalEnergyConsumption", handle),  # told in mJ
    )
