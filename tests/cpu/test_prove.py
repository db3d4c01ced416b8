"""Rungs in real processes, over gloo, with faults in them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import torch
import torch.distributed as dist

from cluster import rungs
from cluster.children import Children
from cluster.discover import discover
from cluster.paths import Path
from cluster.probes import Target
from cluster.proof import Outcome, Proof
from cluster.prove import Rung, prove

HERE = discover(2, "cpu")
GLOO = Rung("gloo's collectives", Path.GLOO, rungs.collectives, limit_s=60)


def corrupt(target: Target, meeting: str) -> str | None:
    """A wire that flips one bit in one of the sums."""
    honest, count = dist.all_reduce, iter(range(10**6))

    def lying(tensor: torch.Tensor) -> None:
        honest(tensor)
        if next(count) == 70 and target.rank == 1:
            tensor.view(torch.uint8)[0] ^= 1

    dist.all_reduce = lying  # this process runs no other job
    try:
        return rungs.collectives(target, meeting)
    finally:
        dist.all_reduce = honest


def stop(target: Target, meeting: str) -> str | None:
    """What a link that hangs looks like."""
    if target.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return rungs.collectives(target, meeting)


def crash(target: Target, meeting: str) -> str | None:
    if target.rank == 1:
        os.write(2, b"NCCL WARN a last word\n")
        os.kill(os.getpid(), signal.SIGKILL)
    return rungs.collectives(target, meeting)


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with closing(Children(2, {}, print)) as started:
        yield started


@pytest.fixture
def climb(children: Children) -> Callable[..., Proof]:
    """Rungs on the same processes, or on what takes their place after a failure."""

    class Kept:
        each = staticmethod(children.each)

        def close(self) -> None:
            pass

    return lambda *rungs: prove(HERE, rungs, lambda environment: Kept(), print)


def test_one_wrong_bit_is_found_and_the_honest_wire_is_proved_beside_it(climb: Callable[..., Proof]) -> None:
    proof = climb(Rung("faulty", Path.MAPPED, corrupt, limit_s=60), GLOO)
    first, second = proof.steps
    assert (first.outcome, first.evidence) == (Outcome.WRONG, "1 of 100 rounds of all-reduce gave wrong bits")
    assert second.outcome is Outcome.PASSED
    assert proof.paths == (Path.GLOO,)


@pytest.mark.parametrize(
    ("job", "limit_s", "outcome", "evidence"),
    [
        (stop, 2, Outcome.HUNG, "no sign of life for 2 s"),
        (crash, 60, Outcome.CRASHED, "killed by SIGKILL: NCCL WARN a last word"),
    ],
)
def test_a_hang_and_a_crash_are_told_apart_and_end_in_time(
    climb: Callable[..., Proof],
    job: Callable[..., str | None],
    limit_s: float,
    outcome: Outcome,
    evidence: str,
) -> None:
    begun = time.monotonic()
    [step] = climb(Rung("faulty", Path.MAPPED, job, limit_s=limit_s)).steps
    assert step.outcome is outcome
    assert evidence in step.evidence
    assert time.monotonic() - begun < 40
