"""The ladder of proofs, on machines and faults that are put in by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest

from cluster import prove as prove_module
from cluster.children import ChildFailed, Failure
from cluster.discover import Cpu, cpu_topology, discover
from cluster.paths import Path
from cluster.proof import Outcome, Proof, keep, kept, proof_path
from cluster.prove import NO_PEERS, SOCKETS, Rung, ladder, prove, proved
from cluster.topology import Topology
from tests.fake_nvml import FakeGpu, FakeNvml, dual_4090, dual_h100

H100S = discover(binding=dual_h100())
RTX4090S = discover(binding=dual_4090())
CPUS = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 34, free_bytes=1 << 33))
WRITES, PEER, MAPPED = "writes between peers", "sums through peer memory", "sums through mapped host memory"
FIRST, SECOND, THIRD = "NCCL's collectives", "NCCL's, through host memory", "NCCL's, through sockets"
Fault = ChildFailed | str


class FakeRanks:
    """Satisfies cluster.children.Ranks: what comes of each rung is said beforehand."""

    def __init__(self, faults: Mapping[str, Fault], environment: Mapping[str, str], tried: list[Any]) -> None:
        self.faults, self.environment, self.tried = faults, dict(environment), tried

    def each(self, job: Callable[..., Any], args: Sequence[Sequence[object]], limit_s: float) -> list[Any]:
        name = job()
        self.tried.append((name, self.environment, len(args)))
        fault = self.faults.get(name)
        if isinstance(fault, ChildFailed):
            raise fault
        return [None] * (len(args) - 1) + [fault]

    def close(self) -> None:
        pass


def named(rungs: Sequence[Rung]) -> list[Rung]:
    """Rungs whose jobs say their names, for FakeRanks to tell them by."""
    return [replace(rung, job=lambda name=rung.name: name) for rung in rungs]


def climbed(
    topology: Topology, faults: Mapping[str, Fault] | None = None, more: Sequence[Rung] = ()
) -> tuple[Proof, list[Any], list[str]]:
    tried: list[Any] = []
    said: list[str] = []
    rungs = named((*ladder(topology), *more))
    proof = prove(topology, rungs, lambda env: FakeRanks(faults or {}, env, tried), said.append)
    return proof, tried, said


def hung(rank: int = 0) -> ChildFailed:
    return ChildFailed(rank, Failure.HUNG, "no sign of life for 15 s")


def test_sound_links_are_all_trusted_and_nothing_is_changed() -> None:
    proof, tried, _ = climbed(H100S)
    assert [name for name, _, _ in tried] == [WRITES, PEER, MAPPED, FIRST]
    assert [count for _, _, count in tried] == [1, 2, 2, 2], "one process writes to all peers"
    assert proof.trusted.paths == (Path.PEER, Path.MAPPED, Path.NCCL)
    assert proof.trusted.environment == {}
    assert proof.failures == ()


def test_without_peer_access_no_peer_is_written_to() -> None:
    for topology in (RTX4090S, discover(binding=dual_h100(), peer_access=False)):
        proof, tried, _ = climbed(topology)
        assert [name for name, _, _ in tried] == [MAPPED, FIRST]
        assert proof.paths == (Path.MAPPED, Path.NCCL)


@pytest.mark.parametrize(("count", "limit_s"), [(2, 15.0), (4, 19.0), (8, 27.0)])
def test_more_ranks_are_waited_for_longer(count: int, limit_s: float) -> None:
    [card, _] = dual_h100().gpus
    node = FakeNvml([replace(card, pci=f"00000000:{bus:02X}:00.0") for bus in range(count)])
    limits: list[float] = []

    class Timed(FakeRanks):
        def each(
            self, job: Callable[..., Any], args: Sequence[Sequence[object]], limit_s: float
        ) -> list[Any]:
            limits.append(limit_s)
            return super().each(job, args, limit_s)

    machine = discover(binding=node)
    prove(machine, named(ladder(machine)), lambda env: Timed({}, env, []), lambda line: None)
    assert set(limits) == {limit_s}


def test_a_cpu_has_gloo() -> None:
    proof, tried, _ = climbed(CPUS)
    assert len(tried) == 1
    assert proof.paths == (Path.GLOO,)


FAULTS: dict[str, tuple[dict[str, Fault], Outcome, tuple[Path, ...], Mapping[str, str], str]] = {
    "peer writes hang": ({WRITES: hung()}, Outcome.HUNG, (Path.MAPPED, Path.NCCL), NO_PEERS, "ACS"),
    "peer writes corrupt": (
        {WRITES: "GPU 0 to 1: a kernel's write arrived wrong"},
        Outcome.WRONG,
        (Path.MAPPED, Path.NCCL),
        NO_PEERS,
        "IOMMU",
    ),
    "peer writes crash": (
        {WRITES: ChildFailed(0, Failure.CRASHED, "killed by SIGSEGV")},
        Outcome.CRASHED,
        (Path.MAPPED, Path.NCCL),
        NO_PEERS,
        "driver",
    ),
    "sums corrupt": (
        {PEER: "3 of 100 rounds of all-reduce gave wrong bits"},
        Outcome.WRONG,
        (Path.MAPPED, Path.NCCL),
        {},
        "NCCL_P2P_LEVEL",
    ),
    "the transport's own trial finds corruption": (
        {
            PEER: ChildFailed(
                0, Failure.RAISED, "rank 0: 2 of 20 trial sums were wrong: the link corrupts data"
            )
        },
        Outcome.WRONG,
        (Path.MAPPED, Path.NCCL),
        {},
        "NCCL_P2P_DISABLE=1",
    ),
    "a container forbids IPC": (
        {PEER: ChildFailed(1, Failure.RAISED, "cuIpcOpenMemHandle_v2: invalid argument (1)")},
        Outcome.UNUSABLE,
        (Path.MAPPED, Path.NCCL),
        {},
        "container forbids CUDA IPC",
    ),
    "memory cannot be locked": (
        {MAPPED: ChildFailed(0, Failure.RAISED, "cuMemHostRegister_v2: out of memory (2)")},
        Outcome.UNUSABLE,
        (Path.PEER, Path.NCCL),
        {},
        "a sandbox keeps it from GPUs",
    ),
    "NCCL hangs over peer access": (
        {FIRST: hung(1)},
        Outcome.HUNG,
        (Path.PEER, Path.MAPPED, Path.NCCL),
        NO_PEERS,
        "ACS",
    ),
    "NCCL hangs in shared memory too": (
        {FIRST: hung(), SECOND: hung()},
        Outcome.HUNG,
        (Path.PEER, Path.MAPPED, Path.NCCL),
        SOCKETS,
        "--shm-size=8g",
    ),
    "NCCL never works": (
        {FIRST: hung(), SECOND: hung(), THIRD: hung()},
        Outcome.HUNG,
        (Path.PEER, Path.MAPPED),
        {},
        "a replica a GPU",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_its_path_and_the_next_one_down_is_chosen(name: str) -> None:
    faults, outcome, paths, environment, fix = FAULTS[name]
    proof, tried, said = climbed(H100S, faults)
    assert proof.paths == paths
    assert proof.trusted.environment == environment
    failed = proof.failures[-1]
    assert (failed.rung, failed.outcome) == (list(faults)[-1], outcome)
    assert failed.evidence
    assert any(fix in step.fix for step in proof.failures)
    assert any(failed.evidence in line and "\n" not in line for line in said), "the user is told"
    assert all(environment == {} for name, environment, _ in tried if name not in (SECOND, THIRD))


def test_what_stands_on_a_failed_rung_is_not_tried() -> None:
    proof, tried, _ = climbed(H100S, {WRITES: hung()})
    assert [name for name, _, _ in tried] == [WRITES, MAPPED, SECOND]
    skipped = [step for step in proof.steps if step.outcome is Outcome.SKIPPED]
    assert [step.rung for step in skipped] == [PEER, FIRST]
    assert all(WRITES in step.evidence for step in skipped)


def test_a_rung_of_a_model_runs_over_what_was_proved_and_can_distrust_a_path() -> None:
    logits = Rung("logits of the first layer", Path.PEER, job=lambda: None, needs=PEER)
    proof, tried, _ = climbed(H100S, {FIRST: hung(), logits.name: "tp2 differs from tp1 by 0.3"}, [logits])
    assert tried[-1] == (logits.name, NO_PEERS, 2)
    assert proof.paths == (Path.MAPPED, Path.NCCL)


def test_a_pair_among_others_is_written_to_but_sums_need_all() -> None:
    """Two bridged cards and a third beside them."""
    bus = ["00000000:0A:00.0", "00000000:0B:00.0", "00000000:0C:00.0"]
    lanes: list[tuple[str, ...]] = [(bus[1],) * 4, (bus[0],) * 4, ()]
    cards = [FakeGpu("NVIDIA GeForce RTX 3090", 24576, b, nvlink=n) for b, n in zip(bus, lanes, strict=True)]
    proof, tried, _ = climbed(discover(binding=FakeNvml(cards, peer_access=False)))
    assert [name for name, _, _ in tried] == [WRITES, MAPPED, FIRST]
    assert proof.paths == (Path.MAPPED, Path.NCCL)


def test_a_proof_is_kept_with_its_machine_and_its_driver(tmp_path: File) -> None:
    proof, _, _ = climbed(H100S, {FIRST: hung()})
    keep(proof, tmp_path, H100S)
    assert kept(tmp_path, H100S) == proof
    assert proved(H100S, tmp_path, print) == proof, "a second start tries nothing"
    assert kept(tmp_path, replace(H100S, driver="581.00")) is None
    assert kept(tmp_path, discover(binding=dual_h100(), peer_access=False)) is None
    proof_path(tmp_path, H100S).write_text("{")
    assert kept(tmp_path, H100S) is None


def test_somebody_elses_memory_is_no_verdict_on_the_links(
    tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = ChildFailed(0, Failure.RAISED, "CUDA out of memory. Tried to allocate 16.00 MiB")
    faults: dict[str, Fault] = {FIRST: full}
    monkeypatch.setattr(prove_module, "ladder", lambda topology: named(ladder(topology)))
    monkeypatch.setattr(
        prove_module, "Children", lambda count, env, said, devices: FakeRanks(faults, env, [])
    )
    [failed] = proved(H100S, tmp_path, print).failures
    assert failed.outcome is Outcome.MEMORY
    assert "says who holds" in failed.fix and "NCCL" not in failed.fix, "it is not told as a link's fault"
    assert kept(tmp_path, H100S) is None
    faults.clear()
    proof = proved(H100S, tmp_path, print)
    assert kept(tmp_path, H100S) == proof
    faults[FIRST] = hung()
    assert proved(H100S, tmp_path, print) == proof
    assert proved(H100S, tmp_path, print, refresh=True).failures


def test_a_node_of_eight_tells_that_it_lives_between_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process writes over 56 pairs, which together may take as long as a hang is waited for."""
    from cluster import rungs

    told: list[str] = []
    monkeypatch.setattr(rungs, "alive", lambda: told.append("alive"))
    monkeypatch.setattr(rungs, "_copy_kernel", lambda device: None)
    monkeypatch.setattr(rungs, "_wrong_ways", lambda *pair: told.append("pair"))
    monkeypatch.setattr(rungs.torch.cuda, "can_device_access_peer", lambda a, b: True)

    class Card:
        def open(self) -> object:
            return object()

    assert rungs.peer_writes([Card() for _ in range(8)]) is None  # type: ignore[misc]
    assert told.count("pair") == 56
    assert all(told[i - 1] == "alive" for i, what in enumerate(told) if what == "pair")
