"""Small all-reduces of one host's GPUs in one kernel, through peer memory or through mapped host memory.

A decode step does two all-reduces a layer: 8 KB for one sequence, 2 MB for 256, so latency is most of it. NCCL takes
14.6 µs for 16 KB over NVLink and 21 µs through host memory, this kernel 2.3 and 3.9 µs (two H100s, in CUDA graphs,
2026-11-22); protocols.py has the other sizes, one_shot.cu how it works. It is not fused with the residual add and
RMSNorm after it: one kernel for all took 4.65 µs for a token of 4096, the sum and a kernel for the norm 2.84 + 1.26 µs
(bfloat16, the same two, that day).

All ranks must call it in the same order, each on one stream at a time. A rank whose peer does not come waits
`patience_s` and then goes on with wrong sums, so that no GPU spins for ever: `check` tells, and is cheap.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.collectives import cuda
from cluster.collectives.protocols import (
    BLOCKS_OF_AN_SM,
    CHUNK_PACKETS,
    FLAG_PACKETS,
    MAX_RANKS,
    MOST_THREADS,
    SIMPLE_THREADS,
    Protocol,
    Reach,
    launch_shape,
    layout,
    reach,
)
from cluster.collectives.transports import MappedHostMemory, PeerMemory, Transport, Wires
from cluster.errors import GangDied

LOADED_BYTES = 8
"""That kernels load at once from any tensor; 16 where it lies on a multiple of that."""
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}

TRIAL_ROUNDS = 24
TRIAL_PATIENCE_S = 5.0  # the ranks come to the trial together, so a longer wait is a dead link
_MESSAGE_BYTES = 256  # of what a rank tells the others while they set up: a handle, a path or a reason


class Unusable(Exception):
    """Why the ranks cannot use a transport; the same on all of them."""


# -- the kernel's arguments, as one_shot.cu has them --


class _Links(ctypes.Structure):
    _fields_ = [
        ("to", ctypes.c_uint64 * MAX_RANKS),
        ("by_rank", ctypes.c_uint64 * MAX_RANKS),
        ("shared", ctypes.c_uint64 * MAX_RANKS),
        ("state", ctypes.c_uint64),
        ("silent_rank", ctypes.c_uint64),
        ("patience_ns", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("let_in_early", ctypes.c_uint32),
        ("slot_packets", ctypes.c_uint32),
        ("shared_packets", ctypes.c_uint32),
    ]


def compile_kernels(architecture: str, ranks: int) -> bytes:
    """one_shot.cu for so many ranks on an `architecture` like "sm_90". Needs NVRTC but no GPU."""
    source = Path(__file__).with_name("one_shot.cu").read_text()
    return cuda.compile_source(source, architecture, sizes(ranks))


def sizes(ranks: int) -> dict[str, int]:
    """What one_shot.cu is compiled with."""
    return {
        "RANKS": ranks,
        "MAX_RANKS": MAX_RANKS,
        "LINKS_BYTES": ctypes.sizeof(_Links),
        "MOST_THREADS": MOST_THREADS,
        "BLOCKS_OF_AN_SM": BLOCKS_OF_AN_SM,
        "SIMPLE_THREADS": SIMPLE_THREADS,
        "CHUNK_PACKETS": CHUNK_PACKETS,
        "FLAG_PACKETS": FLAG_PACKETS,
    }


class OneShot:
    """One rank's end. Its kernels run on the current stream and may be captured in a CUDA graph."""

    def __init__(
        self,
        transport: Transport,
        wires: Wires,
        rank: int,
        reach: Reach,
        binary: bytes,
        device: torch.device,
    ) -> None:
        """`rank` counts in the group; `binary` is `compile_kernels`' for the device and the number of ranks."""
        self.path = transport.name
        self.max_bytes = reach.most_bytes
        self._reach = reach
        self._transport, self._device = transport, device
        properties = torch.cuda.get_device_properties(device)
        self._multiprocessors: int = properties.multi_processor_count
        self.overlap: bool = properties.major >= 9
        """Whether kernels launched or captured from now on may start before their predecessor on the stream has
        ended (programmatic dependent launch; compute capability 9.0, Hopper, brought it)."""
        module = cuda.load(binary)
        self._sum = {
            (protocol, dtype): cuda.Kernel(module, f"all_reduce_{protocol.value}_{name}")
            for protocol in Protocol
            for dtype, name in DTYPES.items()
        }
        self._state = torch.tensor([1, 0, 0], dtype=torch.int32, device=device)
        self._silent_memory = torch.zeros(1, dtype=torch.int32, pin_memory=True)  # kernels write it
        self._silent_rank = ctypes.c_uint32.from_address(self._silent_memory.data_ptr())
        memory = layout(reach)
        self._links = _Links(
            rank=rank, slot_packets=memory.slot_packets, shared_packets=memory.shared_packets
        )
        self._links.to[: len(wires.to)] = wires.to
        self._links.by_rank[: len(wires.by_rank)] = wires.by_rank
        self._links.shared[: len(wires.shared)] = wires.shared
        self._links.state = self._state.data_ptr()
        self._links.silent_rank = self._silent_memory.data_ptr()
        self.wait_at_most(TRIAL_PATIENCE_S)

    def wait_at_most(self, patience_s: float) -> None:
        """How long kernels launched or captured from now on wait for a peer."""
        self._links.patience_ns = int(patience_s * 1e9)

    def let_successors_in_early(self, early: bool) -> None:
        """Whether the next kernel on the stream may take places on the GPU while this one waits for peers.

        Only where no peer's sum hangs on kernels of other streams here, as a pipeline's sends are: they may get none.
        """
        self._links.let_in_early = early

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether `all_reduce` is for this tensor: the same answer on all ranks for the same shape."""
        fits = tensor.is_cuda and tensor.nbytes <= self.max_bytes
        return fits and tensor.dtype in DTYPES and tensor.is_contiguous()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place and returned; added in float32 in rank order and rounded once.

        Raises ValueError for a tensor beyond `max_bytes`, whose packets would land in other ranks' memory.
        """
        if tensor.nbytes > self.max_bytes:
            raise ValueError(
                f"{tensor.nbytes} bytes; a one-shot all-reduce here takes {self.max_bytes} at most: ask takes() first"
            )
        if tensor.data_ptr() % LOADED_BYTES:  # a view that begins between what kernels load at once
            return tensor.copy_(self.all_reduce(tensor.clone()))
        if tensor.nbytes:
            protocol = self._reach.protocol(tensor.nbytes)
            with torch.cuda.device(self._device):
                self._sum[protocol, tensor.dtype].launch(
                    *launch_shape(protocol, tensor.nbytes, self._multiprocessors),
                    torch.cuda.current_stream().cuda_stream,
                    self._links,
                    ctypes.c_uint64(tensor.data_ptr()),
                    ctypes.c_uint32(tensor.nbytes // 2),
                    overlap=self.overlap,
                )
        return tensor

    def check(self) -> None:
        """Raises GangDied if a kernel that has ended waited in vain, with the group's rank that stayed silent."""
        silent = self._silent_rank.value
        if silent:
            waited_s = self._links.patience_ns / 1e9
            raise GangDied(
                f"rank {self._links.rank} of the stage: rank {silent - 1} did not come to an all-reduce through"
                f" {self.path} in {waited_s:g} s, so it died or stopped"
            )

    def close(self) -> None:
        """Nothing may be launched or replayed after it."""
        torch.cuda.synchronize(self._device)
        self._transport.close()


# -- setting up: every rank takes every step, so that all decide alike --


class Members:
    """The ranks of a group while they set up, talking through NCCL."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.device = device
        self._group = group

    def everyone(self, action: Callable[[], bytes]) -> list[bytes]:
        """What `action` returned on each rank. Where it raised on any, raises Unusable on all, with its reason."""
        try:
            message = b"+" + action()
        except Exception as error:  # of any kind: the others would wait for this rank
            words = str(error).strip().splitlines() or [type(error).__name__]
            message = f"-rank {self.rank}: {words[0]}".encode()[:_MESSAGE_BYTES]
        answers = self._exchange(message)
        for answer in answers:
            if answer.startswith(b"-"):
                raise Unusable(answer[1:].decode(errors="replace"))
        return [answer[1:] for answer in answers]

    def _exchange(self, message: bytes) -> list[bytes]:
        padded = len(message).to_bytes(2, "little") + message.ljust(_MESSAGE_BYTES, b"\0")
        own = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(self.device)
        texts = [bytes(part.cpu().numpy()) for part in self.gather(own)]
        return [text[2 : 2 + int.from_bytes(text[:2], "little")] for text in texts]

    def sum_in_rank_order(self, tensor: torch.Tensor) -> torch.Tensor:
        """What `all_reduce` must give, to the bit."""
        first, *others = self.gather(tensor)
        total = first.float()
        for part in others:
            total = total + part.float()
        return total.to(tensor.dtype)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, which all have one shape."""
        parts = [torch.empty_like(tensor) for _ in range(self.ranks)]
        dist.all_gather(parts, tensor, group=self._group)
        return parts


def open_one_shot(
    members: Members, patience_s: float, ways: Mapping[str, int | None], pipelined: bool
) -> tuple[OneShot | None, str]:
    """The fastest way that works, and its name; or None and "NCCL: why not". The same on all ranks.

    Every rank of the group calls it at once. `ways` are the transports that may be used, by name, with the bytes up to
    which they beat NCCL on this machine; None: as on the machines of protocols.py. `pipelined` is whether the GPUs also
    send and receive on other streams.
    """
    if members.ranks > MAX_RANKS:
        return None, f"NCCL: {members.ranks} ranks, and one-shot all-reduce is for {MAX_RANKS} at most"
    reasons = []
    try:
        if len(set(members.everyone(this_host))) > 1:
            return None, "NCCL: the stage's ranks are on several hosts"
        binary = compiled(members)
    except Unusable as error:
        return None, f"NCCL: {error}"
    for transport in (PeerMemory, MappedHostMemory):
        if transport.name not in ways:
            reasons.append(f"{transport.name}: not trusted here")
            continue
        reached = reach(transport, members.ranks).up_to(ways[transport.name])
        if not reached.most_bytes:
            reasons.append(f"{transport.name}: slower at every size that was measured")
            continue
        try:
            one_shot = opened(members, transport, reached, binary)
        except Unusable as error:
            reasons.append(f"{transport.name}: {error}")
        else:
            one_shot.wait_at_most(patience_s)
            one_shot.let_successors_in_early(not pipelined)
            return one_shot, one_shot.path
    return None, f"NCCL: {'; '.join(reasons)}"


def this_host() -> bytes:
    """The boot's id, which no two hosts share; where a sandbox shows none, the name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return socket.gethostname().encode()


def compiled(members: Members) -> bytes:
    binary = b""

    def compile_for_device() -> bytes:
        nonlocal binary
        major, minor = torch.cuda.get_device_capability(members.device)
        binary = compile_kernels(f"sm_{major}{minor}", members.ranks)
        return b""

    members.everyone(compile_for_device)
    return binary


def opened(members: Members, kind: type[Transport], reached: Reach, binary: bytes) -> OneShot:
    """Tried and trusted, or Unusable."""
    memory = layout(reached)
    transport = kind(members.rank, members.ranks, memory.pair_bytes, memory.shared_bytes)
    ends: list[OneShot] = []

    def connect(offers: Sequence[bytes]) -> bytes:
        wires = transport.open(offers)
        ends.append(OneShot(transport, wires, members.rank, reached, binary, members.device))
        return b""

    try:
        offers = members.everyone(transport.offer)
        members.everyone(lambda: connect(offers))
        trials = _trials(members, reached)
        members.everyone(lambda: _try_out(ends[0], trials))
    except Unusable:
        with suppress(RuntimeError):
            transport.close()
        raise
    return ends[0]


def _trials(members: Members, reached: Reach) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random tensors of this rank, and their sums over the ranks as NCCL's gather and additions in order give them."""
    generator = torch.Generator(members.device).manual_seed(members.rank)
    sizes = trial_sizes(reached)
    trials = []
    for size, dtype in islice(zip(cycle(sizes), cycle(DTYPES), strict=False), TRIAL_ROUNDS):
        tensor = torch.randn(size, generator=generator, device=members.device).to(dtype)
        trials.append((tensor, members.sum_in_rank_order(tensor)))
    return trials


def trial_sizes(reached: Reach) -> list[int]:
    """In elements of any dtype, for both protocols; with 3 dtypes, `TRIAL_ROUNDS` have all pairs.

    The first after a border, for elements of 4 bytes and of 2, and ends inside a packet and inside a chunk.
    """
    border, most = reached.lamport_bytes // 4, reached.most_bytes // 4
    wanted = (1, 3000, border, border + 1, 2 * border + 1, most, most // 2 + 1, (border + most) // 2 - 13)
    return [min(max(size, 1), most) for size in wanted]


def _try_out(one_shot: OneShot, trials: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bytes:
    """Compares bits, since drivers have been seen to grant links that corrupt data."""
    wrong = [
        (one_shot.all_reduce(tensor).view(torch.uint8) != right.view(torch.uint8)).any()
        for tensor, right in trials
    ]
    rounds = int(torch.stack(wrong).sum().item())
    one_shot.check()
    if rounds:
        raise RuntimeError(f"{rounds} of {len(trials)} trial sums were wrong: the link corrupts data")
    return b""
