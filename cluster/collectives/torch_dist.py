"""Collectives through torch.distributed: NCCL on GPUs, gloo on CPUs. Small sums of GPUs go through one_shot.py.

A process is in one world at a time, that of its replica. A rank that dies or stops shows as GangDied on its
peers: at once where the connection breaks, after `timeout_s` where it only falls silent.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import msgspec
import torch
import torch.distributed as dist

from cluster.collectives.mailbox import Post, Receiver, Sender, Wire
from cluster.collectives.one_shot import Members, Unusable, this_host
from cluster.collectives.protocols import ANY_WAY
from cluster.collectives.rank_group import Incoming, RankGroup, finish, gang_died
from cluster.collectives.transports import MappedHostMemory, PeerMemory
from cluster.errors import GangDied
from cluster.loopback import loopback_interface

SENDS_IN_FLIGHT = 8
"""Sends that a rank starts before it waits for its oldest. A pipeline has at most pp batches in flight, so
this is reached only where the peer lags; the tensors must live until sent, so it also bounds memory."""

HOP_SLOTS = 3  # hidden states on their way: one that is computed on, one that waits, one that comes
TOKEN_SLOTS = 64  # more than steps whose tokens the first stage may leave untaken
P2P_CHANNELS = 2
"""Of NCCL's sends and receives, each a block of threads that holds a processor of the GPU from when the first side is
ready until the other has come: its own 16 and more would take them from the layers that run meanwhile. torch can tell
NCCL only by the environment; a user's own value wins."""

_CORRUPT = "the link corrupts data; try NCCL_P2P_DISABLE=1"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Posted:
    """A tensor that a mailbox holds, or will (satisfies collectives.Incoming). They are taken out in their order."""

    tensor: torch.Tensor
    mailbox: Receiver
    number: int

    def landed(self) -> torch.Tensor:
        self.mailbox.receive(self.tensor, self.number)
        return self.tensor


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
        self._post: Post | None = None
        self._to: dict[int, Sender] = {}  # by rank; hidden states
        self._from: dict[int, Receiver] = {}
        self._to_first: Sender | None = None  # tokens
        self._from_last: Receiver | None = None

    def open_mailboxes(
        self, tp: int, hop_bytes: int, tokens_bytes: int, ways: Mapping[str, int | None]
    ) -> None:
        """Between stages, where they can be: they hold no processor. All ranks of the replica call it at once."""
        group = dist.group.WORLD
        if self._device.type != "cuda" or self.world_size == tp or group is None:
            return
        if MappedHostMemory.name not in ways:  # a mailbox's numbers lie there
            return
        hops = [Wire(rank, rank + tp, hop_bytes, HOP_SLOTS) for rank in range(self.world_size - tp)]
        back = [Wire(self.world_size - tp + t, t, tokens_bytes, TOKEN_SLOTS) for t in range(tp)]
        members = Members(group, self._device)
        post = Post(self.rank, self.world_size, [*hops, *back], PeerMemory.name in ways)
        try:
            if len(set(members.everyone(this_host))) > 1:
                return
            offers = members.everyone(lambda: msgspec.msgpack.encode(post.offer()))
            ends: list[tuple[dict[Wire, Sender], dict[Wire, Receiver]]] = []

            def open_ends() -> bytes:
                ends.append(post.open([msgspec.msgpack.decode(offer, type=list[bytes]) for offer in offers]))
                return b""

            members.everyone(open_ends)
        except Unusable:
            with suppress(RuntimeError):
                post.close()
            return
        senders, receivers = ends[0]
        self._post = post
        self._to = {wire.receiver: end for wire, end in senders.items() if wire in hops}
        self._from = {wire.sender: end for wire, end in receivers.items() if wire in hops}
        self._to_first = next((end for wire, end in senders.items() if wire in back), None)
        self._from_last = next((end for wire, end in receivers.items() if wire in back), None)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Starts sending and returns; the tensor must not be written to afterwards."""
        self._send(tensor, dst, None, self._to.get(dst))

    def _send(
        self, tensor: torch.Tensor, dst: int, group: dist.ProcessGroup | None, mailbox: Sender | None
    ) -> None:
        tensor = tensor.contiguous()
        if mailbox is not None and mailbox.takes(tensor.nbytes):
            mailbox.send(tensor)
            return
        try:
            self._sending.append((dist.isend(tensor, dst, group=group), tensor))
            while len(self._sending) > SENDS_IN_FLIGHT:
                work, _ = self._sending.popleft()
                finish(work)
        except RuntimeError as error:
            raise gang_died(f"send of {list(tensor.shape)} to rank {dst}", self.rank, error) from error

    def recv(self, shape: tuple[int, ...], dtype: torch.dtype, src: int) -> torch.Tensor:
        """The next tensor from `src`, in the order in which it sent them.

        On a GPU its kernel runs once all before it on the stream has, so that it holds no processor that the layers
        of an earlier batch could use. The sender's does meanwhile, if it is ahead, and then it can spare them.
        """
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        mailbox = self._from.get(src)
        if mailbox is not None and mailbox.takes(tensor.nbytes):
            mailbox.receive(tensor, mailbox.expect())
            return tensor
        try:
            dist.recv(tensor, src)
        except RuntimeError as error:
            raise gang_died(f"receive of {list(shape)} from rank {src}", self.rank, error) from error
        return tensor

    def send_to_first(self, tensor: torch.Tensor) -> None:
        """From the last stage to the first, beside all else; the tensor must not be written to afterwards."""
        self._send(tensor, self._first, self._ends, self._to_first)

    def recv_from_last(self, shape: tuple[int, ...], dtype: torch.dtype) -> Incoming | Posted:
        """On the first stage: starts receiving what the last sends, in its order.

        By NCCL it must be started though nothing needs it yet: the last stage's kernel spins until it is, and what
        waits there for the whole device, as pinning memory may, would wait for ever.
        """
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        if self._from_last is not None and self._from_last.takes(tensor.nbytes):
            return Posted(tensor, self._from_last, self._from_last.expect())
        try:
            coming = dist.irecv(tensor, self._last, group=self._ends)
            return Incoming(tensor, coming, f"receive of {list(shape)} from rank {self._last}", self.rank)
        except RuntimeError as error:
            raise gang_died(f"receive of {list(shape)} from rank {self._last}", self.rank, error) from error

    def leave(self) -> None:
        """Finish what is being sent and cut the wires. A peer that died is no error here."""
        with suppress(RuntimeError):
            while self._sending:
                finish(self._sending.popleft()[0])
        with suppress(RuntimeError):
            self.stage.close()
        if self._post is not None:
            with suppress(RuntimeError):
                torch.cuda.synchronize(self._device)
                self._post.close()
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
    ways: Mapping[str, int | None] = ANY_WAY,
    hop_bytes: int = 0,
    tokens_bytes: int = 0,
) -> TorchCollectives:
    """Meet the replica's other ranks at `init_method` (tcp://host:port, on rank 0's host) and try every wire.

    `backend` is "nccl" or "gloo". `ways`: what beside NCCL sums on GPUs, and messages between stages, may go by, see
    `open_one_shot`; whether they can is found out, and NCCL has its own NCCL_P2P_DISABLE. `hop_bytes` and
    `tokens_bytes` are the most that a message from stage to stage, or from the last to the first, has. Every rank
    calls it with the same arguments but `rank`, `device`. A world of one meets nobody. Raises GangDied where the
    others do not come within `timeout_s`, or a wire lies.
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
        raise gang_died(meeting, rank, error) from error
    collectives = TorchCollectives(rank, tp, pp, stage, device, ends)
    try:
        collectives.open_mailboxes(tp, hop_bytes, tokens_bytes, ways)
        _try_wires(collectives, tp, device)
        stage.open_one_shot(device, timeout_s, ways, pipelined=pp > 1)
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
