"""What may be wrong with each GPU by itself: each check is a pure function of MachineFacts."""

from __future__ import annotations

from collections.abc import Iterator

from cluster import catalog
from cluster.nvml import Gpu
from cluster.pci import gb_per_s
from cluster.profile import MachineProfile
from launch.findings import (
    GB,
    Check,
    Finding,
    MachineFacts,
    Severity,
    info,
    listed,
    title,
    warning,
)

HELD_SHARE = 0.1  # of a GPU's memory, held by others before it is worth a word
LEAST_FREE_GPU_BYTES = 1_500_000_000  # a CUDA context, NCCL's buffers and workspaces
LOW_LIMIT = 0.9  # of the power that the maker allows
SLOW_MEMORY = 0.75  # of the data sheet's bandwidth; a sum reads 90 % and more of it where all is well
SLOW_COPY = 0.65
"""Of the slot's raw rate, for one GPU alone from pinned memory. Sound slots gave 0.76 to 0.89: 24 to 26 of 31.5 GB/s,
56 of 63."""
SHARED_COPY = 0.6  # of what each does alone, while all copy to their GPUs and back
HOT = ("software thermal", "hardware thermal", "hardware slowdown", "power brake")


def check_slots(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        now, most = gpu.pcie_lanes, gpu.pcie_lanes_max
        if now and most and now < most:
            yield warning(
                title(gpu),
                f"x{now} of x{most} PCIe lanes: {now / most:.0%} of its bandwidth to host and other cards",
                "use a full slot, or see what shares its lanes; tensor parallelism suffers, replicas do not",
            )


def check_generations(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        sheet = catalog.find(gpu.name)
        most = gpu.pcie_generation_max
        if sheet and most and most < sheet.pcie_generation:
            yield warning(
                title(gpu),
                f"PCIe {most} slot, the card has PCIe {sheet.pcie_generation}: "
                f"{2.0 ** (most - sheet.pcie_generation):.0%} of its bandwidth to host and other cards",
                "check the slot, a riser's cable and the BIOS's setting; the planner prices what is there",
            )
        elif most and gpu.pcie_generation and gpu.pcie_generation < most:
            yield info(
                title(gpu),
                f"link at PCIe {gpu.pcie_generation} now, {most} at most: an idle card lowers it",
                "nothing, unless it stays so under load",
            )


def check_path_to_the_host(facts: MachineFacts) -> Iterator[Finding]:
    """A full-width slot may hang on a chipset or a switch that has four lanes for all."""
    for gpu in facts.gpus:
        slot = facts.slots.get(gpu.pci)
        if slot is None or not slot.hops:
            continue
        own, above = slot.hops[-1], slot.narrowest
        if above is not None:
            yield warning(
                title(gpu),
                f"PCIe {own.generation} x{own.lanes} behind {above.address}, which has PCIe {above.generation} "
                f"x{above.lanes} to the host: {above.gb_per_s / own.gb_per_s:.0%} of its bandwidth, shared",
                "move it to a slot of the processor's own: the board's manual says which",
            )
        elif slot.chipset:
            yield warning(
                title(gpu),
                f"in a slot of the chipset (PCIe {own.generation} x{own.lanes}), which shares four lanes or eight to "
                "the processor with disks and network",
                "move it to a slot of the processor's own: the board's manual says which",
            )


def check_copies(facts: MachineFacts) -> Iterator[Finding]:
    """What was measured of the way to the host, beside what the slot should give."""
    if facts.measured is None:
        return
    for index, (gpu, detail) in enumerate(zip(facts.gpus, facts.measured.details, strict=False)):
        alone, together = (_to_device(facts, index, at_once) for at_once in (False, True))
        generation, lanes = gpu.pcie_generation_max, gpu.pcie_lanes
        if alone is None or not generation or not lanes:
            continue
        slot = gb_per_s(generation, lanes)
        under_load = detail.pcie_generation
        if under_load and under_load < generation:
            yield warning(
                title(gpu),
                f"link at PCIe {under_load} of {generation} also while it copied: {alone / GB:.1f} GB/s from the host",
                "see PCIe errors in dmesg; a riser's cable, the BIOS's setting or ASPM (pcie_aspm=off) holds it down",
            )
        elif alone / GB < SLOW_COPY * slot:
            yield warning(
                title(gpu),
                f"{alone / GB:.1f} GB/s from pinned memory, of {slot:.0f} that PCIe {generation} x{lanes} has",
                _why_slow(facts, gpu),
            )
        elif len(facts.gpus) > 1:
            yield from _shared(facts.measured, title(gpu), index, alone, together)


def _shared(
    measured: MachineProfile, subject: str, device: int, alone: float, together: float | None
) -> Iterator[Finding]:
    """A way to the host that GPUs have in common: pulls where they were timed, which is how offloaded weights come."""
    what = "copy both ways"
    for pull in measured.host_pulls:
        if pull.device == device:
            alone, together, what = pull.alone_bytes_per_s, pull.together_bytes_per_s, "pull"
    if together is not None and together < SHARED_COPY * alone:
        yield info(
            subject,
            f"{alone / GB:.1f} GB/s from the host alone, {together / GB:.1f} while all GPUs {what}",
            "nothing: they share a switch or the host's memory; the planner prices offloading by what they pull "
            "together",
        )


def _why_slow(facts: MachineFacts, gpu: Gpu) -> str:
    slot = facts.slots.get(gpu.pci)
    if slot is not None and slot.iommu.startswith("DMA"):
        return f"the IOMMU translates its addresses ({slot.iommu}): iommu=pt on the kernel's command line"
    return "see what shares its lanes (M.2 disks, a chipset), its NUMA node (numactl), and memory channels left empty"


def _to_device(facts: MachineFacts, device: int, together: bool) -> float | None:
    assert facts.measured is not None
    return next(
        (
            copy.bytes_per_s
            for copy in facts.measured.host_copies
            if (copy.device, copy.to_device, copy.pinned, copy.together) == (device, True, True, together)
        ),
        None,
    )


def check_memory_rate(facts: MachineFacts) -> Iterator[Finding]:
    if facts.measured is None:
        return
    for gpu, detail in zip(facts.gpus, facts.measured.details, strict=False):
        sheet = catalog.find(gpu.name)
        if sheet and detail.read_bytes_per_s < SLOW_MEMORY * sheet.bandwidth_bytes_per_s:
            share = detail.read_bytes_per_s / sheet.bandwidth_bytes_per_s
            yield warning(
                title(gpu),
                f"its memory reads {detail.read_bytes_per_s / GB:.0f} GB/s, {share:.0%} of the data sheet's",
                "see its clocks under load (nvidia-smi -q -d PERFORMANCE): heat, power or locked memory clocks",
            )


def check_gpu_memory(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        held = gpu.memory_bytes - gpu.free_bytes
        if held < HELD_SHARE * gpu.memory_bytes:
            continue
        holders = [
            f"{facts.processes.get(pid, 'process')} (pid {pid}) {n_bytes / GB:.1f} GB"
            for pid, n_bytes in gpu.holders
        ]
        who = ", ".join(holders) or "processes that this container cannot see"
        dead = [pid for pid, _ in gpu.holders if facts.processes.get(pid, "").startswith("ray::")]
        severity = Severity.ERROR if gpu.free_bytes < LEAST_FREE_GPU_BYTES else Severity.WARNING
        yield Finding(
            severity,
            title(gpu),
            f"{gpu.free_bytes / GB:.1f} of {gpu.memory_bytes / GB:.1f} GB free; held by {who}",
            f"kill {' '.join(map(str, dead))}, if no run of yours owns them: workers of Ray outlive it at times"
            if dead
            else "stop them, or hide this GPU with CUDA_VISIBLE_DEVICES; the planner fits what is free",
        )


def check_health(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        if gpu.uncorrected_ecc_errors:
            yield warning(
                title(gpu),
                f"{gpu.uncorrected_ecc_errors} uncorrected memory errors since boot: results may be wrong",
                "look for Xid messages in dmesg, reset the GPU, and replace it if they come back",
            )
        if gpu.mig:
            yield warning(
                title(gpu),
                "MIG is on: a process gets a slice, and NCCL cannot join slices",
                f"sudo nvidia-smi -i {gpu.index} -mig 0, or run one replica a slice",
            )
    lazy = [gpu.index for gpu in facts.gpus if gpu.persistent is False]
    if lazy:
        yield info(
            "persistence mode",
            f"off on GPU {listed(lazy)}: an idle driver unloads, and each start takes seconds longer",
            "sudo nvidia-smi -pm 1, or start nvidia-persistenced",
        )


def check_power(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        limit, default = gpu.watts_limit, gpu.watts_limit_default
        if limit and default and limit < LOW_LIMIT * default:
            yield info(
                title(gpu),
                f"held to {limit:.0f} of {default:.0f} W: prefill and large batches slow down, decode hardly",
                f"nothing, if that is meant; else sudo nvidia-smi -i {gpu.index} -pl {default:.0f}",
            )
        hot = [reason for reason in gpu.throttled_by if reason in HOT]
        if hot:
            at = "" if gpu.temperature_c is None else f" at {gpu.temperature_c} °C"
            clocks = f"{gpu.sm_clock_mhz} of {gpu.sm_clock_mhz_max} MHz"
            yield warning(
                title(gpu),
                f"slowed by {listed(hot)}{at}: {clocks}",
                "see fans, airflow and the power supply's cables; figures measured now do not count",
            )


CHECKS: tuple[Check, ...] = (
    check_gpu_memory,
    check_health,
    check_power,
    check_slots,
    check_generations,
    check_path_to_the_host,
    check_copies,
    check_memory_rate,
)
