"""One writer, n readers, messages of bytes: how steps travel, with no Ray call in them.

Readers on the writer's node share a ring of memory (cluster/ring.py); readers elsewhere, and readers that
live in an asyncio loop, have a ZeroMQ socket. One writer may have both kinds. Each reader gets every
message, whole, in order, also those sent before it opened its end. A writer or a reader belongs to one
thread at a time.

    writer = Writer.create([Via.MEMORY, Via.SOCKET])
    writer.address(0)                   # plain data: the control plane hands it to reader 0
    reader = Reader.open(address)       # in another process
    writer.send(b"…")
    reader.recv(timeout_s=1.0)          # bytes, or None

Sockets bind to one interface, 127.0.0.1 unless told; a peer must open with the channel's random token,
compared in constant time. Messages themselves cross the network in the clear, like the collectives beside
them.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import zmq
import zmq.asyncio

from cluster import ring
from cluster.errors import GangDied

_TOKEN_BYTES = 32
_LONGEST_HELLO_BYTES = 256  # a token and a number; ZeroMQ drops a peer that sends more
_QUEUED_MESSAGES = 64  # at each end of a socket: a reader further behind is stuck, and waiting shows it
_RETRY_MS = 2  # between looks at a full queue
_LINGER_MS = 1000  # a closed socket still delivers what it has, this long
_MEMORY, _TCP = "memory:", "tcp://"


class Via(StrEnum):
    MEMORY = "memory"  # same node (falls back to a socket where the ring is not supported)
    SOCKET = "socket"  # any node, or an AsyncReader


@dataclass(frozen=True, slots=True)
class Address:
    """Where one reader finds its end: plain data for any control plane. The token is a secret."""

    reader: int  # its number among the readers of the same kind
    url: str  # memory:/proc/PID/fd/N or tcp://HOST:PORT
    token: bytes


class Writer:
    """Create with `Writer.create`; hand `address(i)` to reader i."""

    def __init__(
        self, memory: ring.RingWriter | None, sockets: _Sockets | None, addresses: Sequence[Address]
    ) -> None:
        self._memory = memory
        self._sockets = sockets
        self._addresses = tuple(addresses)

    @classmethod
    def create(
        cls, readers: Sequence[Via], *, interface: str = "127.0.0.1", capacity_bytes: int = 4 * 2**20
    ) -> Writer:
        """`interface`: the IP address that sockets bind to. `capacity_bytes`: the ring's."""
        kinds = [via if ring.SUPPORTED else Via.SOCKET for via in readers]
        locals_, remotes = kinds.count(Via.MEMORY), kinds.count(Via.SOCKET)
        memory = ring.RingWriter(locals_, capacity_bytes) if locals_ else None
        sockets = _Sockets(remotes, interface) if remotes else None
        addresses = []
        for position, kind in enumerate(kinds):
            number = kinds[:position].count(kind)
            if kind is Via.MEMORY and memory:
                addresses.append(Address(number, _MEMORY + memory.path, memory.token))
            elif sockets:
                addresses.append(Address(number, sockets.url, sockets.token))
        return cls(memory, sockets, addresses)

    def address(self, reader: int) -> Address:
        return self._addresses[reader]

    def send(self, message: bytes | bytearray | memoryview, timeout_s: float = 30.0) -> None:
        """Returns when every reader's buffer has taken the message, not when it is read.

        Raises GangDied, naming the reader, when one is so far behind (or has not opened its socket) for
        `timeout_s`. The channel is broken then: others may have the message.
        """
        if self._sockets:
            self._sockets.send(message, timeout_s)
        if self._memory:
            self._memory.send(message, timeout_s)

    def close(self) -> None:
        if self._memory:
            self._memory.close()
        if self._sockets:
            self._sockets.close()


class Reader:
    """Create with `Reader.open`."""

    def __init__(self, end: ring.RingReader | _SocketReader) -> None:
        self._end = end

    @classmethod
    def open(cls, address: Address) -> Reader:
        if address.url.startswith(_MEMORY):
            return cls(ring.RingReader(address.url.removeprefix(_MEMORY), address.token, address.reader))
        return cls(_SocketReader(address))

    def recv(self, timeout_s: float) -> bytes | None:
        """The next message, or None when none has come within `timeout_s`."""
        return self._end.recv(timeout_s)

    def close(self) -> None:
        self._end.close()


class AsyncReader:
    """A reader in an asyncio loop; the writer's side is Via.SOCKET."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket

    @classmethod
    async def open(cls, address: Address) -> AsyncReader:
        socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
        socket.connect(address.url)
        await socket.send_multipart(_hello(address))
        return cls(socket)

    async def recv(self) -> bytes:
        """The next message; cancel it (asyncio.timeout) to stop waiting, without losing one."""
        await self._socket.poll()
        return await self._socket.recv()

    def close(self) -> None:
        self._socket.close()


class _Sockets:
    """The writer's end of all sockets: a ROUTER knows its peers: nobody joins late or falls behind unseen."""

    def __init__(self, readers: int, interface: str) -> None:
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error, not silence, when a peer is gone or full
        self._socket.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LONGEST_HELLO_BYTES)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self.url = f"{_TCP}{interface}:{self._socket.bind_to_random_port(_TCP + interface)}"
        self._missing = set(range(readers))
        self._peers: dict[int, bytes] = {}  # reader -> the name that the socket gave its connection

    def send(self, message: bytes | bytearray | memoryview, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._missing:
            self._welcome(deadline, timeout_s)
        for reader, peer in self._peers.items():
            while not self._sent(reader, peer, message):
                if time.monotonic() > deadline:
                    raise GangDied(
                        f"remote reader {reader} took nothing for {timeout_s:g} s: it is stopped or cut off"
                    )
                if self._socket.poll(_RETRY_MS):  # also what lets the socket notice that a peer has left
                    self._socket.recv_multipart()  # a stranger: every reader has joined

    def _sent(self, reader: int, peer: bytes, message: bytes | bytearray | memoryview) -> bool:
        """False when the reader's queue is full."""
        try:
            self._socket.send_multipart((peer, message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:  # EHOSTUNREACH: its connection is closed
            raise GangDied(f"remote reader {reader} is gone: {error}") from None
        return True

    def _welcome(self, deadline: float, timeout_s: float) -> None:
        """Take one hello: a reader's token and number. Strangers are not answered."""
        if not self._socket.poll(max(0, _milliseconds(deadline - time.monotonic()))):
            raise GangDied(
                f"remote readers {sorted(self._missing)} did not open the channel within {timeout_s:g} s"
            )
        peer, *hello = self._socket.recv_multipart()
        for reader in self._missing:
            if len(hello) == 2 and hmac.compare_digest(hello[0], self.token) and hello[1] == b"%d" % reader:
                self._missing.remove(reader)
                self._peers[reader] = peer
                return

    def close(self) -> None:
        self._socket.close()


class _SocketReader:
    def __init__(self, address: Address) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
        self._socket.connect(address.url)
        self._socket.send_multipart(_hello(address))

    def recv(self, timeout_s: float) -> bytes | None:
        return self._socket.recv() if self._socket.poll(_milliseconds(timeout_s)) else None

    def close(self) -> None:
        self._socket.close()


def _hello(address: Address) -> list[bytes]:
    return [address.token, b"%d" % address.reader]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
