"""The channel: every message to every reader, whole and in order, or an error that names who is behind."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from cluster import ring
from cluster.channel import Address, AsyncReader, Reader, Via, Writer
from cluster.errors import GangDied
from tests.fakes import ProcessGang
from tests.hosted import Talker

PATIENCE_S = 30.0
BOTH = pytest.mark.parametrize("via", list(Via))


def take(address: Address, count: int) -> list[bytes | None]:
    reader = Reader.open(address)
    messages = [reader.recv(PATIENCE_S) for _ in range(count)]
    reader.close()
    return messages


def exchange(writer: Writer, readers: int, messages: list[bytes]) -> list[list[bytes | None]]:
    with ThreadPoolExecutor(readers) as threads:
        taken = [threads.submit(take, writer.address(i), len(messages)) for i in range(readers)]
        for message in messages:
            writer.send(message, PATIENCE_S)
        return [future.result(PATIENCE_S) for future in taken]


def flood(
    writer: Writer, message_bytes: int, timeout_s: float, after_each: Callable[[], object] = lambda: None
) -> None:
    """Send until it fails, for a while."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        writer.send(bytes(message_bytes), timeout_s)
        after_each()


@pytest.mark.parametrize("capacity_bytes", [1, 7, 64, 1000])
def test_messages_of_any_length_go_round_a_small_ring(capacity_bytes):
    chance = random.Random(capacity_bytes)
    messages = [chance.randbytes(chance.choice([0, 1, 8, 30, 63, 64, 65, 200])) for _ in range(60)]
    writer = Writer.create([Via.MEMORY] * 3, capacity_bytes=capacity_bytes)
    assert exchange(writer, 3, messages) == [messages] * 3
    writer.close()


@BOTH
def test_a_message_larger_than_every_buffer(via):
    message = random.Random(0).randbytes(9_000_000)
    writer = Writer.create([via, via], capacity_bytes=100_000)
    assert exchange(writer, 2, [b"", message, b"end"]) == [[b"", message, b"end"]] * 2
    writer.close()


def test_one_writer_with_readers_of_both_kinds():
    writer = Writer.create([Via.MEMORY, Via.SOCKET, Via.MEMORY, Via.SOCKET])
    messages = [b"%d" % i for i in range(200)]
    assert exchange(writer, 4, messages) == [messages] * 4
    writer.close()


@BOTH
def test_who_opens_late_misses_nothing(via):
    writer = Writer.create([via])
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(lambda: [writer.send(b"%d" % i, PATIENCE_S) for i in range(3)])
        assert take(writer.address(0), 3) == [b"0", b"1", b"2"]
        sent.result(PATIENCE_S)
    writer.close()


@BOTH
def test_silence_is_none_and_loses_nothing(via):
    writer = Writer.create([via])
    reader = Reader.open(writer.address(0))
    assert reader.recv(0.0) is None
    assert reader.recv(0.01) is None
    writer.send(b"at last", PATIENCE_S)
    assert reader.recv(PATIENCE_S) == b"at last"
    reader.close()
    writer.close()


def test_a_message_that_comes_in_pieces_survives_impatience():
    writer = Writer.create([Via.MEMORY], capacity_bytes=64)
    reader = Reader.open(writer.address(0))
    message = bytes(range(256)) * 20
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(writer.send, message, PATIENCE_S)
        while (received := reader.recv(0.0)) is None:
            assert not sent.done() or sent.exception() is None
        assert received == message
    reader.close()
    writer.close()


def test_a_reader_that_does_not_read_is_named():
    writer = Writer.create([Via.MEMORY] * 2, capacity_bytes=100)
    reader = Reader.open(writer.address(0))
    writer.send(bytes(60))
    assert reader.recv(PATIENCE_S) == bytes(60)
    with pytest.raises(GangDied, match=r"reader 1 on this node left 100 bytes unread for 0\.05 s"):
        writer.send(bytes(60), 0.05)
    reader.close()
    writer.close()


def test_a_remote_reader_that_does_not_read_is_named():
    writer = Writer.create([Via.SOCKET] * 2)
    idle = Reader.open(writer.address(1))

    def read_all() -> None:
        reader = Reader.open(writer.address(0))
        while reader.recv(1.0) is not None:
            pass
        reader.close()

    eager = threading.Thread(target=read_all)
    eager.start()
    with pytest.raises(GangDied, match=r"remote reader 1 took nothing for 0\.2 s"):
        flood(writer, 200_000, 0.2)
    eager.join(PATIENCE_S)
    idle.close()
    writer.close()


def test_a_remote_reader_that_never_opens_is_named():
    writer = Writer.create([Via.SOCKET] * 3)
    reader = Reader.open(writer.address(1))
    with pytest.raises(GangDied, match=r"remote readers \[0, 2\] did not open the channel within 0\.3 s"):
        writer.send(b"x", 0.3)
    reader.close()
    writer.close()


def test_a_remote_reader_that_left_is_named():
    writer = Writer.create([Via.SOCKET])
    reader = Reader.open(writer.address(0))
    writer.send(b"x", PATIENCE_S)
    reader.close()
    with pytest.raises(GangDied, match="remote reader 0 is gone"):
        flood(writer, 1, PATIENCE_S)
    writer.close()


def test_strangers_get_nothing():
    writer = Writer.create([Via.SOCKET])
    stranger = Reader.open(dataclasses.replace(writer.address(0), token=bytes(32)))
    with pytest.raises(GangDied, match="did not open"):
        writer.send(b"secret", 0.2)
    reader = Reader.open(writer.address(0))
    writer.send(b"secret", PATIENCE_S)
    assert reader.recv(PATIENCE_S) == b"secret"
    assert stranger.recv(0.05) is None
    for end in (stranger, reader, writer):
        end.close()


def test_a_ring_that_is_not_the_one_is_refused():
    writer = Writer.create([Via.MEMORY])
    address = writer.address(0)
    with pytest.raises(GangDied, match="is not the ring"):
        Reader.open(dataclasses.replace(address, token=bytes(16)))
    writer.close()
    with pytest.raises(GangDied):
        Reader.open(address)


def test_an_asyncio_reader_can_be_cancelled_without_loss():
    writer = Writer.create([Via.SOCKET])

    async def main() -> bytes:
        reader = await AsyncReader.open(writer.address(0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await reader.recv()
        await asyncio.to_thread(writer.send, b"token", PATIENCE_S)
        message = await reader.recv()
        reader.close()
        return message

    assert asyncio.run(main()) == b"token"
    writer.close()


def test_an_address_is_plain_data():
    writer = Writer.create([Via.MEMORY, Via.SOCKET])
    for i in range(2):
        packed = msgspec.msgpack.encode(writer.address(i))
        assert msgspec.msgpack.decode(packed, type=Address) == writer.address(i)
    writer.close()


def test_sockets_bind_to_one_interface_only():
    writer = Writer.create([Via.SOCKET])
    assert writer.address(0).url.startswith("tcp://127.0.0.1:")
    writer.close()


def test_without_ordered_stores_memory_becomes_a_socket(monkeypatch):
    monkeypatch.setattr(ring, "SUPPORTED", False)
    writer = Writer.create([Via.MEMORY])
    assert writer.address(0).url.startswith("tcp://")
    assert exchange(writer, 1, [b"x"]) == [[b"x"]]
    writer.close()


def test_a_ring_has_no_name_that_could_be_left_behind():
    writer = Writer.create([Via.MEMORY])
    path = writer.address(0).url.removeprefix("memory:")
    assert os.readlink(path) == "/memfd:shardwise-ring (deleted)"
    writer.close()
    assert not os.path.exists(path)


def test_between_processes_idle_readers_cost_nothing_and_stopped_ones_are_named():
    with ProcessGang(Talker, 2) as gang:
        writer = Writer.create([Via.MEMORY] * 2, capacity_bytes=5000)
        for call in gang.call_all("open_reader", [[writer.address(i)] for i in range(2)]):
            call.result(PATIENCE_S)
        idle = gang.call_all("cpu_while_idle_s", [[0.5], [0.5]])
        assert max(call.result(PATIENCE_S) for call in idle) < 0.05
        writer.send(b"to both")
        assert [call.result(PATIENCE_S) for call in gang.call_all("recv", [[1.0]] * 2)] == [b"to both"] * 2
        os.kill(gang.members[1].pid, signal.SIGSTOP)
        with pytest.raises(GangDied, match="reader 1 on this node"):
            flood(writer, 1000, 0.2, lambda: gang.call(0, "recv", PATIENCE_S).result(PATIENCE_S))
        writer.close()


def test_a_killed_writer_leaves_its_readers_waiting_not_broken():
    with ProcessGang(Talker, 1) as gang:
        (address,) = gang.call(0, "open_writer", [Via.MEMORY], "127.0.0.1").result(PATIENCE_S)
        reader = Reader.open(address)
        gang.call(0, "send", b"before").result(PATIENCE_S)
    assert reader.recv(PATIENCE_S) == b"before"
    assert reader.recv(0.01) is None
    reader.close()
    with pytest.raises(GangDied, match="its writer has gone"):
        Reader.open(address)
