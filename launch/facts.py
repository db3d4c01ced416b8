"""Gathers MachineFacts: from files, package metadata and NVML, without importing torch or ray."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from cluster.discover import cpu_topology, gpu_topology, read_cpu, report_here
from cluster.network import fastest_interface
from cluster.nvml import GpuReport
from cluster.pci import read_slot
from cluster.profile import changes, nccl_version, profile_path, read
from cluster.proof import kept
from cluster.rocm import torch_build
from cluster.topology import Topology
from launch.findings import Clash, Leftover, MachineFacts, RayCluster
from launch.machine import peers_allowed

PACKAGES = ("torch", "ray", "deepspeed", "transformers", "safetensors", "flashinfer-python", "triton")
OPTIONAL = ("flashinfer-python",)  # a start tries it, and says why where it goes on without
RAY_DASHBOARD_PORT = 8265
RAY_PATIENCE_S = 1.0
OURS = (
    "shardwise-*",
    "sw-[0-9]*-*",
    "nccl-*",
)  # names in temporary folders; the second are private Rays (cluster/actors.py), the third NCCL's shared memory


def gather(cache: Path, report: GpuReport | None = None) -> MachineFacts:
    """Of this machine, as this process sees it. `cache` has its profile; `report`: what NVML said, if known."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if report is None:
        report, visible = report_here(visible)
    disk = shutil.disk_usage(tempfile.gettempdir())
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    built_for = torch_build()
    facts = MachineFacts(
        cpu=read_cpu(),
        report=report,
        driver_loaded=Path("/proc/driver/nvidia/version").exists(),
        versions={**{name: _version(name) for name in PACKAGES}, "nccl": nccl_version() or None},
        clashes=tuple(clashes(PACKAGES)),
        torch_cuda=built_for[0],
        torch_hip=built_for[1],
        slots={gpu.pci: read_slot(gpu.pci) for gpu in report.gpus},
        processes={pid: _process_name(pid) for gpu in report.gpus for pid, _ in gpu.holders},
        visible=visible,
        peer_access=peers_allowed(),
        nccl_environment={
            k: v for k, v in os.environ.items() if k.startswith("NCCL_") and k != "NCCL_P2P_DISABLE"
        },
        network=fastest_interface(),
        shm_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        disk_path=tempfile.gettempdir(),
        disk_bytes=disk.total,
        disk_free_bytes=disk.free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        leftovers=tuple(leftovers((Path(tempfile.gettempdir()), Path("/dev/shm")), _extensions())),
        ray_auth_mode=os.environ.get("RAY_AUTH_MODE"),
        ray_token_mode=stat.S_IMODE(token.stat().st_mode) if token.is_file() else None,
        ray_token_path=str(token),
        ray_cluster=ray_cluster(token),
    )
    return _with_profile(facts, cache) if facts.versions["torch"] else facts


def _with_profile(facts: MachineFacts, cache: Path) -> MachineFacts:
    """And what was measured and proved here, on whatever day."""
    topology = topology_of(facts)
    profile = read(profile_path(cache, topology))
    changed = tuple(changes(profile, topology)) if profile else ()
    return replace(facts, profile=profile, profile_changes=changed, proof=kept(cache, topology))


def topology_of(facts: MachineFacts) -> Topology:
    if facts.gpus:
        return gpu_topology(facts.report, facts.gpus, peer_access=facts.peer_access)
    return cpu_topology(cpu=facts.cpu)


def clashes(packages: Sequence[str]) -> Iterator[Clash]:
    """What installed packages ask of each other and do not get, by their metadata."""
    from packaging.requirements import InvalidRequirement, Requirement

    for name in packages:
        for line in _requirements(name):
            try:
                wanted = Requirement(line)
            except InvalidRequirement:
                continue
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            found = _version(wanted.name)
            if (
                applies
                and wanted.specifier
                and not (found and wanted.specifier.contains(found, prereleases=True))
            ):
                spared = found is None and name in OPTIONAL
                yield Clash(f"{name} {_version(name)}", f"{wanted.name}{wanted.specifier}", found, spared)


def _requirements(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def ray_cluster(token: Path) -> RayCluster | None:
    """That RAY_ADDRESS names, or that `ray start` left a note of on this host."""
    note = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    address = os.environ.get("RAY_ADDRESS") or _words(note)
    if not address or address in ("auto", "local"):
        return None
    host = address.removeprefix("ray://").rsplit(":", 1)[0]
    asked = Request(f"http://{host}:{RAY_DASHBOARD_PORT}/api/version")
    if secret := _words(token):
        asked.add_header("Authorization", f"Bearer {secret}")
    try:
        with urlopen(asked, timeout=RAY_PATIENCE_S) as answer:
            return RayCluster(address, answer.status, str(json.load(answer).get("ray_version", "")))
    except HTTPError as error:
        return RayCluster(address, error.code)
    except (OSError, ValueError):
        return RayCluster(address, None)


def _words(path: Path) -> str:
    """Of a file of Ray's; empty where it is missing, or is not to be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def leftovers(
    folders: tuple[Path, ...], extensions: Path | None = None, proc: Path = Path("/proc")
) -> Iterator[Leftover]:
    """Files and directories of ours that no living process has a part in.

    And, among torch's compiled `extensions`, locks of builds that were killed: who needs one next waits for ever.

    A process has one if its pid is a part of the name (sw-PID-…), or if it has the path on its
    command line, in its environment, open or mapped. Other users' are left out: who holds them we cannot see.
    """
    found = [path for folder in folders for pattern in OURS for path in sorted(folder.glob(pattern))]
    found += sorted(extensions.glob("*/*/lock")) if extensions else []
    ours = [path for path in found if path.lstat().st_uid == os.getuid()]
    if not ours or not proc.is_dir():  # nothing, or a system that does not tell what is held (macOS)
        return
    held = "\n".join(_held_by_processes(proc))
    for path in ours:
        owned = any(part.isdigit() and (proc / part).is_dir() for part in path.name.split("-"))
        if not owned and not re.search(re.escape(str(path)) + r"(?![\w-])", held):
            yield Leftover(str(path), _n_bytes(path))


def _extensions() -> Path:
    """Where torch keeps what it compiles (torch/utils/cpp_extension.py)."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else Path.home() / ".cache" / "torch_extensions"


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


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "process"
