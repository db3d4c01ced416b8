"""What may be wrong with a machine: each check is a pure function of MachineFacts.

An `error` stops a launch, a `warning` costs speed or safety, `info` tells what the planner does about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster import catalog
from cluster.discover import Cpu, visible_gpus
from cluster.nvml import Gpu, GpuReport

GB = 1e9
LEAST_TORCH = (2, 11)  # pyproject.toml
DOCKER_SHM_BYTES = 64 << 20  # Docker's default for /dev/shm, in which NCCL's buffers of two GPUs do not fit
ROOMY_SHM_BYTES = 1_000_000_000  # what NCCL's documentation advises for containers (--shm-size=1g)
LEAST_FREE_MEMORY_BYTES = 2_000_000_000  # Ray's daemons and one process with torch loaded
LEAST_FREE_DISK_BYTES = 2_000_000_000
FULL_DISK = 0.95  # Ray refuses to spill objects to a fuller one
HELD_SHARE = 0.1  # of a GPU's memory, held by others before it is worth a word
LEAST_FREE_GPU_BYTES = 1_500_000_000  # a CUDA context, NCCL's buffers and workspaces


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    subject: str
    evidence: str
    fix: str


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file or directory of a run that is no more."""

    path: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """All that the checks look at."""

    cpu: Cpu
    report: GpuReport = field(default_factory=GpuReport)
    driver_loaded: bool = False  # the kernel module, whatever NVML says
    versions: Mapping[str, str | None] = field(
        default_factory=dict
    )  # distribution -> version; None: not installed
    torch_cuda: str | None = None  # that torch was built for; None: a CPU build
    processes: Mapping[int, str] = field(
        default_factory=dict
    )  # names of those that hold GPU memory, where known
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    peer_access: bool = True  # False: NCCL_P2P_DISABLE=1
    shm_bytes: int | None = None  # free in /dev/shm; None where there is none
    disk_path: str = "/tmp"
    disk_bytes: int = 1 << 40
    disk_free_bytes: int = 1 << 39
    leftovers: tuple[Leftover, ...] = ()
    ray_auth_mode: str | None = None  # RAY_AUTH_MODE
    ray_token_mode: int | None = None  # permission bits of Ray's token file; None where there is none
    ray_token_path: str = "~/.ray/auth_token"

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Those that a launch would use."""
        return visible_gpus(self.report.gpus, self.visible)


Check = Callable[[MachineFacts], Iterator[Finding]]


def findings(facts: MachineFacts) -> list[Finding]:
    """All of them, errors first."""
    order = list(Severity)
    return sorted(
        (found for check in CHECKS for found in check(facts)), key=lambda f: order.index(f.severity)
    )


def error(subject: str, evidence: str, fix: str) -> Finding:
    return Finding(Severity.ERROR, subject, evidence, fix)


def warning(subject: str, evidence: str, fix: str) -> Finding:
    return Finding(Severity.WARNING, subject, evidence, fix)


def info(subject: str, evidence: str, fix: str) -> Finding:
    return Finding(Severity.INFO, subject, evidence, fix)


# --- driver and packages ------------------------------------------------------------------------------------


def check_driver(facts: MachineFacts) -> Iterator[Finding]:
    report = facts.report
    if report.problem and facts.driver_loaded:
        yield error(
            "NVIDIA driver",
            f"its kernel module is loaded, but NVML does not start: {report.problem}",
            "after an update of the driver reboot, or reload the module; start a container with --gpus all",
        )
    elif not report.gpus:
        yield info(
            "NVIDIA driver",
            f"no GPU: {report.problem or 'the driver lists none'}",
            "nothing, to run on the CPU; for a GPU install NVIDIA's driver and see that nvidia-smi lists it",
        )
    elif not facts.gpus:
        yield warning(
            "CUDA_VISIBLE_DEVICES",
            f"{facts.visible!r} hides all {len(report.gpus)} GPUs",
            "unset it, or name GPUs by nvidia-smi's index",
        )


def check_torch(facts: MachineFacts) -> Iterator[Finding]:
    torch = facts.versions.get("torch")
    if torch is None:
        yield error("torch", "not installed", "pip install shardwise")
        return
    release = tuple(int(part) for part in torch.split("+")[0].split(".")[:2])
    if release < LEAST_TORCH:
        least = ".".join(map(str, LEAST_TORCH))
        yield error("torch", f"{torch} is older than {least}", f"pip install 'torch>={least}'")
    if not facts.report.gpus:
        return
    driver_cuda = ".".join(map(str, facts.report.cuda))
    if facts.torch_cuda is None:
        yield error(
            "torch",
            f"{torch} is a CPU build, beside {len(facts.report.gpus)} GPUs: --device cuda cannot start",
            f"install a CUDA build that driver {facts.report.driver} runs (up to CUDA {driver_cuda}): "
            f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu{_index(facts)}",
        )
    elif int(facts.torch_cuda.split(".")[0]) > facts.report.cuda[0]:
        yield error(
            "NVIDIA driver",
            f"{facts.report.driver} runs CUDA up to {driver_cuda}; torch {torch} needs {facts.torch_cuda}",
            f"update the driver, or install a torch that is built for CUDA {facts.report.cuda[0]}",
        )


def _index(facts: MachineFacts) -> str:
    """Of the CUDA builds that PyTorch publishes, the newest that the driver's major version runs."""
    return {11: "118", 12: "126"}.get(facts.report.cuda[0], "130")


def check_packages(facts: MachineFacts) -> Iterator[Finding]:
    for name in ("ray", "transformers", "safetensors"):
        if facts.versions.get(name, "") is None:
            yield error(name, "not installed", "pip install shardwise")
    if facts.versions.get("deepspeed", "") is None:
        yield warning(
            "deepspeed",
            "not installed: models that the engine does not know cannot be split",
            "pip install deepspeed",
        )


def check_ray_token(facts: MachineFacts) -> Iterator[Finding]:
    if facts.ray_token_mode is not None and facts.ray_token_mode & 0o077:
        yield warning(
            "Ray's token",
            f"{facts.ray_token_path} has mode {facts.ray_token_mode:04o}: others can read it and join",
            f"chmod 600 {facts.ray_token_path}",
        )


# --- each GPU -----------------------------------------------------------------------------------------------


def check_slots(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        now, most = gpu.pcie_lanes, gpu.pcie_lanes_max
        if now and most and now < most:
            yield warning(
                _title(gpu),
                f"x{now} of x{most} PCIe lanes: {now / most:.0%} of its bandwidth to host and other cards",
                "use a full slot, or see what shares its lanes; tensor parallelism suffers, replicas do not",
            )


def check_generations(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        sheet = catalog.find(gpu.name)
        most = gpu.pcie_generation_max
        if sheet and most and most < sheet.pcie_generation:
            yield warning(
                _title(gpu),
                f"PCIe {most} slot, the card has PCIe {sheet.pcie_generation}: "
                f"{2.0 ** (most - sheet.pcie_generation):.0%} of its bandwidth to host and other cards",
                "check the slot, a riser's cable and the BIOS's setting; the planner prices what is there",
            )
        elif most and gpu.pcie_generation and gpu.pcie_generation < most:
            yield info(
                _title(gpu),
                f"link at PCIe {gpu.pcie_generation} now, {most} at most: an idle card lowers it",
                "nothing, unless it stays so under load",
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
        severity = Severity.ERROR if gpu.free_bytes < LEAST_FREE_GPU_BYTES else Severity.WARNING
        yield Finding(
            severity,
            _title(gpu),
            f"{gpu.free_bytes / GB:.1f} of {gpu.memory_bytes / GB:.1f} GB free; held by {who}",
            "stop them, or hide this GPU with CUDA_VISIBLE_DEVICES; the planner fits what is free",
        )


def check_health(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        if gpu.uncorrected_ecc_errors:
            yield warning(
                _title(gpu),
                f"{gpu.uncorrected_ecc_errors} uncorrected memory errors since boot: results may be wrong",
                "look for Xid messages in dmesg, reset the GPU, and replace it if they come back",
            )
        if gpu.mig:
            yield warning(
                _title(gpu),
                "MIG is on: a process gets a slice, and NCCL cannot join slices",
                f"sudo nvidia-smi -i {gpu.index} -mig 0, or run one replica a slice",
            )
    lazy = [gpu.index for gpu in facts.gpus if gpu.persistent is False]
    if lazy:
        yield info(
            "persistence mode",
            f"off on GPU {_list(lazy)}: an idle driver unloads, and each start takes seconds longer",
            "sudo nvidia-smi -pm 1, or start nvidia-persistenced",
        )


# --- GPUs together ------------------------------------------------------------------------------------------


def check_nvlink_lanes(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        if gpu.nvlink_lanes and gpu.nvlink_lanes_down:
            lanes = gpu.nvlink_lanes + gpu.nvlink_lanes_down
            yield warning(
                _title(gpu),
                f"{gpu.nvlink_lanes} of {lanes} NVLink lanes up: {gpu.nvlink_lanes / lanes:.0%} of its rate",
                "see nvidia-smi nvlink -s, dmesg and the fabric manager's log; reseat a bridge",
            )


def check_peer_access(facts: MachineFacts) -> Iterator[Finding]:
    pairs = [(a, b) for a, b in itertools.combinations(sorted(g.index for g in facts.gpus), 2)]
    without = [pair for pair in pairs if facts.report.peer_access.get(pair) is False]
    if without:
        shown = _list([f"{a}-{b}" for a, b in without[:6]]) + (", …" if len(without) > 6 else "")
        yield info(
            "peer access",
            f"none between GPU {shown}: all traffic goes through host memory (NCCL's SHM transport)",
            "nothing on GeForce: the planner prices it; on other cards see ACS and the IOMMU",
        )
    if not facts.peer_access and len(without) < len(pairs):
        yield info(
            "NCCL_P2P_DISABLE",
            "is set: cards that could write each other's memory go through the host's",
            "unset it, unless peer access hangs or corrupts data here",
        )


def check_mixed(facts: MachineFacts) -> Iterator[Finding]:
    names = sorted({gpu.name for gpu in facts.gpus})
    if len(names) > 1:
        yield info(
            "mixed GPUs",
            ", ".join(names),
            "nothing: layers are split by speed; tensor parallelism goes at the pace of the slowest",
        )


def check_shared_memory(facts: MachineFacts) -> Iterator[Finding]:
    free = facts.shm_bytes
    if free is None or free >= ROOMY_SHM_BYTES:
        return
    several = len(facts.gpus) > 1
    severity = Severity.ERROR if several and free <= DOCKER_SHM_BYTES else Severity.WARNING
    users = "NCCL and Ray need it" if several else "Ray's object store needs it"
    yield Finding(
        severity,
        "/dev/shm",
        f"{free / 1e6:.0f} MB free; {users}",
        "start the container with --shm-size=8g or --ipc=host; elsewhere: mount -o remount,size=8g /dev/shm",
    )


# --- the host -----------------------------------------------------------------------------------------------


def check_memory(facts: MachineFacts) -> Iterator[Finding]:
    cpu = facts.cpu
    if cpu.free_bytes < LEAST_FREE_MEMORY_BYTES:
        yield error(
            "memory",
            f"{cpu.free_bytes / GB:.1f} of {cpu.memory_bytes / GB:.1f} GB free; "
            f"Ray and one worker take {LEAST_FREE_MEMORY_BYTES / GB:.0f} GB before a model is loaded",
            "stop other programs, or raise the container's limit",
        )


def check_disk(facts: MachineFacts) -> Iterator[Finding]:
    free, total = facts.disk_free_bytes, facts.disk_bytes
    evidence = f"{facts.disk_path}: {free / GB:.1f} of {total / GB:.0f} GB free"
    fix = "make room there, or point TMPDIR at another disk"
    if free < LEAST_FREE_DISK_BYTES:
        yield error("disk", f"{evidence}; Ray keeps its sessions and logs there", fix)
    elif free < (1 - FULL_DISK) * total:
        yield warning("disk", f"{evidence}; Ray stops spilling objects at {FULL_DISK:.0%} full", fix)


def check_leftovers(facts: MachineFacts) -> Iterator[Finding]:
    if facts.leftovers:
        n_bytes = sum(left.n_bytes for left in facts.leftovers)
        yield warning(
            "leftovers",
            f"{len(facts.leftovers)} of runs that are no more, {n_bytes / GB:.2f} GB",
            "rm -r " + " ".join(left.path for left in facts.leftovers),
        )


CHECKS: tuple[Check, ...] = (
    check_driver,
    check_torch,
    check_packages,
    check_ray_token,
    check_gpu_memory,
    check_health,
    check_slots,
    check_generations,
    check_nvlink_lanes,
    check_peer_access,
    check_mixed,
    check_shared_memory,
    check_memory,
    check_disk,
    check_leftovers,
)


def _title(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name.removeprefix('NVIDIA ')})"


def _list(items: list[int] | list[str]) -> str:
    return ", ".join(map(str, items))
