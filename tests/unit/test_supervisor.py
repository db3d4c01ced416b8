"""Replicas that die and come back, requests that outlive them, and the one that they died of: played by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cluster.errors import AttemptsSpent, BadRequest, GangDied, PlacementFailed
from orchestrator.coordinator import Coordinator
from orchestrator.replica import Replica
from orchestrator.request import Completion, FinishReason, Request, SamplingParams
from orchestrator.scheduler import SchedulerConfig
from orchestrator.supervisor import (
    ATTEMPTS,
    CLEARED_TOKENS,
    CROWD,
    KILLED_ATTEMPTS,
    MOST_DOUBLINGS,
    MOST_UNRELATED,
    UNRELATED_S,
    Breaker,
    End,
    Kills,
    Record,
    RestartPolicy,
    Supervisor,
    Trials,
)
from tests.fakes import FakeReplica
from tests.unit.test_coordinator import death, in_loop

LIMITS = SchedulerConfig(num_blocks=64, block_size=16, max_model_len=256, max_num_seqs=16)
POLICY = RestartPolicy(failures=3)


def test_waiting_doubles_and_an_open_breaker_rests() -> None:
    breaker = Breaker(POLICY)
    waits = [breaker.ended(End.SERVED)]  # one that served is started again at once
    waits += [
        breaker.ended(end) for end in (End.IN_VAIN, End.EXPLAINED, End.IN_VAIN, End.IN_VAIN, End.IN_VAIN)
    ]
    first_s, rest_s = POLICY.first_s, POLICY.rest_s
    assert waits == [0, first_s, first_s, 2 * first_s, rest_s, rest_s]
    assert breaker.is_open
    assert breaker.ended(End.SERVED) == 0
    assert not breaker.is_open


def test_no_wait_is_longer_than_the_most() -> None:
    policy = RestartPolicy(failures=100)
    waits = [policy.wait_s(failures) for failures in range(99)]
    assert waits == sorted(waits)
    assert waits[-1] == policy.most_s


def test_a_request_is_spent_by_deaths_under_it_alone() -> None:
    once = Record().after_death(10, 7)
    assert not once.is_spent
    assert not once.after_death(10, 7).is_spent
    assert once.after_death(10, 1).is_spent
    assert once.after_tokens(10 + CLEARED_TOKENS - 1).blamed
    cleared = once.after_tokens(10 + CLEARED_TOKENS)
    assert cleared.blamed == 0
    assert not cleared.after_death(99, 1).is_spent


def test_a_kill_from_outside_is_weak_evidence() -> None:
    record = Record()
    for attempt in range(1, KILLED_ATTEMPTS + 1):
        assert not record.is_spent
        record = record.after_death(0, 1, was_killed=True)
        assert record.after_death(0, 1).is_spent == (attempt + 1 >= ATTEMPTS)
    assert record.is_spent


def test_where_replicas_are_killed_without_it_a_request_has_more_attempts() -> None:
    kills = Kills()
    for at_s, suspects in ((0.0, "x"), (1.0, "ab"), (2.0, "b"), (3.0, "")):
        kills.add(at_s, suspects)
    assert [kills.without(one, 4.0) for one in "xabc"] == [3, 3, 2, 4]
    assert kills.without("a", UNRELATED_S + 2.5) == 1

    def deaths(unrelated: int) -> int:
        record, count = Record(), 0
        while not record.is_spent:
            record, count = record.after_death(0, 1, was_killed=True, unrelated=unrelated), count + 1
        assert Record(record.blamed - 1).after_death(0, 1, unrelated=unrelated).is_spent
        return count

    most = KILLED_ATTEMPTS + MOST_UNRELATED
    assert [deaths(unrelated) for unrelated in (0, 1, 3, MOST_UNRELATED, 99)] == [4, 5, 7, most, most]


def test_whoever_is_suspected_again_must_come_further_to_be_cleared() -> None:
    record, steps = Record(), []
    for _ in range(MOST_DOUBLINGS + 2):
        record = record.after_death(0, 1)
        steps.append(record.cleared_at)
        record = record.after_tokens(record.cleared_at)
        assert not record.blamed
    most = CLEARED_TOKENS << MOST_DOUBLINGS
    assert steps[:3] == [CLEARED_TOKENS, 2 * CLEARED_TOKENS, 4 * CLEARED_TOKENS]
    assert steps[-2:] == [most, most]


class Suspect:
    def __init__(self, suspects: int = 3) -> None:
        self.record = Record().after_death(0, suspects)


def test_each_replica_tries_one_at_a_time() -> None:
    first, second, third = Suspect(), Suspect(), Suspect()
    trials: Trials[Suspect] = Trials()
    for suspect in (first, second, third):
        trials.add(suspect)
    assert trials.begin(0) == [first]
    assert [trials.is_free(0), trials.is_free(1)] == [False, True]
    trials.leave(second, -1)
    assert trials.begin(1) == [third]
    assert len(trials) == 0
    trials.leave(first, 0)
    assert trials.is_free(0)
    assert trials.tries(third, 1)


def test_of_a_crowd_each_replica_tries_several_and_is_free_once_all_have_left() -> None:
    many = [Suspect(CROWD + 2) for _ in range(CROWD + 1)]
    few = [Suspect(2), Suspect(2)]
    trials: Trials[Suspect] = Trials()
    for suspect in (many[0], few[0], *many[1:], few[1]):
        trials.add(suspect)
    tried = trials.begin(0)
    assert tried == many[:CROWD]
    for suspect in tried:
        assert not trials.is_free(0)
        trials.leave(suspect, 0)
    assert [trials.begin(replica) for replica in range(3)] == [[few[0]], [many[CROWD]], [few[1]]]


class Stage:
    """A coordinator whose replicas a test plays, and what starts them again."""

    def __init__(self, count: int, policy: RestartPolicy = POLICY) -> None:
        self.replicas = [FakeReplica() for _ in range(count)]
        self.waits: list[float] = []
        self.broken: list[Exception] = []  # what the next starts fail with
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.serving = Coordinator(
            self.replicas,
            LIMITS,
            vocab=257,
            seed=0,
            supervisor=Supervisor(self._restart, policy, self._sleep),
        )

    async def _restart(self, number: int) -> Replica:
        await self.may_start.wait()
        if self.broken:
            raise self.broken.pop(0)
        self.replicas[number] = FakeReplica()
        return self.replicas[number]

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        if seconds >= POLICY.rest_s:
            await asyncio.Event().wait()

    def ask(self, prompt: Sequence[int], **sampling: object) -> asyncio.Task[list[Completion]]:
        params = SamplingParams(**sampling)  # type: ignore[arg-type]
        return asyncio.create_task(self.serving.complete(prompt, params))

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await asyncio.sleep(0)


@in_loop
async def test_a_request_goes_on_from_what_was_shown() -> None:
    stage = Stage(1)
    async with stage.serving as serving:
        asked = stage.ask([1, 2], max_tokens=5, temperature=1.0, seed=9)
        request = await stage.replicas[0].submitted.get()
        stage.replicas[0].say(request, 7, 8)
        stage.replicas[0].die(death())
        await stage.until(lambda: serving.restarts == {0: 1})
        again = await stage.replicas[0].submitted.get()
        assert (again.prompt_token_ids, again.output_token_ids) == ([1, 2], [7, 8])
        assert (again.sampling, again.id) == (request.sampling, request.id)
        stage.replicas[0].say(again, 9, 10, 11, end=FinishReason.LENGTH)
        (done,) = await asked
        assert done.token_ids == [7, 8, 9, 10, 11]
        assert done.prompt_tokens == 2
        assert [lane.outstanding.tokens for lane in serving._lanes] == [0]
        assert (serving.open_requests, serving.waiting_requests) == (0, 0)


@in_loop
async def test_requests_wait_for_the_only_replica() -> None:
    stage = Stage(1)
    stage.may_start.clear()
    async with stage.serving as serving:
        stage.replicas[0].die(death())
        await stage.until(lambda: not serving.is_alive)
        assert not serving.is_lost
        asked = stage.ask([1], max_tokens=1)
        await stage.until(lambda: serving.waiting_requests == 1)
        stage.may_start.set()
        await stage.until(lambda: serving.is_alive)
        stage.replicas[0].say(await stage.replicas[0].submitted.get(), 5, end=FinishReason.LENGTH)
        assert [done.token_ids for done in await asked] == [[5]]


@in_loop
async def test_an_open_breaker_ends_the_waiting() -> None:
    stage = Stage(1)
    stage.broken = [PlacementFailed("no device"), ValueError("no sense")]
    async with stage.serving as serving:
        asked = stage.ask([1])
        await stage.replicas[0].submitted.get()
        stage.replicas[0].die(death())
        why = r"out of memory\nIt could not be started again: .*ValueError: no sense"
        with pytest.raises(GangDied, match=why):
            await asked
        assert serving.is_lost
        with pytest.raises(GangDied, match=why):
            serving.ask([1], SamplingParams())
        assert stage.waits == [POLICY.first_s, 2 * POLICY.first_s, POLICY.rest_s]


@in_loop
async def test_patience_with_a_start_that_takes_for_ever_ends() -> None:
    stage = Stage(1, replace(POLICY, patience_s=0.02))
    stage.may_start.clear()
    async with stage.serving as serving:
        asked = stage.ask([1])
        await stage.replicas[0].submitted.get()
        stage.replicas[0].die(death())
        with pytest.raises(GangDied, match="out of memory"):
            await asked
        assert serving.is_lost
        stage.may_start.set()
        await stage.until(lambda: serving.is_alive)
        later = stage.ask([1], max_tokens=1)
        stage.replicas[0].say(await stage.replicas[0].submitted.get(), 5, end=FinishReason.LENGTH)
        assert len(await later) == 1


class Mortal:
    """Plays a replica of a stage for ever: two tokens a turn to everybody; dies of what `kills` says."""

    def __init__(self, stage: Stage, number: int, kills: Callable[[Request], bool]) -> None:
        self.stage, self.number, self.kills = stage, number, kills
        self.deaths = 0
        self.at_once: list[int] = []  # requests that it had, each time that it got one

    async def play(self) -> None:
        while True:
            replica = self.stage.replicas[self.number]
            running: dict[str, tuple[Request, int]] = {}
            while True:
                if not running or not replica.submitted.empty():
                    request = await replica.submitted.get()
                    running[request.id] = request, len(request.output_token_ids)
                    self.at_once.append(len(running))
                    continue
                if any(self.kills(request) for request, _ in running.values()):
                    self.deaths += 1
                    replica.die(death())
                    await self.stage.until(lambda: self.stage.replicas[self.number] is not replica)  # noqa: B023
                    break
                for request, said in list(running.values()):
                    is_last = said + 1 == request.sampling.max_tokens
                    replica.say(request, said, end=FinishReason.LENGTH if is_last else None)
                    running[request.id] = request, said + 1
                    if is_last:
                        del running[request.id]
                await asyncio.sleep(0)


@in_loop
async def test_one_that_kills_its_replica_fails_alone_after_two_attempts() -> None:
    stage = Stage(1)
    poison = 99
    mortal = Mortal(stage, 0, lambda request: poison in request.prompt_token_ids)
    async with stage.serving as serving:
        prompts = [[i] for i in range(6)] + [[poison]] + [[i] for i in range(6, 12)]
        asked = [stage.ask(prompt, max_tokens=20) for prompt in prompts]
        await stage.until(lambda: stage.replicas[0].submitted.qsize() == len(prompts))
        playing = asyncio.create_task(mortal.play())
        found = await asyncio.gather(*asked, return_exceptions=True)
        playing.cancel()
        assert mortal.deaths == 2
        assert serving.restarts == {0: 2}
    failed = [i for i, one in enumerate(found) if isinstance(one, BaseException)]
    assert failed == [6]
    assert isinstance(found[6], AttemptsSpent)
    assert "2 replicas died while they ran this request" in str(found[6])
    good = [one[0].token_ids for one in found if isinstance(one, list)]
    assert good == [list(range(20))] * 12


@in_loop
async def test_one_under_which_replicas_are_killed_outlives_as_many_more_as_were_killed_without_it() -> None:
    stage, others = Stage(1, replace(POLICY, failures=99)), 2
    kill = death()
    kill.was_killed = True

    async def killed(prompt: int) -> None:
        assert (await stage.replicas[0].submitted.get()).prompt_token_ids == [prompt]
        restarts = stage.serving.restarts.get(0, 0)
        stage.replicas[0].die(kill)
        await stage.until(lambda: stage.serving.restarts == {0: restarts + 1})

    async with stage.serving:
        for prompt in range(others):
            asked = stage.ask([prompt], max_tokens=1)
            await killed(prompt)
            stage.replicas[0].say(await stage.replicas[0].submitted.get(), 5, end=FinishReason.LENGTH)
            await asked
        last = stage.ask([99])
        for _ in range(KILLED_ATTEMPTS + others):
            assert not last.done()
            await killed(99)
        with pytest.raises(AttemptsSpent, match=f"{KILLED_ATTEMPTS + others} replicas died"):
            await last


@in_loop
async def test_in_a_crowd_it_is_found_by_a_third_death_and_others_need_few_trials() -> None:
    stage = Stage(1)
    limits = replace(LIMITS, max_num_seqs=100)
    stage.serving = Coordinator(
        stage.replicas, limits, vocab=257, supervisor=Supervisor(stage._restart, POLICY)
    )
    poison, others = 99, 60
    mortal = Mortal(stage, 0, lambda request: poison in request.prompt_token_ids)
    async with stage.serving:
        prompts = [[i] for i in range(others)] + [[poison]]
        asked = [stage.ask(prompt, max_tokens=200) for prompt in prompts]
        await stage.until(lambda: stage.replicas[0].submitted.qsize() == len(prompts))
        playing = asyncio.create_task(mortal.play())
        found = await asyncio.gather(*asked, return_exceptions=True)
        playing.cancel()
        assert mortal.deaths == 3
    failed = [i for i, one in enumerate(found) if isinstance(one, BaseException)]
    assert failed == [others]
    assert [one[0].token_ids for one in found if isinstance(one, list)] == [list(range(200))] * others


@in_loop
async def test_those_that_were_cleared_run_beside_the_next_trial() -> None:
    stage = Stage(1)
    async with stage.serving as serving:
        asked = [stage.ask([i], max_tokens=3 * CLEARED_TOKENS) for i in range(2)]
        for _ in asked:
            await stage.replicas[0].submitted.get()
        stage.replicas[0].die(death())
        await stage.until(lambda: serving.restarts == {0: 1})
        replica = stage.replicas[0]
        first = await replica.submitted.get()
        assert replica.submitted.empty()
        replica.say(first, *range(CLEARED_TOKENS))
        second = await replica.submitted.get()
        fresh = stage.ask([5], max_tokens=1)
        replica.say(second, 0)
        await stage.until(lambda: len(serving._open[second.id].token_ids) == 1)
        assert replica.submitted.empty(), "a trial has a replica to itself, but for those above suspicion"
        replica.say(second, 1, 2, 3)
        replica.say(await replica.submitted.get(), 9, end=FinishReason.LENGTH)
        await fresh
        for request in (first, second):
            replica.say(request, 9, end=FinishReason.STOP)
        assert [len(done.token_ids) for (done,) in await asyncio.gather(*asked)] == [CLEARED_TOKENS + 1] * 2


@in_loop
async def test_what_never_left_for_the_replica_is_not_blamed() -> None:
    class Slow(FakeReplica):
        async def submit(self, requests: Sequence[Request]) -> None:
            await super().submit(requests)
            await asyncio.Event().wait()

    stage = Stage(0)
    slow = Slow()
    stage.replicas = [slow]
    stage.serving = Coordinator([slow], LIMITS, vocab=257, supervisor=Supervisor(stage._restart, POLICY))
    async with stage.serving as serving:
        left = stage.ask([1])
        await slow.submitted.get()
        stayed = stage.ask([2])
        await stage.until(lambda: len(serving._lanes[0]._new) == 1)
        slow.die(death())
        await stage.until(lambda: not serving.is_alive)
        records = sorted(one.record.blamed for one in serving._open.values())
        assert records == [0, 1]
        for task in (left, stayed):
            task.cancel()


@in_loop
async def test_a_bad_request_is_not_a_death() -> None:
    class Refusing(FakeReplica):
        async def submit(self, requests: Sequence[Request]) -> None:
            raise BadRequest("not so")

    async with Coordinator([Refusing()], LIMITS, vocab=257) as serving:
        with pytest.raises(BadRequest, match="not so"):
            await serving.complete([1], SamplingParams())
        assert serving.is_alive
