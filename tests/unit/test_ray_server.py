"""Ray itself, where it is not started."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import ray

from cluster import ray_server


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_ray_drops_is_raised_once_more(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def dropping(**_: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            said.append("dropped")

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, terminate)
    try:
        monkeypatch.setattr(ray, "init", dropping)
        with pytest.raises(KeyboardInterrupt):
            ray_server._init()
        assert said == ["dropped"]
        assert signal.getsignal(number) is terminate
    finally:
        signal.signal(number, before)


def test_a_signal_that_ends_a_start_does_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(ray, "init", interrupted)
    handler: Callable[..., object] | int | None = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ray_server._init()
    assert signal.getsignal(signal.SIGINT) is handler
