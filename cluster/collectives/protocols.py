"""Which protocol of one_shot.cu carries a message, where its memory lies, and how its kernel is launched: all pure."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from enum import Enum

from cluster.collectives.transports import MappedHostMemory, PeerMemory, Transport

MAX_RANKS = 8
SLOTS = 2
PACKET_BYTES = 16
LL_DATA_BYTES = 8
"""Of data in one of LL's packets; the rest are flags."""


class Protocol(Enum):
    """How a reader knows that data has come; one_shot.cu says how each works."""

    LL = "ll"
    LAMPORT = "lamport"
    SIMPLE = "simple"


@dataclass(frozen=True, slots=True)
class Reach:
    """Of one-shot sums on a transport: LL for messages up to `ll_bytes`, `beyond` it up to `most_bytes`."""

    ll_bytes: int
    beyond: Protocol
    most_bytes: int

    def protocol(self, n_bytes: int) -> Protocol:
        return Protocol.LL if n_bytes <= self.ll_bytes else self.beyond


OF_TWO: dict[type[Transport], Reach] = {
    PeerMemory: Reach(4 << 20, Protocol.LAMPORT, 4 << 20),
    MappedHostMemory: Reach(1 << 20, Protocol.SIMPLE, 1 << 20),
}
"""What two ranks gain from. Through peer memory over NCCL: 9.2 µs against 23 at 1 MB, 15 against 37 at 2 MB, 28
against 42 at 4 MB; through host memory 38 against 54 at 512 KB, 68 against 70 at 1 MB, 145 against 105 at 2 MB, all by
LL (two H100s, NVLink and PCIe 5, in CUDA graphs, 2026-11-22)."""


def reach(transport: type[Transport], ranks: int) -> Reach:
    """Each rank takes in ranks − 1 messages, and that many bytes decide: so in proportion fewer a message."""
    two = OF_TWO[transport]

    def share(n_bytes: int) -> int:
        return n_bytes // (ranks - 1) // PACKET_BYTES * PACKET_BYTES

    return Reach(share(two.ll_bytes), two.beyond, share(two.most_bytes))


# -- memory --

CHUNK_PACKETS = 128
"""That Simple's flag vouches for: 2 KB."""
FLAG_PACKETS = 4
"""From one flag to the next: a line of the host's caches, 64 bytes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Of the memory through which one rank sends, in packets: LL's slots, then the other protocol's, then its flags."""

    ll_packets: int  # of one slot
    data_packets: int  # of one slot

    @property
    def data_at(self) -> int:
        return SLOTS * self.ll_packets

    @property
    def flags_at(self) -> int:
        return self.data_at + SLOTS * self.data_packets

    @property
    def data_bytes(self) -> int:
        """Of both slots."""
        return SLOTS * self.data_packets * PACKET_BYTES

    @property
    def region_bytes(self) -> int:
        """Of all: whole pages, so that each rank's can lie on its own NUMA node."""
        flags = SLOTS * -(-self.data_packets // CHUNK_PACKETS) * FLAG_PACKETS
        return -(-(self.flags_at + flags) * PACKET_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


def layout(reach: Reach) -> Layout:
    beyond = reach.most_bytes if reach.most_bytes > reach.ll_bytes else 0
    return Layout(-(-reach.ll_bytes // LL_DATA_BYTES), -(-beyond // PACKET_BYTES))


# -- launches --

FEW_THREADS, MOST_THREADS = 256, 512
MOST_BLOCKS = 128
"""One packet a thread in blocks of 256 was within 3 % of the best launch up to 256 KB. Beyond that it takes blocks of
512: 5.86 against 6.45 µs at 512 KB, 9.3 against 10.1 at 1 MB (LL on two H100s through peer memory, in CUDA graphs,
2026-11-22). No more blocks than fit on the GPU at once, since they wait for their peers' blocks."""
PACKETS_AT_ONCE = 4
"""That a thread loads of each peer at once, between two ranks; more ranks have fewer, for want of registers."""
CHUNKS_AHEAD = 1
"""That a warp pushes before it sums: by Simple, a flag is on its way meanwhile."""
SIMPLE_BLOCKS, SIMPLE_THREADS = 32, 256


def launch_shape(protocol: Protocol, n_bytes: int, multiprocessors: int) -> tuple[int, int]:
    """→ (blocks, threads of each) for a message: a packet a thread as far as the blocks fit on the GPU together.

    For Simple, as few warps as keep the wire busy, so that early chunks are summed while later ones travel.
    """
    most_blocks = min(MOST_BLOCKS, multiprocessors)
    if protocol is Protocol.SIMPLE:
        chunks = -(-n_bytes // (CHUNK_PACKETS * PACKET_BYTES))
        return min(chunks, SIMPLE_BLOCKS, most_blocks), SIMPLE_THREADS
    packets = -(-n_bytes // (LL_DATA_BYTES if protocol is Protocol.LL else PACKET_BYTES))
    threads = FEW_THREADS if packets <= most_blocks * FEW_THREADS else MOST_THREADS
    return min(-(-packets // threads), most_blocks), threads
