"""Collectives through torch.distributed: NCCL on GPUs, gloo on CPUs. Small sums of GPUs go through one_shot.py.

A process is in one world at a time, that of its replica. A rank that dies or stops shows as GangDied on its
peers: at once where the connection breaks, after `timeout_s` where it only falls silent.

On one host's cores gloo's own ring and ring-gather cost their threads' wake-ups: 0.8 ms for two ranks and
5.3 ms for four, from 2 KB to 150 KB, where all through the first rank takes 0.12 and 0.7 ms (torch 2.13,
2 cores of a Xeon, loopback; at 1.2 MB still 1.3 against 2.7 ms). So tensors on a CPU go that way.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from cluster.collectives.one_shot import Members, OneShot, open_one_shot
from cluster.collectives.protocols import ANY_WAY
from cluster.errors import GangDied
from cluster.loopback import loopback_interface

SENDS_IN_FLIGHT = 8
"""Sends that a rank starts before it waits for its oldest. A pipeline has at most pp batches in flight, so
this is reached only where the peer lags; the tensors must live until sent, so it also bounds memory."""

P2P_CHANNELS = 2
"""Of NCCL's sends and receives, each a block of threads that holds a processor of the GPU from when the first side is
ready until the other has come: its own 16 and more would take them from the layers that run meanwhile. torch can tell
NCCL only by the environment; a user's own value wins."""

_CORRUPT = "the link corrupts data; try NCCL_P2P_DISABLE=1"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Incoming:
    """A tensor that is being received or summed (satisfies collectives.Incoming)."""

    tensor: torch.Tensor
    work: dist.Work | None

    def landed(self) -> torch.Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


class RankGroup:
    """The ranks of one stage (satisfies StageGroup)."""

    def __init__(self, ranks: list[int], rank: int, group: dist.ProcessGroup | None) -> None:
        """`ranks` are world ranks in tp order, `rank` is this one; `group` is None for a group of one."""
        self._ranks = ranks
        self._rank = rank
        self._index = ranks.index(rank)
        self._group = group
        self._one_shot: OneShot | None = None
        self.path = "none: one rank" if group is None else dist.get_backend(group)
        """How small sums go, and why not faster: "peer memory", "mapped host memory" or "NCCL: why"."""

    def open_one_shot(
        self, device: torch.device, patience_s: float, ways: Mapping[str, int | None], pipelined: bool
    ) -> None:
        """Find the fastest way for small sums of tensors on GPUs. All ranks of the stage call it at once."""
        if self._group is None or device.type != "cuda":
            return
        try:
            members = Members(self._group, device)
            self._one_shot, self.path = open_one_shot(members, patience_s, ways, pipelined)
        except RuntimeError as error:
            raise _gang_died("setting up small all-reduces", self._rank, error) from error

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place and returned; the same bits on every rank."""
        if self._group is None:
            return tensor
        with self._naming("all-reduce", tensor):
            if self._one_shot is not None and self._one_shot.takes(tensor):
                self._one_shot.check()
                self._one_shot.all_reduce(tensor)
            elif tensor.is_cpu:
                self._sum_at_first(tensor)
            else:
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def start_all_reduce(self, tensor: torch.Tensor) -> Incoming:
        """The same, beside what this stream computes next; a small one is done before that."""
        small = self._one_shot is not None and self._one_shot.takes(tensor)
        if self._group is None or small or tensor.is_cpu:
            return Incoming(self.all_reduce(tensor), None)
        with self._naming("all-reduce", tensor):
            return Incoming(tensor, dist.all_reduce(tensor, group=self._group, async_op=True))

    def all_gather_columns(self, tensor: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """[tokens, own width] → [tokens, sum of widths], columns in rank order; `widths` of all ranks."""
        if self._group is None:
            return tensor
        if tensor.is_cpu:
            with self._naming("all-gather", tensor):
                return self._gather_at_first(tensor, widths)
        padded = tensor.new_zeros(tensor.shape[0], max(widths))
        padded[:, : tensor.shape[1]] = tensor
        parts = [torch.empty_like(padded) for _ in widths]
        with self._naming("all-gather", tensor):
            dist.all_gather(parts, padded, group=self._group)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def check(self) -> None:
        """Raises GangDied where a small sum on the GPU waited in vain. To be called at every step: it is cheap."""
        if self._one_shot is not None:
            self._one_shot.check()

    def close(self) -> None:
        """Give up the memory that small sums went through."""
        if self._one_shot is not None:
            self._one_shot.close()
            self._one_shot = None

    def _sum_at_first(self, tensor: torch.Tensor) -> None:
        """The first rank adds all up in rank order and sends the sum back."""
        if self._index > 0:
            dist.send(tensor, self._ranks[0], group=self._group)
            dist.recv(tensor, self._ranks[0], group=self._group)
            return
        part = torch.empty_like(tensor)
        for rank in self._ranks[1:]:
            dist.recv(part, rank, group=self._group)
            tensor += part
        self._tell_others(tensor)

    def _gather_at_first(self, tensor: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """The first rank puts the columns together and sends all of them back."""
        if self._index > 0:
            dist.send(tensor.contiguous(), self._ranks[0], group=self._group)
            whole = tensor.new_empty(tensor.shape[0], sum(widths))
            dist.recv(whole, self._ranks[0], group=self._group)
            return whole
        parts = [tensor, *(tensor.new_empty(tensor.shape[0], width) for width in widths[1:])]
        for rank, part in zip(self._ranks[1:], parts[1:], strict=True):
            dist.recv(part, rank, group=self._group)
        whole = torch.cat(parts, dim=1)
        self._tell_others(whole)
        return whole

    def _tell_others(self, tensor: torch.Tensor) -> None:
        for work in [dist.isend(tensor, rank, group=self._group) for rank in self._ranks[1:]]:
            _finish(work)

    @contextmanager
    def _naming(self, what: str, tensor: torch.Tensor) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:  # this rank's own trouble
            raise
        except RuntimeError as error:
            where = f"of {list(tensor.shape)} over ranks {self._ranks}"
            raise _gang_died(f"{what} {where}", self._rank, error) from error


class TorchCollectives:
    """One rank's ends of its replica's wires (satisfies Collectives). Made by `join`."""

    def __init__(
        self,
        rank: int,
        tp: int,
        pp: int,
        stage: RankGroup,
        device: torch.device,
        ends: dist.ProcessGroup | None = None,
    ) -> None:
        """`ends`: the first stage's and the last stage's rank of this tp rank, which is one of them."""
        self.rank = rank
        self._ends = ends
        self._first, self._last = rank % tp, (pp - 1) * tp + rank % tp
        self.world_size = tp * pp
        self.stage = stage
        self.previous_rank = rank - tp if rank >= tp else None
        self.next_rank = rank + tp if rank + tp < tp * pp else None
        self._device = device
        self._sending: deque[tuple[dist.Work | None, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Starts sending and returns; the tensor must not be written to afterwards."""
        self._send(tensor, dst, None)

    def _send(self, tensor: torch.Tensor, dst: int, group: dist.ProcessGroup | None) -> None:
        tensor = tensor.contiguous()
        try:
            self._sending.append((dist.isend(tensor, dst, group=group), tensor))
            while len(self._sending) > SENDS_IN_FLIGHT:
                work, _ = self._sending.popleft()
                _finish(work)
        except RuntimeError as error:
            raise _gang_died(f"send of {list(tensor.shape)} to rank {dst}", self.rank, error) from error

    def recv(self, shape: tuple[int, ...], dtype: torch.dtype, src: int) -> torch.Tensor:
        """The next tensor from `src`, in the order in which it sent them.

        On a GPU its kernel runs once all before it on the stream has, so that it holds no processor that the layers
        of an earlier batch could use. The sender's does meanwhile, if it is ahead, and then it can spare them.
        """
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        try:
            dist.recv(tensor, src)
        except RuntimeError as error:
            raise _gang_died(f"receive of {list(shape)} from rank {src}", self.rank, error) from error
        return tensor

    def send_to_first(self, tensor: torch.Tensor) -> None:
        """From the last stage to the first, beside all else; the tensor must not be written to afterwards."""
        self._send(tensor, self._first, self._ends)

    def recv_from_last(self, shape: tuple[int, ...], dtype: torch.dtype) -> Incoming:
        """On the first stage: starts receiving what the last sends, in its order.

        It must be started though nothing needs it yet: the last stage's kernel spins until it is, and what waits there
        for the whole device, as pinning memory may, would wait for ever.
        """
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        try:
            return Incoming(tensor, dist.irecv(tensor, self._last, group=self._ends))
        except RuntimeError as error:
            raise _gang_died(f"receive of {list(shape)} from rank {self._last}", self.rank, error) from error

    def leave(self) -> None:
        """Finish what is being sent and cut the wires. A peer that died is no error here."""
        with suppress(RuntimeError):
            while self._sending:
                _finish(self._sending.popleft()[0])
        with suppress(RuntimeError):
            self.stage.close()
        self._sending.clear()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join(
    rank: int,
    world_size: int,
    tp: int,
    pp: int,
    init_method: str,
    backend: str,
    device: torch.device,
    timeout_s: float,
    small_sums: Mapping[str, int | None] = ANY_WAY,
) -> TorchCollectives:
    """Meet the replica's other ranks at `init_method` (tcp://host:port, on rank 0's host) and try every wire.

    `backend` is "nccl" or "gloo". `small_sums`: the ways beside NCCL that sums on GPUs may go, see `open_one_shot`;
    whether they can is found out, and NCCL has its own NCCL_P2P_DISABLE. Every rank calls it with the same arguments
    but `rank`, `device`. A world of one meets nobody. Raises GangDied where the others do not come within `timeout_s`,
    or a wire lies.
    """
    if world_size != tp * pp:
        raise ValueError(f"a replica of tp={tp}, pp={pp} has {tp * pp} ranks, not world_size={world_size}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return TorchCollectives(rank, tp, pp, RankGroup([0], 0, None), device)
    try:
        with _gloo_on_loopback(init_method):
            stage, ends = _connect(rank, tp, pp, init_method, backend, timedelta(seconds=timeout_s))
    except (RuntimeError, dist.DistNetworkError) as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        meeting = f"meeting {world_size - 1} others at {init_method} in {timeout_s:g} s"
        raise _gang_died(meeting, rank, error) from error
    collectives = TorchCollectives(rank, tp, pp, stage, device, ends)
    try:
        _try_wires(collectives, tp, device)
        stage.open_one_shot(device, timeout_s, small_sums, pipelined=pp > 1)
    except GangDied:
        collectives.leave()
        raise
    return collectives


def _connect(
    rank: int, tp: int, pp: int, init_method: str, backend: str, timeout: timedelta
) -> tuple[RankGroup, dist.ProcessGroup | None]:
    """This rank's stage, and its two ends of the pipeline. Every rank makes every group, in order, as torch demands."""
    if backend == "nccl":
        os.environ.setdefault("NCCL_MAX_P2P_NCHANNELS", str(P2P_CHANNELS))
    dist.init_process_group(backend, init_method, timeout=timeout, world_size=tp * pp, rank=rank)
    stages = [list(range(first, first + tp)) for first in range(0, tp * pp, tp)]
    if pp == 1:
        return RankGroup(stages[0], rank, dist.group.WORLD), None
    # A group of its own: what goes back must not queue behind hidden states that nobody receives yet.
    both_ends = [dist.new_group([t, (pp - 1) * tp + t], timeout=timeout) for t in range(tp)]
    ends = both_ends[rank % tp] if rank // tp in (0, pp - 1) else None
    if tp == 1:
        return RankGroup([rank], rank, None), ends
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in stages]
    own = rank // tp
    return RankGroup(stages[own], rank, groups[own]), ends


def _try_wires(collectives: TorchCollectives, tp: int, device: torch.device) -> None:
    """Every sum and every hop once: a wire that hangs or garbles is found here and not in a first request.

    NCCL also opens its connections at their first use, which takes up to seconds.
    """
    rank = collectives.rank
    total = int(collectives.stage.all_reduce(torch.tensor([rank % tp + 1.0], device=device)).item())
    right = tp * (tp + 1) // 2
    if total != right:
        raise GangDied(f"rank {rank}: all-reduce of 1..{tp} gave {total}, not {right}: {_CORRUPT}")
    if collectives.previous_rank is not None:
        got = int(collectives.recv((1,), torch.float32, collectives.previous_rank).item())
        if got != collectives.previous_rank:
            raise GangDied(
                f"rank {rank}: received {got} from rank {collectives.previous_rank}, not its rank: {_CORRUPT}"
            )
    if collectives.next_rank is not None:
        collectives.send(torch.tensor([float(rank)], device=device), collectives.next_rank)
    if collectives.world_size > tp and collectives.next_rank is None:
        collectives.send_to_first(torch.tensor([float(rank)], device=device))
    if collectives.world_size > tp and collectives.previous_rank is None:
        got = int(collectives.recv_from_last((1,), torch.float32).landed().item())
        if got != rank + collectives.world_size - tp:
            raise GangDied(f"rank {rank}: received {got} from the last stage, not its rank: {_CORRUPT}")


@contextmanager
def _gloo_on_loopback(init_method: str) -> Iterator[None]:
    """Where all ranks are on one host, have gloo listen on the loopback interface and nowhere else.

    torch can tell gloo only by this variable; a user's own value wins.
    """
    loopback = loopback_interface()
    if urlsplit(init_method).hostname not in _LOOPBACK or not loopback or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def _finish(work: dist.Work | None) -> None:
    """torch types isend's handle as optional: None is for a rank outside the group, which never gets here."""
    assert work is not None
    work.wait()


def _gang_died(what: str, rank: int, error: Exception) -> GangDied:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return GangDied(f"rank {rank}: {what} failed, so a peer died or stopped: {first_line}")
