"""The life of requests between a client and replicas that a test plays itself."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from functools import wraps

import pytest

from cluster.errors import BadRequest, DeadlineExceeded, Draining, GangDied, Overloaded
from orchestrator.admission import QueueLimits
from orchestrator.answer import Mailbox, Terms, Update
from orchestrator.coordinator import Coordinator
from orchestrator.request import Completion, FinishReason, Request, SamplingParams
from orchestrator.scheduler import SchedulerConfig
from tests.byte_text import BYTES
from tests.fakes import FakeReplica

LIMITS = SchedulerConfig(num_blocks=8, block_size=16, max_model_len=128)
EOS, VOCAB = 200, 257
PATIENCE_S = 10.0


def death() -> GangDied:
    return GangDied("worker 1 died. Its last words: out of memory")


def in_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), PATIENCE_S))

    return run


def coordinator(
    *replicas: FakeReplica,
    with_text: bool = False,
    seed: int | None = 0,
    limits: SchedulerConfig = LIMITS,
    queue: QueueLimits | None = None,
) -> Coordinator:
    return Coordinator(
        replicas,
        limits,
        vocab=VOCAB,
        eos_ids=(EOS,),
        text=BYTES if with_text else None,
        seed=seed,
        queue=queue or QueueLimits(),
    )


def ask(
    serving: Coordinator, prompt: list[int], on_text: Callable[[str], None] | None = None, **sampling: object
) -> asyncio.Task[list[Completion]]:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return asyncio.create_task(serving.complete(prompt, params, on_text))


@in_loop
async def test_an_answer_is_the_replicas_tokens() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        asked = ask(serving, [1, 2], max_tokens=3)
        request = await replica.submitted.get()
        assert request.prompt_token_ids == [1, 2]
        assert request.stop_ids == {EOS}
        replica.say(request, 7, 8, 9, end=FinishReason.LENGTH)
        (done,) = await asked
    assert (done.token_ids, done.text, done.prompt_tokens) == ([7, 8, 9], None, 2)
    assert done.finish_reason is FinishReason.LENGTH
    assert 0 < done.ttft_s <= done.latency_s


@in_loop
async def test_requests_go_where_least_is_left_to_do() -> None:
    a, b = FakeReplica(), FakeReplica()
    async with coordinator(a, b) as serving:
        long = ask(serving, [1] * 60, max_tokens=40)
        first = await a.submitted.get()
        short = [ask(serving, [1] * 10, max_tokens=10) for _ in range(2)]
        twice = [await b.submitted.get(), await b.submitted.get()]  # 20 and 40 to do, against 100
        a.say(first, *range(40), end=FinishReason.LENGTH)
        await long
        after = ask(serving, [1], max_tokens=1)
        last = await a.submitted.get()  # 0 against 40
        a.say(last, 5, end=FinishReason.LENGTH)
        for request in twice:
            b.say(request, 6, end=FinishReason.STOP)
        assert [done.token_ids for (done,) in [await after, *[await s for s in short]]] == [[5], [6], [6]]


@in_loop
async def test_work_left_shrinks_with_each_token() -> None:
    a, b = FakeReplica(), FakeReplica()
    async with coordinator(a, b) as serving:
        asked = [ask(serving, [1] * 10, max_tokens=50), ask(serving, [1] * 10, max_tokens=40)]
        first, second = await a.submitted.get(), await b.submitted.get()
        a.say(first, *[1] * 20)  # leaves 30, against 50
        while serving._open[first.id].tokens_left > 30:
            await asyncio.sleep(0)
        asked.append(ask(serving, [1], max_tokens=1))
        third = await a.submitted.get()
        for replica, request in ((a, first), (b, second), (a, third)):
            replica.say(request, 9, end=FinishReason.STOP)
        assert [len(done.token_ids) for (done,) in await asyncio.gather(*asked)] == [21, 1, 1]


@in_loop
async def test_n_answers_have_seeds_of_their_own() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        asked = ask(serving, [1], n=3, temperature=1.0, seed=2**63 - 2)
        requests = [await replica.submitted.get() for _ in range(3)]
        assert [r.sampling.seed for r in requests] == [2**63 - 2, 2**63 - 1, 0]
        assert [r.sampling.n for r in requests] == [1, 1, 1]
        for request in reversed(requests):
            replica.say(request, int(request.id), end=FinishReason.STOP)
        assert [done.token_ids for done in await asked] == [[int(r.id)] for r in requests]


async def _seeds(seed: int | None, **sampling: object) -> list[int | None]:
    replica = FakeReplica()
    async with coordinator(replica, seed=seed) as serving:
        asked = [ask(serving, [1], **sampling) for _ in range(3)]
        requests = [await replica.submitted.get() for _ in asked]
        for request in requests:
            replica.say(request, 1, end=FinishReason.STOP)
        await asyncio.gather(*asked)
    return [request.sampling.seed for request in requests]


@in_loop
async def test_seeds_are_drawn_again_by_the_same_seed() -> None:
    drawn = await _seeds(7, temperature=1.0)
    assert drawn == await _seeds(7, temperature=1.0)
    assert len(set(drawn)) == 3
    assert drawn != await _seeds(8, temperature=1.0)
    assert await _seeds(7) == [None] * 3  # greedy needs none


@in_loop
async def test_text_comes_as_its_tokens_do() -> None:
    replica, pieces = FakeReplica(), asyncio.Queue[str]()
    async with coordinator(replica, with_text=True) as serving:
        asked = ask(serving, [1], pieces.put_nowait)
        request = await replica.submitted.get()
        replica.say(request, *BYTES.encode("a"))
        assert await pieces.get() == "a"
        replica.say(request, *BYTES.encode("é"))
        assert await pieces.get() == "é"
        replica.say(request, EOS, end=FinishReason.STOP)
        (done,) = await asked
    assert (done.text, done.finish_reason) == ("aé", FinishReason.STOP)
    assert pieces.empty()  # a stop token has no text


@in_loop
async def test_a_stop_string_cuts_the_answer_and_stops_the_replica() -> None:
    replica = FakeReplica()
    async with coordinator(replica, with_text=True) as serving:
        asked = ask(serving, [1], stop=("END",))
        request = await replica.submitted.get()
        replica.say(request, *BYTES.encode("so END"))
        replica.say(request, *BYTES.encode(" more"))  # on its way before the abort arrived
        (done,) = await asked
        assert await replica.aborted.get() == request.id
    assert (done.text, done.finish_reason) == ("so ", FinishReason.STOP)
    assert done.token_ids == BYTES.encode("so END")


@in_loop
async def test_what_is_held_back_for_a_stop_string_comes_at_the_end() -> None:
    replica = FakeReplica()
    async with coordinator(replica, with_text=True) as serving:
        asked = ask(serving, [1], stop=("END",))
        replica.say(await replica.submitted.get(), *BYTES.encode("so EN"), end=FinishReason.LENGTH)
        (done,) = await asked
    assert (done.text, done.finish_reason) == ("so EN", FinishReason.LENGTH)
    assert replica.aborted.empty()


@in_loop
async def test_cancelling_drops_the_request() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        asked = ask(serving, [1], n=2, temperature=1.0)
        requests = [await replica.submitted.get() for _ in range(2)]
        asked.cancel()
        assert [await replica.aborted.get() for _ in requests] == [r.id for r in requests]
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert not serving._open


@in_loop
async def test_what_a_dead_replica_had_goes_to_another() -> None:
    a, b = FakeReplica(), FakeReplica()
    async with coordinator(a, b) as serving:
        lost, well = ask(serving, [1]), ask(serving, [2])
        await a.submitted.get()
        b.say(await b.submitted.get(), 4, end=FinishReason.STOP)
        a.die(death())
        moved = await b.submitted.get()
        assert (moved.prompt_token_ids, moved.output_token_ids) == ([1], [])
        b.say(moved, 5, end=FinishReason.STOP)
        assert [done.token_ids for (done,) in await asyncio.gather(lost, well)] == [[5], [4]]
        assert serving.meter.replayed == 1


@in_loop
async def test_when_all_are_dead_requests_are_told_so() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        asked = ask(serving, [1])
        await replica.submitted.get()
        replica.die(death())
        with pytest.raises(GangDied, match="out of memory"):
            await asked
        with pytest.raises(GangDied, match="out of memory"):
            await serving.complete([1], SamplingParams())


@in_loop
async def test_a_replica_that_cannot_be_read_leaves_nobody_waiting() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        asked = ask(serving, [1])
        await replica.submitted.get()
        replica.die(ValueError("not msgpack"))
        with pytest.raises(GangDied, match="replica 0 cannot be read: ValueError: not msgpack"):
            await asked


class Unwilling(FakeReplica):
    """Dies as it is given a request: its stream ends before the call does."""

    async def submit(self, requests: list[Request]) -> None:  # type: ignore[override]
        await super().submit(requests)
        self.die(death())
        for _ in range(3):  # its stream is read meanwhile
            await asyncio.sleep(0)
        raise death()


class Slow(FakeReplica):
    """Takes for ever to take anything."""

    async def submit(self, requests: list[Request]) -> None:  # type: ignore[override]
        await asyncio.Event().wait()


@in_loop
async def test_nothing_is_on_its_way_once_the_coordinator_has_left() -> None:
    before = asyncio.all_tasks()
    async with coordinator(Slow()) as asked:
        waiting = ask(asked, [1, 2])
        await asyncio.sleep(0.01)
        waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert asyncio.all_tasks() == before


def test_a_death_during_submission_is_told_once() -> None:
    async def die() -> list[str]:
        stray: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: stray.append(context["message"]))
        async with coordinator(Unwilling()) as serving:
            with pytest.raises(GangDied, match="out of memory"):
                await serving.complete([1], SamplingParams())
        gc.collect()  # a future says that nobody asked it when it is thrown away
        return stray

    assert asyncio.run(die()) == []


@in_loop
async def test_what_can_never_run_is_refused_at_the_door() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        for prompt, sampling, says in (
            ([VOCAB], SamplingParams(), "token id 257 is outside the vocabulary"),
            ([], SamplingParams(), "no tokens"),
            ([1] * 128, SamplingParams(), "the context is 128"),
            ([1], SamplingParams(stop=("x",)), "stop strings need a tokenizer"),
        ):
            with pytest.raises(BadRequest, match=says):
                await serving.complete(prompt, sampling)
        assert replica.submitted.empty()


@in_loop
async def test_requests_of_one_turn_travel_in_one_call() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        asked = [ask(serving, [1], max_tokens=1) for _ in range(5)]
        for _ in asked:
            replica.say(await replica.submitted.get(), 7, end=FinishReason.LENGTH)
        await asyncio.gather(*asked)
        later = ask(serving, [1], max_tokens=1)
        replica.say(await replica.submitted.get(), 7, end=FinishReason.LENGTH)
        await later
    assert replica.calls == [5, 1]


@in_loop
async def test_a_request_cancelled_before_it_left_is_not_sent() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        dropped, kept = ask(serving, [1], max_tokens=1), ask(serving, [2], max_tokens=1)
        await asyncio.sleep(0)  # both have asked, neither has left
        dropped.cancel()
        request = await replica.submitted.get()
        assert request.prompt_token_ids == [2]
        replica.say(request, 7, end=FinishReason.LENGTH)
        await kept
        assert dropped.cancelled()
    assert replica.calls == [1]


NARROW = SchedulerConfig(num_blocks=8, block_size=16, max_model_len=128, max_num_seqs=1)  # room for two
LIVE, BATCH = Terms("live"), Terms("batch", is_batch=True)


@in_loop
async def test_what_a_replica_has_no_room_for_waits_for_its_turn() -> None:
    replica = FakeReplica()
    async with coordinator(replica, limits=NARROW) as serving:
        asked = [
            asyncio.create_task(serving.complete([i + 1], SamplingParams(max_tokens=1), terms=terms))
            for i, terms in enumerate([BATCH, BATCH, LIVE, LIVE])
        ]
        first, live = await replica.submitted.get(), await replica.submitted.get()
        await asyncio.sleep(0)
        assert replica.submitted.empty()
        assert serving.waiting_requests == 2
        order = [first, live]
        for _ in range(2):
            replica.say(order[-1], 7, end=FinishReason.LENGTH)
            if len(order) == 3:
                replica.say(first, 7, end=FinishReason.LENGTH)  # a batch's never waits at the replica
            order.append(await replica.submitted.get())
        replica.say(order[-1], 7, end=FinishReason.LENGTH)
        assert [request.prompt_token_ids for request in order] == [[1], [3], [4], [2]]
        await asyncio.gather(*asked)
        assert (serving.open_requests, serving.waiting_requests) == (0, 0)


@in_loop
async def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    for limits, says in (
        (QueueLimits(requests=2), "2 requests wait"),
        (QueueLimits(tokens=8), "8 prompt tokens"),
    ):
        replica = FakeReplica()
        async with coordinator(replica, limits=NARROW, queue=limits) as serving:
            taken = [serving.ask([1] * 4, SamplingParams(max_tokens=1)) for _ in range(4)]
            with pytest.raises(Overloaded, match=says) as refused:
                serving.ask([1] * 4, SamplingParams(max_tokens=1))
            assert refused.value.retry_after_s >= 1
            assert serving.meter.refused == {"Overloaded": 1}
            serving.ask([1] * 4, SamplingParams(max_tokens=1), BATCH).drop()  # a batch bounds itself
            taken[-1].drop()  # one that waits leaves: there is room for another
            serving.ask([1] * 4, SamplingParams(max_tokens=1))


@in_loop
async def test_draining_takes_nothing_new_and_ends_with_the_last() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        asked = ask(serving, [1], max_tokens=1)
        request = await replica.submitted.get()
        serving.drain()
        with pytest.raises(Draining, match="shutting down"):
            serving.ask([1], SamplingParams())
        replica.say(request, 7, end=FinishReason.LENGTH)
        await serving.idle()
        assert [done.token_ids for done in await asked] == [[7]]


@in_loop
async def test_a_deadline_drops_the_request_wherever_it_is() -> None:
    replica = FakeReplica()
    async with coordinator(replica, limits=NARROW) as serving:
        hurried = Terms(timeout_s=0.02)
        asked = [serving.ask([i], SamplingParams(max_tokens=1), hurried) for i in range(3)]
        for one in asked:
            with pytest.raises(DeadlineExceeded, match=r"deadline of 0\.02 s"):
                await one.all()
        assert [await replica.aborted.get() for _ in range(2)] == ["0", "1"]  # the third was never there
        assert (serving.open_requests, serving.waiting_requests) == (0, 0)


@in_loop
async def test_updates_come_as_a_stream() -> None:
    replica = FakeReplica()
    async with coordinator(replica, with_text=True) as serving:
        mailbox = Mailbox()
        answers = serving.ask([1], SamplingParams(max_tokens=3))
        answers.listen(mailbox, 5)
        request = await replica.submitted.get()
        replica.say(request, *BYTES.encode("aé"), end=FinishReason.LENGTH)
        said: list[tuple[int, Update]] = []
        while not answers.is_over:
            await mailbox.more()
            said += mailbox.take()
    assert {number for number, _ in said} == {5}
    assert [update.text for _, update in said] == ["a", "", "é"]
    assert [update.token_id for _, update in said] == BYTES.encode("aé")
    assert [update.finish_reason for _, update in said] == [None, None, FinishReason.LENGTH]


@in_loop
async def test_dropping_answers_drops_their_requests() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        answers = serving.ask([1], SamplingParams(n=2, temperature=1.0))
        requests = [await replica.submitted.get() for _ in range(2)]
        answers.drop()
        answers.drop()  # again does nothing
        assert {await replica.aborted.get() for _ in requests} == {r.id for r in requests}
        assert serving.meter.finished == {FinishReason.ABORT: 2}
        assert serving.open_requests == 0


@in_loop
async def test_a_replica_that_ends_a_request_by_itself_says_that_its_grammar_is_no_good() -> None:
    replica = FakeReplica()
    async with coordinator(replica) as serving:
        asked = ask(serving, [1])
        replica.say(await replica.submitted.get(), -1, end=FinishReason.ABORT)
        with pytest.raises(BadRequest, match="grammar allows no token"):
            await asked


@in_loop
async def test_accounts_end_at_nothing() -> None:
    """Whatever way requests end, no replica keeps work in the books."""
    a, b = FakeReplica(), FakeReplica()
    async with coordinator(a, b, with_text=True) as serving:
        stopped = ask(serving, [1] * 5, stop=("x",))
        ended = ask(serving, [2] * 5, max_tokens=2)
        dropped = ask(serving, [3] * 5)
        first, second, third = await a.submitted.get(), await b.submitted.get(), await b.submitted.get()
        a.say(first, *BYTES.encode("ax"))
        b.say(second, 1, end=FinishReason.STOP)
        await asyncio.gather(stopped, ended)
        dropped.cancel()
        assert await b.aborted.get() == third.id
        for lane in serving._lanes:
            assert (lane.requests, lane.tokens, lane.unstarted, lane.unstarted_tokens) == (0, 0, 0, 0)
