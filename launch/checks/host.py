"""What may be wrong with software and host: each check is a pure function of MachineFacts."""

from __future__ import annotations

from collections.abc import Iterator

from launch.findings import GB, Check, Finding, MachineFacts, Severity, error, info, listed, warning

LEAST_TORCH = (2, 11)  # pyproject.toml
DOCKER_SHM_BYTES = 64 << 20  # Docker's default for /dev/shm, in which NCCL's buffers of two GPUs do not fit
ROOMY_SHM_BYTES = 1_000_000_000  # what NCCL's documentation advises for containers (--shm-size=1g)
LEAST_FREE_MEMORY_BYTES = 2_000_000_000  # Ray's daemons and one process with torch loaded
LEAST_FREE_DISK_BYTES = 2_000_000_000
FULL_DISK = 0.95  # Ray refuses to spill objects to a fuller one
LEAST_OPEN_FILES = 4096  # Ray's advice; each request that streams holds one too


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
    if facts.torch_hip is not None:
        return
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


def check_clashes(facts: MachineFacts) -> Iterator[Finding]:
    for clash in facts.clashes:
        if not clash.spared:
            yield warning(
                clash.wants.split("=")[0].rstrip("<>!~"),
                f"{clash.found or 'nothing'} is installed, and {clash.wanted_by} wants {clash.wants}",
                f"pip install '{clash.wants}', or reinstall {clash.wanted_by}",
            )
    spared: dict[str, list[str]] = {}
    for clash in facts.clashes:
        if clash.spared:
            spared.setdefault(clash.wanted_by, []).append(clash.wants)
    for wanted_by, wants in spared.items():
        yield info(
            wanted_by.split(" ")[0],
            f"{wanted_by} names packages that are not installed: {listed(wants)}",
            "nothing while it imports: each start tries it, and says if it goes on without; else pip install "
            + " ".join(f"'{want}'" for want in wants),
        )


def check_ray_token(facts: MachineFacts) -> Iterator[Finding]:
    if facts.ray_token_mode is not None and facts.ray_token_mode & 0o077:
        yield warning(
            "Ray's token",
            f"{facts.ray_token_path} has mode {facts.ray_token_mode:04o}: others can read it and join",
            f"chmod 600 {facts.ray_token_path}",
        )


def check_ray_cluster(facts: MachineFacts) -> Iterator[Finding]:
    """Our own Ray is private and needs none of it; --address would join this one."""
    found = facts.ray_cluster
    if found is None:
        return
    ours = facts.versions.get("ray")
    if found.status is None:
        evidence = f"{found.address} was started here or is named by RAY_ADDRESS, and does not answer"
        yield warning(
            "Ray cluster",
            evidence,
            "ray stop, or unset RAY_ADDRESS: a command with --address would wait for it",
        )
    elif found.status in (401, 403):
        words = "asks for a token" if found.status == 401 else "refuses the token"
        yield warning(
            "Ray cluster",
            f"{found.address} {words}; RAY_AUTH_MODE is {facts.ray_auth_mode or 'unset'}",
            f"set RAY_AUTH_MODE=token and put that cluster's token into {facts.ray_token_path}, mode 0600",
        )
    elif ours and found.version and found.version != ours:
        evidence = f"{found.address} runs ray {found.version}, and {ours} is installed here"
        yield warning(
            "Ray cluster", evidence, f"pip install 'ray=={found.version}', to join it with --address"
        )
    else:
        yield info(
            "Ray cluster",
            f"{found.address} runs here",
            "nothing: a private one is used unless --address names it",
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


def check_open_files(facts: MachineFacts) -> Iterator[Finding]:
    if facts.open_files is not None and facts.open_files < LEAST_OPEN_FILES:
        yield warning(
            "open files",
            f"a process may have {facts.open_files}; Ray and a few hundred streams need {LEAST_OPEN_FILES}",
            "ulimit -n 65536",
        )


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
    check_clashes,
    check_ray_token,
    check_ray_cluster,
    check_shared_memory,
    check_memory,
    check_disk,
    check_open_files,
    check_leftovers,
)
