"""Replicas that are killed or stopped under load, for real: requests outlive them, and the replicas come back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import AttemptsSpent
from cluster.gang import Gang
from launch.options import EngineOptions
from launch.start import Deployment
from orchestrator.coordinator import Coordinator
from orchestrator.request import SamplingParams
from orchestrator.supervisor import RestartPolicy
from tests.hosts import PATIENCE_S, gone
from tests.oracle import greedy
from tests.serving import Hosting, Processes, options, served
from tests.tiny import make_model
from tests.workers import PoisonedWorker

POLICY = RestartPolicy(first_s=0.1)
DETECTION_S = 2.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("model")
    return directory, make_model(directory, "llama", max_position_embeddings=8192)


@contextmanager
def mortal(layout: str, asked: EngineOptions) -> Iterator[tuple[Deployment, Hosting]]:
    where = Hosting(Processes(), PoisonedWorker)
    with served(layout, asked, where) as found:
        yield found, where
    assert all(gone(gang) for gang in where.gangs)


@asynccontextmanager
async def supervised(found: Deployment, asked: EngineOptions) -> AsyncIterator[Coordinator]:
    async with found.coordinator(asked, None, restarts=POLICY) as coordinator:
        yield coordinator


async def until(holds: Any, limit_s: float = PATIENCE_S) -> float:
    """Seconds until it does."""
    begun_s = time.monotonic()
    while not holds():
        assert time.monotonic() - begun_s < limit_s
        await asyncio.sleep(0.01)
    return time.monotonic() - begun_s


def rings(gang: Gang) -> list[str]:
    """Descriptors of this process on shared memory of ours, and of names that outlive processes."""
    return [name for name in os.listdir("/dev/shm") if "shardwise" in name]


def test_one_of_two_replicas_is_killed_under_200_requests(tiny: tuple[Path, Any]) -> None:
    directory, model = tiny
    asked = options(directory, max_model_len=256, max_num_seqs=64, max_num_batched_tokens=256)
    requests, tokens = 200, 40
    prompts = [[3, 1, 4, 1, 5, i % 100] for i in range(requests)]

    def sampling(i: int) -> SamplingParams:
        """Half of them greedy, half sampled with a seed."""
        temperature = 0.0 if i % 2 else 1.0
        return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature, seed=i)

    async def undisturbed(found: Deployment) -> list[list[int]]:
        async with found.coordinator(asked, None) as coordinator:
            done = await asyncio.gather(
                *(coordinator.complete(ids, sampling(i)) for i, ids in enumerate(prompts))
            )
        return [one[0].token_ids for one in done]

    async def disturbed(
        found: Deployment, where: Hosting
    ) -> tuple[list[list[int]], Counter[int], Coordinator]:
        shown: Counter[int] = Counter()
        async with supervised(found, asked) as coordinator:
            answers = []
            for i, ids in enumerate(prompts):
                answers.append(
                    coordinator.ask(ids, sampling(i), on_update=lambda _, i=i: shown.update([i]))  # type: ignore[misc]
                )
            await until(lambda: shown.total() > requests * tokens // 10)
            assert coordinator.open_requests > requests // 2
            os.kill(where.gangs[0].members[0].pid, signal.SIGKILL)
            seconds = await until(lambda: coordinator.replicas_alive == [False, True])
            assert seconds < DETECTION_S
            done = await asyncio.gather(*(one.all() for one in answers))
            assert coordinator.meter.replayed > 0
            assert (coordinator.open_requests, coordinator.waiting_requests) == (0, 0)
            await until(lambda: coordinator.replicas_alive == [True, True])
            assert coordinator.restarts == {0: 1}
            both = await asyncio.gather(*(coordinator.complete([1], sampling(1)) for _ in range(2)))
            assert len({tuple(one.token_ids) for (one,) in both}) == 1
        return [one[0].token_ids for one in done], shown, coordinator

    with mortal("dp2", asked) as (found, where):
        found_ids, shown, _ = asyncio.run(disturbed(found, where))
    assert shown == Counter(dict.fromkeys(range(requests), tokens))  # none lost, none twice
    expected = {i: greedy(model, prompts[i], tokens) for i in range(1, requests, 50)}
    assert {i: found_ids[i] for i in expected} == expected
    with mortal("tp1", asked) as (found, _):
        assert found_ids == asyncio.run(undisturbed(found))


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_a_rank_is_killed_and_then_one_is_stopped(
    layout: str, tiny: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, model = tiny
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    deadline_s, tokens, prompt = 2.0, 600, [3, 1, 4, 1, 5]
    asked = options(directory, max_model_len=1024, step_timeout_s=deadline_s)
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    before = set(os.listdir("/dev/shm"))

    async def strike(coordinator: Coordinator, gang: Gang, number: int) -> tuple[list[int], float]:
        """A signal to rank 1 in mid-decode. → the answer, and when the whole gang was gone."""
        shown: list[int] = []
        answers = coordinator.ask(prompt, sampling, on_update=lambda update: shown.append(update.token_id))
        await until(lambda: len(shown) > 20)
        os.kill(gang.members[1].pid, number)
        seconds = await until(lambda: gone(gang))
        (done,) = await answers.all()
        assert done.token_ids == shown
        return shown, seconds

    async def both(found: Deployment, where: Hosting) -> list[tuple[list[int], float]]:
        async with supervised(found, asked) as coordinator:
            return [await strike(coordinator, where.gangs[-1], n) for n in (signal.SIGKILL, signal.SIGSTOP)]

    with mortal(layout, asked) as (found, where):
        (killed, gone_s), (stopped, stuck_s) = asyncio.run(both(found, where))
        assert len(where.gangs) == 3
    assert gone_s < 3
    assert stuck_s < deadline_s + 4  # stacks take up to a second each
    assert killed == stopped == greedy(model, prompt, tokens)
    (path,) = tmp_path.glob("stacks-*.txt")
    told = path.read_text()
    assert all(f"=== {member} ===" in told for member in where.gangs[1].members)
    assert "T (stopped)" in told
    assert told.count("in follow") == 1
    assert told.count("in lead") == 1
    assert set(os.listdir("/dev/shm")) <= before


def test_a_poisonous_request_fails_alone(tiny: tuple[Path, Any]) -> None:
    directory, model = tiny
    asked = options(directory, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=64)
    tokens = 60
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    prompts = [[3, 1, 4, i] for i in range(12)]
    poisons = {PoisonedWorker.EXIT: "exit code 9", PoisonedWorker.MEMORY: "80 GiB", PoisonedWorker.NAN: "NaN"}

    async def ask(found: Deployment) -> tuple[list[Any], list[Any], dict[int, int]]:
        async with supervised(found, asked) as coordinator:
            good = [asyncio.ensure_future(coordinator.complete(ids, sampling)) for ids in prompts]
            bad = []
            for poison in poisons:  # one after the other: each has its own two attempts
                bad += await asyncio.gather(coordinator.complete([poison], sampling), return_exceptions=True)
            return bad, await asyncio.gather(*good), coordinator.restarts

    with mortal("tp1", asked) as (found, where):
        bad, good, restarts = asyncio.run(ask(found))
    assert [type(error) for error in bad] == [AttemptsSpent] * len(poisons)
    for error, words in zip(bad, poisons.values(), strict=True):
        assert words in str(error)
    assert [done.token_ids for (done,) in good] == [greedy(model, ids, tokens) for ids in prompts]
    assert restarts == {0: 2 * len(poisons)} or restarts == {
        0: 2 * len(poisons) - 1
    }  # the last may not be needed
    assert len(where.gangs) in (2 * len(poisons), 2 * len(poisons) + 1)
