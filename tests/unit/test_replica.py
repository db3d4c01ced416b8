"""Why a replica ended: whoever died, told by its gang, rather than the neighbours that it left waiting."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from cluster.channel import Address, Via, Writer
from cluster.errors import GangDied, ShardwiseError, WorkerFailed
from cluster.gang import Answer, Call, Failure, Fate, Member
from orchestrator import replica
from orchestrator.replica import GangReplica, Watchdog
from orchestrator.request import FinishReason, Grammar, GrammarKind, Request, SamplingParams, Token

NOWHERE = Address(0, "tcp://127.0.0.1:9", b"token")
OBITUARY = "worker 1 died: signal SIGKILL. It wrote nothing to its standard error."
BROKEN_WIRE = Failure("GangDied", "rank 0: all-reduce failed, so a peer died or stopped", "")


class LoopingGang:
    """Two members in their loops, which fail and die as the test says."""

    def __init__(self) -> None:
        self.fate = Fate()
        self.members = tuple(Member(i, "127.0.0.1", "elsewhere", i, 0, "") for i in range(2))
        self.loops = [Call(member, "loop") for member in self.members]
        for loop in self.loops:
            self.fate.begin(loop)

    def call(self, index: int, method: str, *args: object) -> Call:
        call = Call(self.members[index], method)
        call.settle(Answer(f"stuck in {method}"))
        return call

    async def died(self) -> GangDied:
        return await self.fate.died()

    def kill(self) -> None:
        if self.fate.claim():
            self.fate.end(GangDied("the gang of 2 was stopped"))

    def fail(self, rank: int, failure: Failure) -> None:
        self.fate.answer(self.loops[rank], Answer(None, failure))


def ending(gang: LoopingGang, happens: Callable[[], None]) -> ShardwiseError:
    """What the replica's stream of tokens raises when that `happens` to the gang."""

    async def read() -> None:
        threading.Timer(0, happens).start()  # as from a gang: in a thread of its own
        async for _ in GangReplica(gang, 0, NOWHERE, gang.loops).steps():
            pass

    with pytest.raises(ShardwiseError) as caught:
        asyncio.run(asyncio.wait_for(read(), 10))
    return caught.value


def test_a_broken_wire_waits_for_the_obituary() -> None:
    gang = LoopingGang()

    def die() -> None:
        gang.fail(0, BROKEN_WIRE)
        gang.fate.claim()
        threading.Timer(0.1, gang.fate.end, [GangDied(OBITUARY)]).start()

    assert str(ending(gang, die)) == OBITUARY


def test_a_broken_wire_where_nobody_died_is_told_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "OBITUARY_S", 0.05)
    gang = LoopingGang()
    error = ending(gang, lambda: gang.fail(0, BROKEN_WIRE))
    assert isinstance(error, GangDied)
    assert str(error) == BROKEN_WIRE.message
    assert not gang.fate.claim(), "the gang was killed"


def test_a_worker_s_own_failure_is_told_at_once_and_ends_the_gang() -> None:
    gang = LoopingGang()
    error = ending(gang, lambda: gang.fail(1, Failure("ValueError", "no such row", "")))
    assert isinstance(error, WorkerFailed)
    assert str(error).endswith("failed in loop(): ValueError: no such row")
    assert not gang.fate.claim()


def test_a_loop_that_ends_by_itself_ends_the_gang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "OBITUARY_S", 0.05)
    gang = LoopingGang()
    error = ending(gang, lambda: gang.fate.answer(gang.loops[0], Answer(None)))
    assert str(error) == "a rank's loop ended though nobody stopped it"
    assert not gang.fate.claim()


def test_an_interrupt_leaves_nothing_that_reads_from_a_closed_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may raise right where the next message has been asked for and nobody waits for it yet."""
    complaints: list[object] = []

    def interrupt(*_: object, **__: object) -> None:
        raise InterruptedError

    async def read() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
        gang = LoopingGang()
        monkeypatch.setattr(replica.asyncio, "wait", interrupt)
        with pytest.raises(InterruptedError):
            async for _ in GangReplica(gang, 0, NOWHERE, gang.loops).steps():
                pass
        monkeypatch.undo()
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()

    asyncio.run(read())
    gc.collect()
    assert complaints == []


SILENCE_S = 0.2


def request(name: str, grammar: Grammar | None = None) -> Request:
    return Request(id=name, prompt_token_ids=[1], sampling=SamplingParams(), grammar=grammar)


async def silent_for(steps: AsyncIterator[list[Token]], seconds: float) -> bool:
    """Whether it neither says anything nor ends."""
    asked = asyncio.ensure_future(anext(steps))
    done, _ = await asyncio.wait({asked}, timeout=seconds)
    asked.cancel()
    return not done


@pytest.mark.parametrize("ends_by", ["finish", "abort"])
def test_a_replica_without_work_may_be_silent(ends_by: str, tmp_path: Path) -> None:
    async def main() -> None:
        gang, writer = LoopingGang(), Writer.create([Via.SOCKET], interface="127.0.0.1")
        found = GangReplica(gang, 0, writer.address(0), gang.loops, Watchdog(SILENCE_S, tmp_path))
        await found.submit([request("a"), request("b", Grammar(GrammarKind.REGEX, "a"))])  # b: it compiles
        steps = found.steps()
        if ends_by == "abort":
            await found.abort(["a"])
        else:
            last = [Token("a", 7, FinishReason.LENGTH)]
            sending = asyncio.to_thread(writer.send, msgspec.msgpack.encode(last))
            assert (await asyncio.gather(anext(steps), sending))[0] == last
        assert await silent_for(steps, 3 * SILENCE_S)
        writer.close()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_replica_with_work_and_no_steps_is_put_down_and_its_stacks_are_kept(tmp_path: Path) -> None:
    async def main() -> None:
        gang, writer = LoopingGang(), Writer.create([Via.SOCKET], interface="127.0.0.1")
        found = GangReplica(gang, 0, writer.address(0), gang.loops, Watchdog(SILENCE_S, tmp_path))
        await found.submit([request("a")])
        steps = found.steps()
        asked, token = asyncio.ensure_future(anext(steps)), [Token("a", 7)]
        for step in ([], token):  # a prompt in chunks has steps that give none
            await asyncio.to_thread(writer.send, msgspec.msgpack.encode(step))
        assert await asked == token
        with pytest.raises(GangDied) as caught:
            await anext(steps)
        (path,) = tmp_path.iterdir()
        assert str(caught.value) == (
            f"the gang of 2 was stuck: it made no step for 0.2 s with 1 requests at work; "
            f"the stacks of its ranks are in {path}"
        )
        assert path.read_text().count("stuck in stacks") == 2
        assert not gang.fate.claim(), "the gang was killed"
        writer.close()

    asyncio.run(asyncio.wait_for(main(), 10))
