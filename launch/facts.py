"""Gathers MachineFacts: from files, package metadata and NVML, without importing torch or ray."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.discover import read_cpu, report_here
from cluster.nvml import GpuReport
from cluster.rocm import torch_build
from launch.findings import Leftover, MachineFacts

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "safetensors", "flashinfer-python", "triton")
OURS = (
    "shardwise-*",
    "sw-[0-9]*-*",
)  # names in temporary folders; the second are private Rays (cluster/actors.py)
NCCL_WHEELS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")  # newest first


def gather(report: GpuReport | None = None) -> MachineFacts:
    """Of this machine, as this process sees it. `report`: what NVML said, if it was asked before."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if report is None:
        report, visible = report_here(visible)
    disk = shutil.disk_usage(tempfile.gettempdir())
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    return MachineFacts(
        cpu=read_cpu(),
        report=report,
        driver_loaded=Path("/proc/driver/nvidia/version").exists(),
        versions={**{name: _version(name) for name in PACKAGES}, "nccl": _nccl()},
        torch_cuda=torch_build()[0],
        processes={pid: _process_name(pid) for gpu in report.gpus for pid, _ in gpu.holders},
        visible=visible,
        peer_access=os.environ.get("NCCL_P2P_DISABLE", "0") != "1",
        shm_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        disk_path=tempfile.gettempdir(),
        disk_bytes=disk.total,
        disk_free_bytes=disk.free,
        leftovers=tuple(leftovers((Path(tempfile.gettempdir()), Path("/dev/shm")))),
        ray_auth_mode=os.environ.get("RAY_AUTH_MODE"),
        ray_token_mode=stat.S_IMODE(token.stat().st_mode) if token.is_file() else None,
        ray_token_path=str(token),
    )


def leftovers(folders: tuple[Path, ...], proc: Path = Path("/proc")) -> Iterator[Leftover]:
    """Files and directories of ours that no living process has a part in.

    A process has one if its pid is a part of the name (sw-PID-…), or if it has the path on its
    command line, in its environment, open or mapped. Other users' are left out: who holds them we cannot see.
    """
    found = [path for folder in folders for pattern in OURS for path in sorted(folder.glob(pattern))]
    ours = [path for path in found if path.lstat().st_uid == os.getuid()]
    if not ours or not proc.is_dir():  # nothing, or a system that does not tell what is held (macOS)
        return
    held = "\n".join(_held_by_processes(proc))
    for path in ours:
        owned = any(part.isdigit() and (proc / part).is_dir() for part in path.name.split("-"))
        if not owned and not re.search(re.escape(str(path)) + r"(?![\w-])", held):
            yield Leftover(str(path), _n_bytes(path))


def _held_by_processes(proc: Path) -> Iterator[str]:
    """Command lines, environments, mappings and open files of the processes that we may look into."""
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            for name in ("cmdline", "environ", "maps"):
                yield (process / name).read_text(errors="replace").replace("\0", " ")
            yield from (os.readlink(link) for link in (process / "fd").iterdir())
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue


def _n_bytes(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nccl() -> str | None:
    return next((found for name in NCCL_WHEELS if (found := _version(name))), None)


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "process"
