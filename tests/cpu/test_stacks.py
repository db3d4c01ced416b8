"""Where processes are stuck, told of running, stopped and dead ones, with py-spy and without."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from cluster import stacks
from tests.fakes import ProcessGang
from tests.hosted import Stuck

PATIENCE_S = 30.0


@pytest.mark.parametrize("spy", [False, True])
def test_every_member_is_told_of(spy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not spy:
        monkeypatch.setattr(stacks, "py_spy", lambda: None)
    elif stacks.py_spy() is None:
        pytest.skip("py-spy is not installed")
    with ProcessGang(Stuck, 2) as gang:
        waiting = gang.call_all("wait")
        assert [call.result(PATIENCE_S) for call in gang.call_all("echo", [[1], [2]])] == [1, 2]
        os.kill(gang.members[1].pid, signal.SIGSTOP)
        end_s = time.monotonic() + PATIENCE_S
        while not stacks.is_stopped(gang):  # it stops a moment after the call
            assert time.monotonic() < end_s
        path = stacks.save(gang, tmp_path / "made", "stacks")
        told = path.read_text().split("=== worker ")
        assert path.name.startswith("stacks-")
        assert [part.split(" ")[0] for part in told[1:]] == ["0", "1"]
        assert "T (stopped)" not in told[1]
        assert "T (stopped)" in told[2]
        for part in told[1:]:
            assert "hosted.py" in part, "it waits there"
            assert "wait" in part
        assert not any(call.wait(0) for call in waiting)


def test_asking_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While threads come and go: faulthandler, where it reads one that is just ending, ends the process."""
    monkeypatch.setattr(stacks, "py_spy", lambda: None)
    with ProcessGang(Stuck, 1) as gang:
        bustle = gang.call(0, "bustle", 3.0)
        for number in range(20):
            assert "hosted.py" in stacks.save(gang, tmp_path, f"stacks{number}").read_text()
        assert bustle.result(PATIENCE_S) > 100


def test_one_that_answers_no_call_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that keeps Python's lock lets no other one answer."""
    monkeypatch.setattr(stacks, "py_spy", lambda: None)
    monkeypatch.setattr(stacks, "_ANSWER_S", 0.2)
    with ProcessGang(Stuck, 1) as gang:
        gang.call(0, "hog", 20.0)
        time.sleep(0.5)
        assert "in hog" in stacks.save(gang, tmp_path, "stacks").read_text()
