"""A replica that breaks in the middle of a request: who died is told in seconds, nothing stays, others go on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import GangDied, WorkerFailed
from cluster.gang import Gang
from launch.options import EngineOptions
from launch.start import Deployment
from orchestrator.request import Completion, SamplingParams
from tests.hosts import PATIENCE_S, gone
from tests.oracle import greedy
from tests.serving import Hosting, Processes, Tapped, options, served, struck
from tests.tiny import make_model
from tests.workers import FrailWorker

PROMPT = [3, 1, 4, 1, 5]
OUTPUT_TOKENS = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, "llama", max_position_embeddings=8192)


@contextmanager
def frail(layout: str, asked: EngineOptions) -> Iterator[tuple[Deployment, list[Gang]]]:
    where = Hosting(Processes(), FrailWorker)
    with served(layout, asked, where) as found:
        yield found, where.gangs


@pytest.mark.parametrize(("layout", "rank"), [("tp2", 0), ("tp2", 1), ("pp2", 1)])
def test_a_killed_worker_fails_the_request_with_its_last_words(
    layout: str, rank: int, tiny: tuple[Path, Any]
) -> None:
    asked = options(tiny[0], max_model_len=None)
    with frail(layout, asked) as (found, (gang,)):
        member = gang.members[rank]
        error, seconds = struck(found, asked, PROMPT, lambda: os.kill(member.pid, signal.SIGKILL))
        assert isinstance(error, GangDied)
        assert str(error).startswith(f"{member} died: signal SIGKILL. Its last words:")
        assert f"rank {rank} is ready" in str(error)
        assert seconds < 5
        assert gone(gang)


def test_a_worker_that_raises_ends_its_replica_and_says_why(tiny: tuple[Path, Any]) -> None:
    asked = options(tiny[0], max_model_len=None)

    async def ask_for_trouble(found: Deployment) -> None:
        async with found.coordinator(asked, None) as coordinator:
            await coordinator.complete([*PROMPT, FrailWorker.FATAL_TOKEN], SamplingParams())

    with frail("tp2", asked) as (found, (gang,)):
        with pytest.raises(WorkerFailed) as caught:
            asyncio.run(asyncio.wait_for(ask_for_trouble(found), PATIENCE_S))
        assert str(caught.value) == f"{gang.members[1]} failed in follow(): IndexError: no row 130"
        assert gone(gang)


def test_the_other_replica_takes_over(tiny: tuple[Path, Any]) -> None:
    directory, model = tiny
    asked = options(directory, max_model_len=None)
    long = SamplingParams(max_tokens=500, ignore_eos=True)  # some seconds: both are at it when one is killed
    short = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)

    async def lose_one(found: Deployment, gangs: Sequence[Gang]) -> tuple[list[Completion], list[Completion]]:
        replicas = tuple(Tapped(replica) for replica in found.replicas)
        async with replace(found, replicas=replicas).coordinator(asked, None) as coordinator:
            asking = [asyncio.ensure_future(coordinator.complete(PROMPT, long)) for _ in replicas]
            for replica in replicas:
                await asyncio.wait_for(replica.flowing.wait(), PATIENCE_S)
            os.kill(gangs[0].members[0].pid, signal.SIGKILL)
            whole = [answer for (answer,) in await asyncio.gather(*asking)]
            later = [await coordinator.complete(PROMPT, short) for _ in replicas]
            return whole, [answer for (answer,) in later]

    with frail("dp2", asked) as (found, gangs):
        whole, later = asyncio.run(lose_one(found, gangs))
        assert [gone(gang) for gang in gangs] == [True, False]
    expected = greedy(model, PROMPT, OUTPUT_TOKENS)
    assert [done.token_ids for done in later] == [expected] * 2
    moved, stayed = whole
    assert len(moved.token_ids) == long.max_tokens
    assert moved.token_ids == stayed.token_ids
    assert moved.token_ids[:OUTPUT_TOKENS] == expected
