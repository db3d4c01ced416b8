"""Proves each path between devices before anything relies on it: drivers have been seen to grant links that hang, and
links that corrupt.

A ladder of rungs, each done in processes of its own within a time limit, before NCCL starts anywhere else. Where a
rung fails, the paths that stand on it are not trusted, the next one down is tried, and the proof says why and what to
do. This module decides; what the rungs do on devices is in rungs.py. The proof is kept beside the profile and found
again like it, so a second start proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path as File
from typing import TYPE_CHECKING

from cluster.children import ChildFailed, Children, Failure, Ranks
from cluster.measure import Progress, meeting_place, targets
from cluster.paths import Path
from cluster.profile import fingerprint_of
from cluster.proof import FORMAT, Outcome, Proof, Step, keep, kept
from cluster.topology import LinkKind, Topology

if TYPE_CHECKING:
    from cluster.probes import Target

HANG_LIMIT_S = 15.0
"""Of silence in a rung, which tells after each step of it that it lives: NCCL's first use has taken 15 s on a machine
that eight processes were starting on. With the killing of what hangs, a hang of two costs no more than 20 s."""

MORE_RANKS_S = 2.0
"""Longer for each rank after the second: NCCL's first use opens a channel to each. What was only slow would be kept as
a hang, and every later start on that machine would go through the host."""

NO_PEERS = {"NCCL_P2P_DISABLE": "1"}
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}


@dataclass(frozen=True, slots=True)
class Rung:
    """One thing to try. Its job gets a Target and a meeting place on each rank and returns what was wrong, or None."""

    name: str
    path: Path | None  # that it is proof of; None: only what others need
    job: Callable[..., str | None]
    one_process: bool = False  # the job gets all Targets at once instead
    needs: str | None = None  # the rung that must have passed, else this one is skipped
    instead_of: str | None = None  # only where this rung did not pass
    environment: Mapping[str, str] = field(default_factory=dict)
    limit_s: float = HANG_LIMIT_S


def ladder(topology: Topology) -> tuple[Rung, ...]:
    """For the devices of one host. More rungs, such as a model's own, may follow: see `proved_further`."""
    from cluster import rungs

    if topology.devices[0].kind == "cpu":
        return (Rung("gloo's collectives", Path.GLOO, rungs.collectives),)
    granted = [link.kind in (LinkKind.NVLINK, LinkKind.PCIE) for link in topology.links.values()]
    writes = "writes between peers"
    first, second, third = "NCCL's collectives", "NCCL's, through host memory", "NCCL's, through sockets"
    return (
        *((Rung(writes, None, rungs.peer_writes, one_process=True),) if any(granted) else ()),
        *(
            (Rung("sums through peer memory", Path.PEER, rungs.peer_sums, needs=writes),)
            if all(granted)
            else ()
        ),
        Rung("sums through mapped host memory", Path.MAPPED, rungs.mapped_sums),
        Rung(first, Path.NCCL, rungs.collectives, needs=writes if any(granted) else None),
        Rung(second, Path.NCCL, rungs.collectives, instead_of=first, environment=NO_PEERS),
        Rung(third, Path.NCCL, rungs.collectives, instead_of=second, environment=SOCKETS),
    )


def proved(
    topology: Topology,
    cache_dir: File | None,
    progress: Progress,
    *,
    refresh: bool = False,
) -> Proof:
    """The proof for this very machine, kept from an earlier day or made now in some ten seconds."""
    found = None if cache_dir is None or refresh else kept(cache_dir, topology)
    if found is not None:
        return found
    count = len(topology.devices)
    progress(f"proving the links between {count} devices, in processes that may hang or crash")

    own: list[tuple[Target]] = [(target,) for target in targets(topology, count, probe_s=0.0)]

    def start(environment: Mapping[str, str]) -> Ranks:
        return Children(count, environment, progress, own)

    proof = prove(topology, ladder(topology), start, progress)
    if cache_dir is not None and not any(step.outcome is Outcome.MEMORY for step in proof.steps):
        keep(proof, cache_dir, topology)
    return proof


def proved_further(
    proof: Proof,
    topology: Topology,
    ranks: int,
    rungs: Sequence[Rung],
    cache_dir: File | None,
    progress: Progress,
) -> Proof:
    """The proof with these rungs behind its own, climbed by the first devices alone over what it proved."""
    few = replace(topology, devices=topology.devices[:ranks])
    own: list[tuple[Target]] = [(target,) for target in targets(few, ranks, probe_s=0.0)]

    def start(environment: Mapping[str, str]) -> Ranks:
        return Children(ranks, {**proof.environment, **environment}, progress, own)

    steps = prove(few, rungs, start, progress).steps
    longer = replace(proof, steps=(*proof.steps, *steps))
    if cache_dir is not None and not any(step.outcome is Outcome.MEMORY for step in steps):
        keep(longer, cache_dir, topology)
    return longer


def prove(
    topology: Topology,
    rungs: Sequence[Rung],
    start: Callable[[Mapping[str, str]], Ranks],
    progress: Progress,
) -> Proof:
    """From the first rung to the last. `start` gives processes with an environment."""
    steps: list[Step] = []
    environment: Mapping[str, str] = {}
    current: Mapping[str, str] = {}
    ranks = start(current)
    try:
        for rung in rungs:
            skipped = _skipped(rung, steps)
            if skipped is not None:
                steps += skipped
                continue
            wanted = {**environment, **rung.environment}
            if wanted != current:
                ranks.close()
                current, ranks = wanted, start(wanted)
            progress(f"{rung.name}: {len(topology.devices)} ranks")
            step = _try(rung, ranks, topology)
            if step.outcome is not Outcome.PASSED:
                progress(f"{rung.name}: {step.outcome}: {step.evidence}. {step.fix}")
            elif rung.path is Path.NCCL:
                environment = current
            steps.append(step)
    finally:
        ranks.close()
    return Proof(
        format=FORMAT,
        machine=topology.name,
        fingerprint=fingerprint_of(topology),
        proved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ranks=len(topology.devices),
        steps=tuple(steps),
        environment=environment,
    )


def _skipped(rung: Rung, steps: Sequence[Step]) -> list[Step] | None:
    """Not to be tried: with a step that says why, or with none where nothing is amiss."""
    passed = {step.rung for step in steps if step.outcome is Outcome.PASSED}
    if rung.needs is not None and rung.needs not in passed:
        return [Step(rung.name, rung.path, Outcome.SKIPPED, f"it stands on {rung.needs}, which failed")]
    return [] if rung.instead_of is not None and _stands(rung.instead_of, steps, passed) else None


def _stands(name: str, steps: Sequence[Step], passed: set[str]) -> bool:
    """Whether a rung passed, or was not tried since one before it passed."""
    return name in passed or name not in {step.rung for step in steps}


def _try(rung: Rung, ranks: Ranks, topology: Topology) -> Step:
    count = len(topology.devices)
    own: list[Target] = targets(topology, count, probe_s=0.0)
    meeting = meeting_place()
    args: list[tuple[object, ...]] = [(own,)] if rung.one_process else [(target, meeting) for target in own]
    try:
        limit_s = rung.limit_s + MORE_RANKS_S * max(0, count - 2)
        answers = ranks.each(rung.job, args, limit_s)
    except ChildFailed as error:
        outcome = _outcome(error)
        return Step(rung.name, rung.path, outcome, str(error), advice(rung, outcome))
    wrong = next((answer for answer in answers if answer is not None), None)
    if wrong is None:
        return Step(rung.name, rung.path, Outcome.PASSED)
    return Step(rung.name, rung.path, Outcome.WRONG, wrong, advice(rung, Outcome.WRONG))


def _outcome(error: ChildFailed) -> Outcome:
    if error.failure is Failure.RAISED:
        if any(words in error.words for words in _NO_MEMORY):
            return Outcome.MEMORY
        return Outcome.WRONG if "corrupt" in error.words else Outcome.UNUSABLE
    return Outcome.HUNG if error.failure is Failure.HUNG else Outcome.CRASHED


_NO_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "cuMemAlloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # the host's
)
_UNTIL = "turn off ACS and the IOMMU's translation (BIOS; iommu=pt on the kernel's command line) or update the driver"
_FIX = {
    "peers that are wrong": f"{_UNTIL}; until then traffic goes another way, as with NCCL_P2P_DISABLE=1 "
    "(NCCL_P2P_LEVEL=PXB keeps NCCL's peer access to cards behind one PCIe switch)",
    "no peers": "nothing, if a container forbids CUDA IPC or the card has no peer access: slower paths serve",
    "mapped memory that is wrong": "update the driver and the kernel; small sums go through NCCL until then",
    "no mapped memory": "see dmesg: the host ran short of memory, or a sandbox keeps it from GPUs; NCCL serves",
    "NCCL": "give a container --shm-size=8g or --ipc=host, and see what NCCL_DEBUG=INFO prints; the next way is tried",
    "no NCCL": "no way between these GPUs works: use a replica a GPU (dp), and see what NCCL_DEBUG=INFO prints",
    "no memory": "free it (`shardwise doctor` says who holds a GPU's); of the links this says nothing",
    "gloo": "see that the loopback interface is up, and that GLOO_SOCKET_IFNAME, if set, names one that is",
}


def advice(rung: Rung, outcome: Outcome) -> str:
    """What to do about a rung that failed, in one line."""
    unusable = outcome is Outcome.UNUSABLE
    if outcome is Outcome.MEMORY:
        return _FIX["no memory"]
    if rung.path is None or rung.path is Path.PEER:
        return _FIX["no peers" if unusable else "peers that are wrong"]
    if rung.path is Path.MAPPED:
        return _FIX["no mapped memory" if unusable else "mapped memory that is wrong"]
    if rung.path is Path.GLOO:
        return _FIX["gloo"]
    if rung.environment == SOCKETS:
        return _FIX["no NCCL"]
    return _FIX["NCCL" if unusable or rung.environment == NO_PEERS else "peers that are wrong"]
