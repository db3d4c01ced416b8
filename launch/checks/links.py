"""What may be wrong between GPUs: each check is a pure function of MachineFacts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from cluster import catalog
from cluster.paths import Path
from cluster.proof import Outcome, Step
from launch.findings import GB, Check, Finding, MachineFacts, error, info, listed, title, warning

Pair = tuple[int, int]
MOST_SHOWN = 6  # pairs in one line

SLOW_NCCL = 0.3
"""All-reduce's bus bandwidth over a copy's rate. Two H100s: 0.75 over NVLink."""

SLOWING = {
    "NCCL_SHM_DISABLE": ("1", "NCCL goes through sockets where there is no peer access"),
    "NCCL_P2P_LEVEL": ("LOC", "NCCL uses no peer access between cards"),
    "NCCL_IB_DISABLE": ("1", "NCCL leaves InfiniBand alone: nodes talk by TCP"),
    "NCCL_PROTO": ("Simple", "NCCL's small messages take several times as long"),
}
"""Settings of NCCL that cost speed, often left from a search for another fault."""


def _pairs(facts: MachineFacts) -> list[Pair]:
    return list(itertools.combinations(sorted(gpu.index for gpu in facts.gpus), 2))


def _shown(pairs: list[Pair]) -> str:
    return listed([f"{a}-{b}" for a, b in pairs[:MOST_SHOWN]]) + (", …" if len(pairs) > MOST_SHOWN else "")


def check_nvlink_lanes(facts: MachineFacts) -> Iterator[Finding]:
    for gpu in facts.gpus:
        if gpu.nvlink_lanes and gpu.nvlink_lanes_down:
            lanes = gpu.nvlink_lanes + gpu.nvlink_lanes_down
            yield warning(
                title(gpu),
                f"{gpu.nvlink_lanes} of {lanes} NVLink lanes up: {gpu.nvlink_lanes / lanes:.0%} of its rate",
                "see nvidia-smi nvlink -s, dmesg and the fabric manager's log; reseat a bridge",
            )


def check_bridge(facts: MachineFacts) -> Iterator[Finding]:
    """Cards that a bridge would join, without one."""
    cards = [gpu for gpu in facts.gpus if (sheet := catalog.find(gpu.name)) and sheet.bridge]
    bare = [gpu for gpu in cards if not gpu.nvlink_lanes and not gpu.nvlink_lanes_down]
    if len(bare) > 1:
        sheet = catalog.find(bare[0].name)
        assert sheet is not None
        yield info(
            "NVLink bridge",
            f"none on GPU {listed([gpu.index for gpu in bare])}: traffic takes PCIe, "
            f"{sheet.pcie_bytes_per_s / GB:.0f} GB/s at most",
            f"a bridge gives these cards {sheet.nvlink_bytes_per_s / GB:.0f} GB/s each way, in pairs: more for prefill "
            "than for decode",
        )


def check_peer_access(facts: MachineFacts) -> Iterator[Finding]:
    pairs = _pairs(facts)
    without = [pair for pair in pairs if facts.report.peer_access.get(pair) is False]
    by_nature = [pair for pair in without if not _could_be_peers(facts, pair)]
    odd = [pair for pair in without if pair not in by_nature]
    if by_nature:
        yield info(
            "peer access",
            f"none between GPU {_shown(by_nature)}: all traffic goes through host memory (NCCL's SHM transport)",
            "nothing, the card's driver has none: the planner prices it, and small sums take a kernel of our own",
        )
    if odd:
        reasons = sorted({facts.report.refusals.get(pair, "unknown") for pair in odd})
        where = sorted({facts.report.ancestors.get(pair, "unknown places") for pair in odd})
        yield warning(
            "peer access",
            f"none between GPU {_shown(odd)}, which could have it: {listed(reasons)}; paths meet: {listed(where)}",
            "put them under one processor or switch, turn off ACS, set iommu=pt; until then traffic takes host memory",
        )
    if not facts.peer_access and len(without) < len(pairs):
        yield info(
            "NCCL_P2P_DISABLE",
            "is set: cards that could write each other's memory go through the host's",
            "unset it, unless peer access hangs or corrupts data here: `shardwise profile` proves it",
        )


def _could_be_peers(facts: MachineFacts, pair: Pair) -> bool:
    """By their sheets: cards made for it, as GeForce ones are not."""
    sheets = [catalog.find(gpu.name) for gpu in facts.gpus if gpu.index in pair]
    return all(sheet is not None and sheet.peer_access for sheet in sheets)


def check_sockets(facts: MachineFacts) -> Iterator[Finding]:
    far = [
        pair
        for pair in _pairs(facts)
        if facts.report.ancestors.get(pair) == "across sockets" and pair not in facts.report.nvlink
    ]
    if far:
        yield info(
            "sockets",
            f"GPU {_shown(far)} hang on different processors: traffic between them also crosses the sockets' link",
            "tensor parallelism within a socket, replicas or stages across: the plan's order keeps neighbours together",
        )


def check_iommu(facts: MachineFacts) -> Iterator[Finding]:
    """A translating IOMMU sends peers' traffic up to the root, where it is slow, hangs or goes astray."""
    found = {
        gpu.index: slot.iommu
        for gpu in facts.gpus
        if (slot := facts.slots.get(gpu.pci)) and slot.iommu.startswith("DMA")
    }
    peers = [p for p in _pairs(facts) if facts.report.peer_access.get(p) and p not in facts.report.nvlink]
    exposed = [pair for pair in peers if set(pair) & set(found)]
    proved = facts.proof is not None and Path.PEER in facts.proof.paths
    if exposed and facts.peer_access and not proved:
        yield warning(
            "IOMMU",
            f"it translates addresses ({listed(sorted(set(found.values())))}), and GPU {_shown(exposed)} use peer "
            "access over PCIe",
            "iommu=pt on the kernel's command line, or off in the BIOS; `shardwise profile` proves if it works as is",
        )


def check_acs(facts: MachineFacts) -> Iterator[Finding]:
    """Devices under one switch in groups of their own: ACS sends their traffic up to the root and back."""
    isolated = [
        pair
        for pair in _pairs(facts)
        if facts.report.ancestors.get(pair) == "one PCIe switch" and len(_groups(facts, pair)) == 2
    ]
    if isolated:
        yield warning(
            "ACS",
            f"GPU {_shown(isolated)} are under one PCIe switch and in different IOMMU groups: ACS sends their traffic "
            "up to the root port and back",
            "turn ACS off in the BIOS, or with setpci on the switch's ports (NVIDIA's NCCL guide, PCI access control)",
        )


def _groups(facts: MachineFacts, pair: Pair) -> set[int]:
    slots = [facts.slots.get(gpu.pci) for gpu in facts.gpus if gpu.index in pair]
    return {slot.iommu_group for slot in slots if slot is not None and slot.iommu_group is not None}


def check_nccl_environment(facts: MachineFacts) -> Iterator[Finding]:
    for name, (value, cost) in SLOWING.items():
        if facts.nccl_environment.get(name, "").lower() == value.lower() and len(facts.gpus) > 1:
            yield warning(
                name,
                f"is {facts.nccl_environment[name]}: {cost}",
                f"unset {name}, unless it is there for a reason",
            )


def check_mixed(facts: MachineFacts) -> Iterator[Finding]:
    names = sorted({gpu.name for gpu in facts.gpus})
    if len(names) > 1:
        yield info(
            "mixed GPUs",
            listed(names),
            "nothing: layers are split by speed; tensor parallelism goes at the pace of the slowest",
        )


# --- what was proved and measured ---------------------------------------------------------------------------


def check_proof(facts: MachineFacts) -> Iterator[Finding]:
    """What a rung failed at. Where nothing carries tensors between GPUs, only replicas of one GPU can start."""
    proof = facts.proof
    if proof is None or len(facts.gpus) < 2:
        return
    carried = Path.NCCL in proof.paths
    for step in proof.failures:
        evidence = f"{step.outcome}: {step.evidence}"
        yield (warning if carried or step.path is not Path.NCCL else error)(
            _subject(step), evidence, step.fix
        )


def _subject(step: Step) -> str:
    return step.rung if step.outcome is Outcome.UNUSABLE else f"{step.rung}, not trusted"


def check_profile(facts: MachineFacts) -> Iterator[Finding]:
    """Only where there is something to gain: between GPUs."""
    if len(facts.gpus) < 2:
        return
    if facts.profile is not None and facts.profile_changes:
        evidence = (
            f"taken {facts.profile.measured_at[:10]}, and since then {listed(list(facts.profile_changes))}"
        )
        yield info("profile", evidence, "shardwise profile: under a minute; until then data sheets stand in")
    elif facts.measured is None:
        evidence = (
            "these links were never measured in full: plans go by data sheets or by a few seconds' probes"
        )
        yield info("profile", evidence, "shardwise profile: under a minute")


def check_nccl_beside_the_wire(facts: MachineFacts) -> Iterator[Finding]:
    """NCCL far slower than the copies that the same pair was measured at."""
    if facts.measured is None:
        return
    found = facts.measured.all_reduce.get(2)
    pair = [c.bytes_per_s for c in facts.measured.pair_copies if {c.source, c.target} == {0, 1}]
    if found is not None and pair and found.bytes_per_s < SLOW_NCCL * min(pair) and facts.peer_access:
        yield warning(
            "NCCL",
            f"all-reduce of two at {found.bytes_per_s / GB:.1f} GB/s, where a copy goes at {min(pair) / GB:.1f}",
            "see with NCCL_DEBUG=INFO which way it takes; NCCL_P2P_LEVEL=SYS lets peers across the root port",
        )


CHECKS: tuple[Check, ...] = (
    check_proof,
    check_nvlink_lanes,
    check_bridge,
    check_peer_access,
    check_sockets,
    check_iommu,
    check_acs,
    check_nccl_environment,
    check_nccl_beside_the_wire,
    check_mixed,
    check_profile,
)
