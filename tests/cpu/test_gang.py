"""What every gang promises, on plain processes: answers, exceptions, deaths told with their last words."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from cluster.errors import BadLayout, GangDied, WorkerFailed
from cluster.gang import Gang, last_words
from tests.fakes import ProcessGang
from tests.hosted import Parrot, Unwilling

PATIENCE_S = 30.0


@pytest.fixture
def gang():
    with ProcessGang(Parrot, 2) as gang:
        yield gang


def gone(gang: Gang) -> bool:
    return not any(os.path.exists(f"/proc/{member.pid}") for member in gang.members)


def test_answers_come_back_and_calls_overlap(gang):
    waiting = gang.call(0, "wait")
    assert [call.result(PATIENCE_S) for call in gang.call_all("echo", [[1], ["two"]])] == [1, "two"]
    gang.call(0, "release").result(PATIENCE_S)
    assert waiting.result(PATIENCE_S) == "released"


def test_calls_and_death_can_be_awaited(gang):
    async def main() -> GangDied:
        died = asyncio.ensure_future(gang.died())
        assert await gang.call(1, "echo", b"x") == b"x"
        waiting = asyncio.ensure_future(gang.died())
        waiting.cancel()  # a cancelled waiter takes nothing from the other
        os.kill(gang.members[1].pid, signal.SIGKILL)
        return await asyncio.wait_for(died, PATIENCE_S)

    assert "signal SIGKILL" in str(asyncio.run(main()))


def test_our_errors_come_back_as_themselves(gang):
    with pytest.raises(BadLayout) as caught:
        gang.call(0, "complain").result(PATIENCE_S)
    assert str(caught.value) == "tp3 does not exist here. Use tp2."
    assert "in complain" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("divide", "ZeroDivisionError: division by zero"),
        ("quit", "SystemExit: 7"),
        ("nonsense", "AttributeError"),
    ],
)
def test_other_errors_come_back_with_their_traceback(gang, method, message):
    with pytest.raises(WorkerFailed, match=message) as caught:
        gang.call(1, method).result(PATIENCE_S)
    assert "Traceback" in caught.value.__notes__[0]
    assert gang.call(1, "echo", "alive").result(PATIENCE_S) == "alive"


def test_a_value_that_cannot_be_sent_is_an_error_not_silence(gang):
    with pytest.raises(WorkerFailed, match="cannot pickle"):
        gang.call(0, "__getattribute__", "_released").result(PATIENCE_S)


@pytest.mark.parametrize(
    ("method", "args", "how", "words"),
    [
        ("exit", (3, "no space left"), "exit code 3", "no space left"),
        ("signal", (signal.SIGKILL,), "signal SIGKILL", "It wrote nothing"),
        ("crash", (), "signal SIGSEGV", ""),
    ],
)
def test_one_death_ends_the_gang_and_every_call(gang, method, args, how, words):
    deaths = []
    gang.watch(deaths.append)
    waiting = gang.call(0, "wait")
    fatal = gang.call(1, method, *args)
    for call in (fatal, waiting):
        with pytest.raises(GangDied, match=how) as caught:
            call.result(PATIENCE_S)
        assert words in str(caught.value)
        assert f"worker 1 (pid {gang.members[1].pid} on 127.0.0.1)" in str(caught.value)
    assert gone(gang)
    with pytest.raises(GangDied, match=how):
        gang.call(0, "echo", 1).result(PATIENCE_S)
    gang.kill()
    assert [death.was_killed for death in deaths] == [how == "signal SIGKILL"]


def test_a_stopped_member_is_named(gang):
    os.kill(gang.members[0].pid, signal.SIGSTOP)
    with pytest.raises(GangDied, match=r"worker 0 .* did not answer echo\(\) in 0\.2 s"):
        gang.call(0, "echo", 1).result(0.2)
    gang.kill()
    assert gone(gang)


def test_killing_is_told_to_who_waits(gang):
    waiting = gang.call(0, "wait")
    gang.kill()
    gang.kill()
    assert gone(gang)
    with pytest.raises(GangDied, match="the gang of 2 was stopped"):
        waiting.result(PATIENCE_S)


def test_a_class_that_cannot_be_made_leaves_nothing():
    with pytest.raises(BadLayout, match="no device for me"):
        ProcessGang(Unwilling, 1)


def test_last_words_are_the_tail_or_the_crash():
    log = "\n".join([":job_id:01", *(f"line {i}" for i in range(100)), "", "the end"])
    assert last_words(log).splitlines()[-2:] == ["line 99", "the end"]
    assert "line 1\n" not in last_words(log)
    crash = "\n".join(["before", "Fatal Python error: Aborted", *(f"frame {i}" for i in range(100))])
    assert last_words(crash).startswith("Fatal Python error: Aborted\nframe 0")
    assert last_words(":job_id:01\n") == ""
