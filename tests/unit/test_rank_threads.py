"""A call of a rank leaves no threads behind that a later product would have to share the cores with."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.rank import Rank, loops_on_its_device, on_its_device

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


class Multiplying(Rank):
    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    @on_its_device
    def briefly(self) -> int:
        return self.loop()

    @loops_on_its_device
    def loop(self) -> int:
        torch.mm(torch.ones(512, 512), torch.ones(512, 512))
        return threads()

    @on_its_device
    def wrongly(self) -> None:
        raise ValueError("no such weight")


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_threads_of_a_call_end_with_it() -> None:
    rank, before = Multiplying(), threads()
    assert rank.briefly() >= before + 3  # the call's, and two that multiply with it
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:  # they are told to end, and do so by themselves
        time.sleep(0.01)
    assert threads() == before


def test_an_error_comes_back_from_there() -> None:
    with pytest.raises(ValueError, match="no such weight"):
        Multiplying().wrongly()
