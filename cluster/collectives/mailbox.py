"""Tensors from one GPU's process to another's on the same host, by copy engines: no kernel waits for anybody.

NCCL's send and receive are kernels, and whichever comes first holds processors of its GPU until the other has come:
beside a stage's layers that cost a third of the time of FlashInfer's attention, whose blocks are one for each processor
(two H100s, 2026-11-22). Here the sender's stream copies a message into a slot and then writes its number; the
receiver's stream waits for that number, copies the message out and writes the number back, for which the sender's
waits before it fills the slot anew. What waits is the stream (cuStreamWaitValue32), not a processor.

Slots lie in the receiver's GPU where its peers may write to it, else in memory of the host that both map; numbers
always in the latter. Every copy and wait is on the caller's current stream.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.collectives import cuda
from cluster.collectives.transports import MappedHostMemory

SLOT_ALIGNMENT = 256
NUMBER_BYTES = 64  # from one number to the next: a line of the host's caches
MODULUS = 1 << 32  # numbers are compared as CUDA does, by the sign of their difference in 32 bits


@dataclass(frozen=True, slots=True)
class Slots:
    """Device addresses, as one process sees them."""

    first: int
    count: int
    size: int  # bytes of each

    def address(self, number: int) -> int:
        """Of the slot of the message with that number, which counts from 1."""
        return self.first + (number - 1) % self.count * self.size


@dataclass(frozen=True, slots=True)
class Numbers:
    """Device addresses of the two counters of a mailbox: the sender writes `sent`, the receiver `taken`."""

    sent: int
    taken: int


class _End:
    def __init__(self, slots: Slots, numbers: Numbers) -> None:
        self._slots, self._numbers = slots, numbers
        self._count = 0

    def takes(self, n_bytes: int) -> bool:
        """Whether a message of so many bytes goes this way: the same answer on both ends."""
        return n_bytes <= self._slots.size


class Sender(_End):
    def send(self, tensor: torch.Tensor) -> None:
        """On the current stream, which waits where the receiver is as many messages behind as there are slots."""
        n_bytes = _fitting(tensor, self._slots)
        stream = torch.cuda.current_stream().cuda_stream
        self._count += 1
        if self._count > self._slots.count:
            cuda.wait_for_number(stream, self._numbers.taken, (self._count - self._slots.count) % MODULUS)
        cuda.copy(self._slots.address(self._count), tensor.data_ptr(), n_bytes, stream)
        cuda.write_number(stream, self._numbers.sent, self._count % MODULUS)


class Receiver(_End):
    def expect(self) -> int:
        """The number of the next message. Messages may be left, but not received out of their order."""
        self._count += 1
        return self._count

    def receive(self, tensor: torch.Tensor, number: int) -> None:
        """That message, into `tensor`, once the current stream has come so far."""
        n_bytes = _fitting(tensor, self._slots)
        stream = torch.cuda.current_stream().cuda_stream
        cuda.wait_for_number(stream, self._numbers.sent, number % MODULUS)
        cuda.copy(tensor.data_ptr(), self._slots.address(number), n_bytes, stream)
        cuda.write_number(stream, self._numbers.taken, number % MODULUS)


def _fitting(tensor: torch.Tensor, slots: Slots) -> int:
    if tensor.nbytes > slots.size or not tensor.is_contiguous():
        raise ValueError(
            f"a message of {tensor.nbytes} bytes; slots have {slots.size}, for contiguous tensors"
        )
    return tensor.nbytes


# -- setting up: every rank of a replica takes every step --


@dataclass(frozen=True, slots=True)
class Wire:
    """A mailbox of a replica: from one rank to another, for messages of at most so many bytes."""

    sender: int
    receiver: int
    slot_bytes: int
    slots: int

    @property
    def region_bytes(self) -> int:
        size = -(-self.slot_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        return -(-self.slots * size // mmap.PAGESIZE) * mmap.PAGESIZE

    def slots_at(self, address: int) -> Slots:
        return Slots(address, self.slots, -(-self.slot_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT)


class Post:
    """One rank's ends of all wires. `offer` on every rank, its answers to `open` on every rank; either may raise."""

    def __init__(self, rank: int, ranks: int, wires: Sequence[Wire], peer_access: bool) -> None:
        self._rank, self._wires, self._peer_access = rank, tuple(wires), peer_access
        numbers = 2 * NUMBER_BYTES * len(self._wires)
        data = 0 if peer_access else sum(wire.region_bytes for wire in self._wires)
        self._data_at = -(-numbers // mmap.PAGESIZE) * mmap.PAGESIZE  # in the first rank's part
        self._host = MappedHostMemory(rank, ranks, 0, self._data_at + data)
        self._own: dict[Wire, int] = {}
        self._opened: list[int] = []

    def offer(self) -> list[bytes]:
        """The host's memory, then the GPU's for each wire that ends here."""
        told = [self._host.offer()]
        for wire in self._wires:
            if self._peer_access and wire.receiver == self._rank:
                self._own[wire] = cuda.allocate(wire.region_bytes, 0)
                told.append(cuda.export(self._own[wire]))
        return told

    def open(self, offers: Sequence[Sequence[bytes]]) -> tuple[dict[Wire, Sender], dict[Wire, Receiver]]:
        """`offers` of all ranks, by rank."""
        first = self._host.open([offer[0] for offer in offers]).shared[0]
        senders: dict[Wire, Sender] = {}
        receivers: dict[Wire, Receiver] = {}
        exported = [iter(offer[1:]) for offer in offers]
        data = first + self._data_at
        for index, wire in enumerate(self._wires):
            at = first + 2 * NUMBER_BYTES * index
            numbers = Numbers(at, at + NUMBER_BYTES)
            handle = next(exported[wire.receiver]) if self._peer_access else b""
            if wire.sender == self._rank:
                if self._peer_access:
                    self._opened.append(cuda.open_exported(handle))
                senders[wire] = Sender(
                    wire.slots_at(self._opened[-1] if self._peer_access else data), numbers
                )
            if wire.receiver == self._rank:
                receivers[wire] = Receiver(wire.slots_at(self._own.get(wire, data)), numbers)
            data += wire.region_bytes
        return senders, receivers

    def close(self) -> None:
        """Nothing may be sent or received after it. The own memory stays: peers may still have it open."""
        for address in self._opened:
            cuda.close_exported(address)
        self._opened.clear()
        self._host.close()
