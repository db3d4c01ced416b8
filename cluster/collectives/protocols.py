"""Which protocol of one_shot.cu carries a message, the memory that takes, and how its kernel is launched: all pure."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from cluster.collectives.transports import MappedHostMemory, PeerMemory, Transport

ANY_WAY: Mapping[str, int | None] = {kind.name: None for kind in (PeerMemory, MappedHostMemory)}
MAX_RANKS = 8
SLOTS = 2
PACKET_BYTES = 16


class Protocol(Enum):
    """How a reader knows that data has come; one_shot.cu says how each works."""

    LAMPORT = "lamport"
    SIMPLE = "simple"


@dataclass(frozen=True, slots=True)
class Reach:
    """Of one-shot sums on a transport: Lamport for messages up to `lamport_bytes`, then Simple up to `most_bytes`."""

    lamport_bytes: int
    most_bytes: int

    def protocol(self, n_bytes: int) -> Protocol:
        return Protocol.LAMPORT if n_bytes <= self.lamport_bytes else Protocol.SIMPLE

    def up_to(self, n_bytes: int | None) -> Reach:
        """No further than that; None: as it is."""
        if n_bytes is None:
            return self
        most = n_bytes // PACKET_BYTES * PACKET_BYTES
        return Reach(min(self.lamport_bytes, most), min(self.most_bytes, most))


OF_TWO: dict[type[Transport], Reach] = {
    PeerMemory: Reach(8 << 20, 8 << 20),
    MappedHostMemory: Reach(512 << 10, 4 << 20),
}
"""What two ranks gain from, in µs a sum (two H100s, NVLink or PCIe 5, in CUDA graphs, NCCL of torch 2.11, 2026-11-22):

|                | 16 KB | 256 KB | 512 KB | 1 MB | 2 MB | 4 MB | 8 MB | 16 MB |
|----------------|------:|-------:|-------:|-----:|-----:|-----:|-----:|------:|
| peer, NCCL     |  14.6 |   16.4 |   17.8 | 21.6 | 29.8 | 34.5 | 47.2 |  76.8 |
| peer, Lamport  |   2.3 |    3.3 |    4.0 |  5.4 |  8.7 | 14.7 | 26.1 |  49.7 |
| peer, Simple   |   5.2 |    6.1 |    7.8 |  9.6 | 13.1 | 22.9 | 40.5 |  75.1 |
| host, NCCL     |  21.0 |   46.0 |   55.2 | 69.3 | 97.4 |  167 |  310 |   597 |
| host, Lamport  |   3.9 |   13.2 |   25.3 | 47.7 | 94.7 |  180 |      |       |
| host, Simple   |   7.1 |   17.2 |   27.4 | 49.7 | 83.6 |  150 |  289 |   573 |

Simple takes over where the two are near each other: it has two thirds of the bytes through the host's memory, which
may be slower than theirs. Through peer memory it was only tried. NCCL's LL packets, with a flag beside each word, were
slower than Lamport at every size. Beyond 8 MB peer memory would still gain, but each GPU gives two slots a rank.
"""


def reach(transport: type[Transport], ranks: int) -> Reach:
    """Each rank takes in ranks − 1 messages, and that many bytes decide: so in proportion fewer a message."""
    two = OF_TWO[transport]

    def share(n_bytes: int) -> int:
        return n_bytes // (ranks - 1) // PACKET_BYTES * PACKET_BYTES

    return Reach(share(two.lamport_bytes), share(two.most_bytes))


# -- memory --

CHUNK_PACKETS = 128
"""That Simple's flag vouches for: 2 KB."""
FLAG_PACKETS = 4
"""From one flag to the next: a line of the host's caches, 64 bytes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Of the memory that a rank writes, in packets: two slots of a pair for Lamport, two that all share for Simple."""

    slot_packets: int
    shared_packets: int

    @property
    def pair_bytes(self) -> int:
        """For one reader."""
        return _pages(SLOTS * self.slot_packets)

    @property
    def shared_bytes(self) -> int:
        """For all readers, with Simple's flags after its slots."""
        flags = -(-self.shared_packets // CHUNK_PACKETS) * FLAG_PACKETS
        return _pages(SLOTS * (self.shared_packets + flags))


def layout(reach: Reach) -> Layout:
    by_simple = reach.most_bytes if reach.most_bytes > reach.lamport_bytes else 0
    return Layout(-(-reach.lamport_bytes // PACKET_BYTES), -(-by_simple // PACKET_BYTES))


def _pages(packets: int) -> int:
    """Bytes for them, in whole pages: so each rank's can lie on its own NUMA node."""
    return -(-packets * PACKET_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


# -- launches --

FEW_THREADS, MOST_THREADS = 256, 512
FEW_THREADS_BYTES = 256 << 10
MOST_BLOCKS, BLOCKS_OF_AN_SM = 256, 2
"""Of Lamport. Blocks of 256 are up to 0.3 µs faster to 256 KB, blocks of 512 0.6 µs at 512 KB; 256 blocks of them take
8.7 µs at 2 MB where 128 take 9.1 (the same two GPUs and day, through peer memory)."""
SIMPLE_BLOCKS, SIMPLE_THREADS = 32, 256
"""128 warps took 91 µs at 2 MB, 256 and 384 took 84 and 82, 512 took 91 (the same, through host memory)."""


def launch_shape(protocol: Protocol, n_bytes: int, multiprocessors: int) -> tuple[int, int]:
    """→ (blocks, threads of each) for a message, no more than fit on the GPU at once: they wait for their peers'.

    By Lamport, a packet a thread as far as that goes. By Simple, as few warps as keep the wire busy, so that early
    chunks are summed while later ones travel.
    """
    if protocol is Protocol.SIMPLE:
        chunks = -(-n_bytes // (CHUNK_PACKETS * PACKET_BYTES))
        return min(chunks, SIMPLE_BLOCKS, multiprocessors), SIMPLE_THREADS
    threads = FEW_THREADS if n_bytes <= FEW_THREADS_BYTES else MOST_THREADS
    blocks = -(-n_bytes // (threads * PACKET_BYTES))
    return min(blocks, MOST_BLOCKS, BLOCKS_OF_AN_SM * multiprocessors), threads
