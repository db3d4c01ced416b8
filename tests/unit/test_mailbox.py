"""Mailboxes on a stand-in for the driver: two streams that may be interleaved anyhow, and memory of this process."""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from cluster.collectives import cuda
from cluster.collectives.mailbox import MODULUS, Numbers, Receiver, Sender, Wire

SLOT = 512


class Driver:
    """Streams as queues of (may it run, run), which `run` takes from in any order that the streams allow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: dict[int, deque[tuple[Callable[[], bool], Callable[[], object]]]] = {
            1: deque(),
            2: deque(),
        }
        self.current = 1
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=self.current))
        monkeypatch.setattr(cuda, "copy", self.copy)
        monkeypatch.setattr(cuda, "wait_for_number", self.wait)
        monkeypatch.setattr(cuda, "write_number", self.write)

    def copy(self, to: int, source: int, n_bytes: int, stream: int) -> None:
        self.streams[stream].append((lambda: True, lambda: ctypes.memmove(to, source, n_bytes)))

    def wait(self, stream: int, address: int, number: int) -> None:
        there = ctypes.c_uint32.from_address(address)
        # As CUDA compares: the difference as a signed number of 32 bits.
        self.streams[stream].append((lambda: (there.value - number) % MODULUS < MODULUS // 2, lambda: None))

    def write(self, stream: int, address: int, number: int) -> None:
        def run() -> None:
            ctypes.c_uint32.from_address(address).value = number

        self.streams[stream].append((lambda: True, run))

    def run(self, rnd: random.Random) -> None:
        """Until nothing can run any more."""
        while ready := [s for s in self.streams.values() if s and s[0][0]()]:
            rnd.choice(ready).popleft()[1]()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def ends(slots: int) -> tuple[Sender, Receiver, list[torch.Tensor]]:
    wire = Wire(0, 1, SLOT, slots)
    data, numbers = torch.zeros(wire.region_bytes, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    places = wire.slots_at(data.data_ptr()), Numbers(numbers.data_ptr(), numbers.data_ptr() + 4)
    return Sender(*places), Receiver(*places), [data, numbers]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_every_message_comes_whole_and_in_order_however_streams_interleave(
    slots: int, seed: int, driver: Driver
) -> None:
    sender, receiver, _memory = ends(slots)
    rnd = random.Random(seed)
    sent = [torch.randn(rnd.randint(1, SLOT // 4)) for _ in range(12)]
    got = [torch.full_like(tensor, torch.nan) for tensor in sent]
    left = {1: deque(sent), 2: deque(got)}
    while left[1] or left[2]:
        driver.current = rnd.choice([stream for stream in left if left[stream]])
        tensor = left[driver.current].popleft()
        if driver.current == 1:
            sender.send(tensor)
        else:
            receiver.receive(tensor, receiver.expect())
        if rnd.random() < 0.5:
            driver.run(rnd)
    driver.run(rnd)
    assert not any(driver.streams.values())
    assert all(torch.equal(a, b) for a, b in zip(sent, got, strict=True))


def test_a_sender_waits_where_nobody_takes_its_messages_out(driver: Driver) -> None:
    sender, receiver, _memory = ends(2)
    sent = [torch.full((4,), float(value)) for value in range(4)]
    for tensor in sent:
        sender.send(tensor)
    driver.run(random.Random(0))
    assert len(driver.streams[1]) == 6  # of the third and the fourth: wait, copy, number
    driver.current, got = 2, torch.zeros(4)
    receiver.receive(got, receiver.expect())
    driver.run(random.Random(0))
    assert len(driver.streams[1]) == 3
    assert got.tolist() == [0.0] * 4


def test_messages_that_nobody_wants_are_left(driver: Driver) -> None:
    sender, receiver, _memory = ends(2)
    numbers = [receiver.expect() for _ in range(4)]
    sent, got = [torch.full((4,), float(value)) for value in range(4)], torch.zeros(4)
    for value in range(4):
        driver.current = 1
        sender.send(sent[value])
        if value % 2:
            driver.current = 2
            receiver.receive(got, numbers[value])
        driver.run(random.Random(value))
        assert got.tolist() == [float(value - (value + 1) % 2) if value else 0.0] * 4
    assert not any(driver.streams.values())


def test_numbers_go_on_past_32_bits(driver: Driver) -> None:
    sender, receiver, memory = ends(2)
    sender._count = receiver._count = MODULUS - 3
    memory[1].fill_(-3)  # the same number
    for value in range(6):
        driver.current = 1
        sent = torch.full((4,), float(value))
        sender.send(sent)
        driver.current, got = 2, torch.zeros(4)
        receiver.receive(got, receiver.expect())
        driver.run(random.Random(value))
        assert torch.equal(got, sent)


def test_what_no_slot_holds_is_for_others(driver: Driver) -> None:
    sender, _receiver, _memory = ends(1)
    assert sender.takes(SLOT) and not sender.takes(SLOT + 1)
    with pytest.raises(ValueError, match="a message of 516 bytes; slots have 512"):
        sender.send(torch.zeros(129))
