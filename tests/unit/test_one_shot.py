"""One-shot all-reduce as far as it goes without a GPU: sizes, agreement among ranks, shared memory, compilation."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_uint32
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.collectives import cuda, one_shot, transports
from cluster.collectives.one_shot import (
    DTYPES,
    TRIAL_ROUNDS,
    Members,
    OneShot,
    Unusable,
    compile_kernels,
    open_one_shot,
    trial_sizes,
)
from cluster.collectives.protocols import (
    ANY_WAY,
    CHUNK_PACKETS,
    FLAG_PACKETS,
    MAX_RANKS,
    OF_TWO,
    PACKET_BYTES,
    SIMPLE_BLOCKS,
    SIMPLE_THREADS,
    Protocol,
    Reach,
    launch_shape,
    layout,
    reach,
)
from cluster.collectives.transports import NOTHING_BYTE, MappedHostMemory, PeerMemory, Transport

TRANSPORTS = (PeerMemory, MappedHostMemory)


class Two(Members):
    """This rank and another, which answers by itself with `says`; `says` of None echoes this rank."""

    def __init__(self, says: bytes | None = None, ranks: int = 2) -> None:
        self.rank, self.ranks, self.device = 0, ranks, torch.device("cpu")
        self._says = says

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if self._says is None:
            return [tensor, tensor]
        other = (len(self._says).to_bytes(2, "little") + self._says).ljust(len(tensor), b"\0")
        return [tensor, torch.frombuffer(bytearray(other), dtype=torch.uint8)]


PAGE = os.sysconf("SC_PAGESIZE")
needs_nvrtc = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is there for Linux and Windows alone")
BOTH = Reach(64 << 10, 1 << 20)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_ranks_send_smaller_messages_of_whole_packets(transport: type[Transport]) -> None:
    reaches = [reach(transport, ranks) for ranks in range(2, MAX_RANKS + 1)]
    assert reaches[0] == OF_TWO[transport]
    most = [one.most_bytes for one in reaches]
    assert most == sorted(set(most), reverse=True)
    assert all(0 < one.lamport_bytes <= one.most_bytes for one in reaches)
    assert all(one.lamport_bytes % PACKET_BYTES == one.most_bytes % PACKET_BYTES == 0 for one in reaches)


def test_a_message_goes_by_lamport_up_to_its_border() -> None:
    found = [BOTH.protocol(n_bytes) for n_bytes in (2, 64 << 10, (64 << 10) + 2, 1 << 20)]
    assert found == [Protocol.LAMPORT, Protocol.LAMPORT, Protocol.SIMPLE, Protocol.SIMPLE]


@pytest.mark.parametrize("lamport_bytes", [2, 4096, 262144 // 7, 3 << 20])
def test_memory_has_two_slots_for_each_protocol_and_its_flags_in_whole_pages(lamport_bytes: int) -> None:
    most_bytes = 3 << 20
    memory = layout(Reach(lamport_bytes, most_bytes))
    assert 0 <= memory.slot_packets * PACKET_BYTES - lamport_bytes < PACKET_BYTES
    assert 0 <= memory.pair_bytes - 2 * memory.slot_packets * PACKET_BYTES < PAGE
    if lamport_bytes == most_bytes:
        assert memory.shared_bytes == 0
    else:
        flags = -(-most_bytes // (CHUNK_PACKETS * PACKET_BYTES)) * FLAG_PACKETS
        assert 0 <= memory.shared_bytes - 2 * (most_bytes + flags * PACKET_BYTES) < PAGE
    assert memory.pair_bytes % PAGE == memory.shared_bytes % PAGE == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_only_memory_of_the_host_is_asked_for_what_all_ranks_read(transport: type[Transport]) -> None:
    memory = layout(reach(transport, 3))
    transport(0, 3, memory.pair_bytes, memory.shared_bytes)  # raises where it has none
    assert (memory.shared_bytes > 0) == (transport is MappedHostMemory)


@pytest.mark.parametrize(
    ("n_bytes", "multiprocessors", "blocks", "threads"),
    [
        (2, 132, 1, 256),
        (4096, 132, 1, 256),
        (4098, 132, 2, 256),
        (16 << 10, 132, 4, 256),
        (256 << 10, 132, 64, 256),
        ((256 << 10) + 2, 132, 33, 512),
        (1 << 20, 132, 128, 512),
        (2 << 20, 132, 256, 512),
        (8 << 20, 132, 256, 512),
        (8 << 20, 46, 92, 512),
    ],
)
def test_a_thread_has_one_packet_while_the_blocks_fit_on_the_gpu(
    n_bytes: int, multiprocessors: int, blocks: int, threads: int
) -> None:
    assert launch_shape(Protocol.LAMPORT, n_bytes, multiprocessors) == (blocks, threads)


@pytest.mark.parametrize("multiprocessors", [16, 132])
@pytest.mark.parametrize("n_bytes", [2, 2048, 2050, 100_000, 8 << 20])
def test_simple_has_no_more_blocks_than_chunks_or_room(n_bytes: int, multiprocessors: int) -> None:
    blocks, threads = launch_shape(Protocol.SIMPLE, n_bytes, multiprocessors)
    assert blocks == min(-(-n_bytes // (CHUNK_PACKETS * PACKET_BYTES)), SIMPLE_BLOCKS, multiprocessors)
    assert threads == SIMPLE_THREADS


def test_a_trial_crosses_the_border_with_every_dtype_and_reaches_the_end() -> None:
    sizes = trial_sizes(BOTH)
    drawn = {(size, dtype.itemsize) for size, dtype in islice(zip(cycle(sizes), cycle(DTYPES)), TRIAL_ROUNDS)}
    assert drawn == {(size, n_bytes) for size in sizes for n_bytes in (2, 4)}
    carried = {size * n_bytes for size, n_bytes in drawn}
    assert {BOTH.lamport_bytes, BOTH.lamport_bytes + 2, BOTH.lamport_bytes + 4, BOTH.most_bytes} <= carried
    assert max(carried) == BOTH.most_bytes
    assert any(n > BOTH.lamport_bytes and n % PACKET_BYTES not in (0, 2, 4) for n in carried)


def test_a_tensor_that_its_packets_memory_cannot_hold_is_refused() -> None:
    end = object.__new__(OneShot)  # without a GPU to launch on
    end.max_bytes = reach(MappedHostMemory, 4).most_bytes
    with pytest.raises(ValueError, match=rf"takes {end.max_bytes} at most: ask takes\(\) first"):
        end.all_reduce(torch.zeros(end.max_bytes + 1, dtype=torch.uint8))


def test_ranks_hear_what_all_returned() -> None:
    assert Two(b"+theirs").everyone(lambda: b"mine") == [b"mine", b"theirs"]


def test_one_ranks_trouble_is_every_ranks_reason() -> None:
    with pytest.raises(Unusable, match=r"^rank 1: no such link$"):
        Two(b"-rank 1: no such link").everyone(lambda: b"mine")

    def fails() -> bytes:
        raise LookupError("first line\nsecond line")

    with pytest.raises(Unusable, match=r"^rank 0: first line$"):
        Two(b"+").everyone(fails)


def test_long_reasons_are_cut_to_what_is_sent() -> None:
    def fails() -> bytes:
        raise OSError("x" * 1000)

    with pytest.raises(Unusable, match=r"^rank 0: x{200}"):
        Two(b"+").everyone(fails)


def test_ranks_of_several_hosts_stay_with_nccl() -> None:
    assert open_one_shot(Two(b"+another boot"), 1.0, ANY_WAY, False) == (
        None,
        "NCCL: the stage's ranks are on several hosts",
    )


def test_too_many_ranks_stay_with_nccl() -> None:
    found, path = open_one_shot(Two(ranks=MAX_RANKS + 1), 1.0, ANY_WAY, False)
    assert found is None
    assert path == "NCCL: 9 ranks, and one-shot all-reduce is for 8 at most"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_the_reason_says_what_is_missing() -> None:
    found, path = open_one_shot(Two(), 1.0, ANY_WAY, False)
    assert found is None
    assert path.startswith("NCCL: rank 0: ")
    assert "CUDA" in path or "NVIDIA" in path


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_each_transport_that_fails_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_shot, "compiled", lambda members: b"")
    tried = "rank 0"
    for ways, words in (
        (ANY_WAY, [tried, tried]),
        ({"mapped host memory": 4096}, ["not trusted here", tried]),
        ({"peer memory": 15, "mapped host memory": None}, ["slower at every size that was measured", tried]),
    ):
        found, path = open_one_shot(Two(), 1.0, ways, False)
        assert found is None
        reasons = [reason.split(": ")[:2] for reason in path.removeprefix("NCCL: ").split("; ")]
        assert reasons == [["peer memory", words[0]], ["mapped host memory", words[1]]]


@pytest.mark.parametrize(
    ("limit", "lamport_bytes", "most_bytes"),
    [(None, 64 << 10, 1 << 20), (100_000, 64 << 10, 100_000), (1023, 1008, 1008), (0, 0, 0)],
)
def test_a_measured_limit_shortens_the_reach(limit: int | None, lamport_bytes: int, most_bytes: int) -> None:
    assert BOTH.up_to(limit) == Reach(lamport_bytes, most_bytes)


def test_ranks_read_in_the_file_what_the_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "register_host", lambda address, n_bytes: address)
    monkeypatch.setattr(cuda, "unregister_host", lambda address: None)
    ranks, memory = 3, layout(BOTH)
    ends = [MappedHostMemory(rank, ranks, memory.pair_bytes, memory.shared_bytes) for rank in range(ranks)]
    offers = [end.offer() for end in ends]
    wires = [end.open(offers) for end in ends]
    for wire in wires:
        pair, shared = bytes([NOTHING_BYTE]) * memory.pair_bytes, bytes(memory.shared_bytes)
        assert [ctypes.string_at(wire.by_rank[other], memory.pair_bytes) for other in range(3)] == [pair] * 3
        assert [ctypes.string_at(wire.shared[other], memory.shared_bytes) for other in range(3)] == [
            shared
        ] * 3
    for rank, wire in enumerate(wires):
        for number, address in enumerate(wire.to):
            ctypes.memset(address, 16 * rank + number, memory.pair_bytes)
        ctypes.memset(wire.shared[rank], 16 * rank + 8, memory.shared_bytes)
    for rank, wire in enumerate(wires):
        for other in set(range(ranks)) - {rank}:
            number = rank - (rank > other)  # of this rank among the other's peers
            pair = ctypes.string_at(wire.by_rank[other], memory.pair_bytes)
            shared = ctypes.string_at(wire.shared[other], memory.shared_bytes)
            assert set(pair) == {16 * other + number}
            assert set(shared) == {16 * other + 8}
    for end in ends:
        end.close()
    assert not os.path.exists(offers[0].split()[0])


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_every_part_lies_near_its_writers_gpu_whichever_rank_is_first(
    opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = iter(("0000:01:00.0", "0000:41:00.0", "0000:81:00.0"))
    monkeypatch.setattr(cuda, "pci_address", lambda: next(gpus))
    monkeypatch.setattr(cuda, "unregister_host", lambda address: None)
    placed: list[tuple[str, int]] = []

    def pages_there() -> int:
        return os.stat(offers[0].split()[0]).st_blocks * 512

    @contextmanager
    def noted(gpu: str) -> Iterator[None]:
        yield
        placed.append((gpu, pages_there()))

    def registered(address: int, n_bytes: int) -> int:
        placed.append(("all", n_bytes))
        return address

    monkeypatch.setattr(cuda, "register_host", registered)
    monkeypatch.setattr(transports, "local_cores", lambda gpu: gpu)
    monkeypatch.setattr(transports, "on_cores", noted)
    part = 3 * 8 * PAGE + 5 * PAGE
    ends = [MappedHostMemory(rank, 3, 8 * PAGE, 5 * PAGE) for rank in range(3)]
    offers = [end.offer() for end in ends]
    ends[opened].open(offers)
    assert placed == [
        ("0000:01:00.0", part),
        ("0000:41:00.0", 2 * part),
        ("0000:81:00.0", 3 * part),
        ("all", 3 * part),
    ]
    ends[opened].close()
    ends[0].close()


def test_a_thread_leaves_its_cores_for_a_while_and_only_where_it_may() -> None:
    allowed = os.sched_getaffinity(0)
    one = min(allowed)
    with transports.on_cores({one, 100_000}):
        assert os.sched_getaffinity(0) == {one}
    assert os.sched_getaffinity(0) == allowed
    with transports.on_cores({100_000}):
        assert os.sched_getaffinity(0) == allowed


def test_a_file_that_is_not_the_first_ranks_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"keep" * 4096)
    with foreign.open("rb") as file:
        offer = f"/proc/{os.getpid()}/fd/{file.fileno()} shardwise-0123456789abcdef".encode()
        with pytest.raises(OSError, match="is not the first rank's memory, so it runs in another container"):
            MappedHostMemory(1, 2, 4096, 4096).open([offer, b""])
    assert foreign.read_bytes() == b"keep" * 4096


@pytest.mark.parametrize("overlap", [False, True])
def test_a_launch_reaches_the_driver_as_cuda_h_lays_it_out(
    monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    seen: list[tuple[int, ...]] = []

    def launched(config: Any, function: object, arguments: Any, extra: None) -> int:
        *shape, stream, attributes, count = struct.unpack("7I4xQQI4x", bytes(config._obj))
        seen.extend(struct.iter_unpack("i4xi60x", ctypes.string_at(attributes, 72 * count)))
        seen.append((*shape, stream, c_uint32.from_address(arguments[1]).value))
        return 0

    driver = SimpleNamespace(cuModuleGetFunction=lambda *_: 0, cuLaunchKernelEx=launched)
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    kernel = cuda.Kernel(ctypes.c_void_p(), "all_reduce_bfloat16")
    kernel.launch(5, 256, 0x7F00_1234_5678, ctypes.c_uint64(1), c_uint32(42), overlap=overlap)
    allowed = (6, 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert seen == [allowed] * overlap + [(5, 1, 1, 256, 1, 1, 0, 0x7F00_1234_5678, 42)]


@needs_nvrtc
@pytest.mark.parametrize(
    ("architecture", "ranks"),
    [("sm_75", MAX_RANKS), ("sm_80", 2), ("sm_86", 2), ("sm_89", 2), ("sm_90", 3)],
)
def test_the_source_compiles_for_every_generation_since_turing(architecture: str, ranks: int) -> None:
    """By the compiler of NVIDIA's wheel, with nothing of a toolkit on the loader's path: as on a user's machine."""
    binary = compile_kernels(architecture, ranks)
    for protocol in Protocol:
        for name in DTYPES.values():
            assert f"all_reduce_{protocol.value}_{name}".encode() in binary


@needs_nvrtc
def test_a_source_that_does_not_compile_is_an_error_with_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)sm_90.*undeclared_thing"):
        cuda.compile_source("int x = undeclared_thing;", "sm_90", {})
