"""Outputs whose reader has gone; a command that a signal ends."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from launch import __main__, outputs


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As they were, afterwards."""
    with ExitStack() as undo:
        for number in (signal.SIGTERM, signal.SIGHUP):
            undo.callback(signal.signal, number, signal.getsignal(number))
        yield


def test_a_terminal_that_hung_up_takes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        assert not outputs.drop_if_gone(terminal), "somebody looks"
        monkeypatch.setattr(outputs.sys, "stdout", terminal)
        monkeypatch.setattr(outputs.sys, "stderr", terminal)
        os.close(master)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(slave, b"stopping")
        outputs.hung_up()
        print("stopping", file=terminal, flush=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_as_ctrl_c_does(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def run(args: argparse.Namespace) -> int:
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    assert __main__._run(argparse.Namespace(command="serve", run=run)) == 128 + number
    assert capfd.readouterr().err == "interrupted\n"


def test_under_nohup_a_hang_up_ends_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def run(args: argparse.Namespace) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 7

    assert __main__._run(argparse.Namespace(command="serve", run=run)) == 7
