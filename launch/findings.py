"""What is looked at to judge a machine, and what is found wrong with it: data, no more.

An `error` stops a launch, a `warning` costs speed or safety, `info` tells what the planner does about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.discover import Cpu, visible_gpus
from cluster.network import Interface
from cluster.nvml import Gpu, GpuReport
from cluster.pci import Slot
from cluster.profile import MachineProfile
from cluster.proof import Proof

GB = 1e9


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
class Clash:
    """An installed package that another one, installed too, does not want."""

    wanted_by: str
    wants: str  # "triton==3.6.0"
    found: str | None  # None: not installed
    spared: bool = False  # by a package that a start tries and does without, and of which we use a part


@dataclass(frozen=True, slots=True)
class RayCluster:
    """One that programs here would join unasked: RAY_ADDRESS, or `ray start` on this host."""

    address: str
    status: int | None  # of its dashboard's /api/version; None: no answer in a second
    version: str = ""


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """All that the checks look at."""

    cpu: Cpu
    report: GpuReport = field(default_factory=GpuReport)
    driver_loaded: bool = False  # the kernel module, whatever NVML says
    slots: Mapping[str, Slot] = field(default_factory=dict)  # by the GPU's PCI address
    versions: Mapping[str, str | None] = field(default_factory=dict)  # distribution -> version; None: absent
    clashes: tuple[Clash, ...] = ()
    torch_cuda: str | None = None  # that torch was built for; None: a build for CPUs or ROCm
    torch_hip: str | None = None
    processes: Mapping[int, str] = field(
        default_factory=dict
    )  # names of those that hold GPU memory, where known
    visible: str | None = None  # CUDA_VISIBLE_DEVICES
    peer_access: bool = True  # False: NCCL_P2P_DISABLE=1
    nccl_environment: Mapping[str, str] = field(default_factory=dict)  # NCCL_… but NCCL_P2P_DISABLE
    network: Interface | None = None  # the fastest to other nodes, where known
    shm_bytes: int | None = None  # free in /dev/shm; None where there is none
    disk_path: str = "/tmp"
    disk_bytes: int = 1 << 40
    disk_free_bytes: int = 1 << 39
    open_files: int | None = None  # that a process may have, ulimit -n
    leftovers: tuple[Leftover, ...] = ()
    ray_auth_mode: str | None = None  # RAY_AUTH_MODE
    ray_token_mode: int | None = None  # permission bits of Ray's token file; None where there is none
    ray_token_path: str = "~/.ray/auth_token"
    ray_cluster: RayCluster | None = None
    profile: MachineProfile | None = None  # as kept, also if it no longer holds
    profile_changes: tuple[str, ...] = ()  # since it was taken, in words
    proof: Proof | None = None  # of the links as they are

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Those that a launch would use."""
        return visible_gpus(self.report.gpus, self.visible)

    @property
    def measured(self) -> MachineProfile | None:
        """A full profile that holds."""
        return self.profile if self.profile and self.profile.full and not self.profile_changes else None


Check = Callable[[MachineFacts], Iterator[Finding]]


def error(subject: str, evidence: str, fix: str) -> Finding:
    return Finding(Severity.ERROR, subject, evidence, fix)


def warning(subject: str, evidence: str, fix: str) -> Finding:
    return Finding(Severity.WARNING, subject, evidence, fix)


def info(subject: str, evidence: str, fix: str) -> Finding:
    return Finding(Severity.INFO, subject, evidence, fix)


def title(gpu: Gpu) -> str:
    return f"GPU {gpu.index} ({gpu.name.removeprefix('NVIDIA ')})"


def listed(items: list[int] | list[str]) -> str:
    return ", ".join(map(str, items))
