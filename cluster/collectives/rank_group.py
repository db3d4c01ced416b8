"""The ranks of one stage: sums and gathers through torch.distributed, small sums of GPUs through one_shot.py.

On one host's cores gloo's own ring and ring-gather cost their threads' wake-ups: 0.8 ms for two ranks and
5.3 ms for four, from 2 KB to 150 KB, where all through the first rank takes 0.12 and 0.7 ms (torch 2.13,
2 cores of a Xeon, loopback; at 1.2 MB still 1.3 against 2.7 ms). So tensors on a CPU go that way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cluster.collectives.one_shot import Members, OneShot, open_one_shot
from cluster.errors import GangDied


@dataclass(frozen=True, slots=True)
class Incoming:
    """A tensor that is being received or summed (satisfies collectives.Incoming)."""

    tensor: torch.Tensor
    work: dist.Work | None
    what: str
    rank: int  # whose it is

    def landed(self) -> torch.Tensor:
        try:
            if self.work is not None:
                self.work.wait()
        except RuntimeError as error:
            raise gang_died(self.what, self.rank, error) from error
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
            raise gang_died("setting up small all-reduces", self._rank, error) from error

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
            return Incoming(self.all_reduce(tensor), None, "all-reduce", self._rank)
        with self._naming("all-reduce", tensor):
            sending = dist.all_reduce(tensor, group=self._group, async_op=True)
            return Incoming(tensor, sending, f"all-reduce of {list(tensor.shape)}", self._rank)

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
            finish(work)

    @contextmanager
    def _naming(self, what: str, tensor: torch.Tensor) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:  # this rank's own trouble
            raise
        except RuntimeError as error:
            where = f"of {list(tensor.shape)} over ranks {self._ranks}"
            raise gang_died(f"{what} {where}", self._rank, error) from error


def finish(work: dist.Work | None) -> None:
    """torch types isend's handle as optional: None is for a rank outside the group, which never gets here."""
    assert work is not None
    work.wait()


def gang_died(what: str, rank: int, error: Exception) -> GangDied:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return GangDied(f"rank {rank}: {what} failed, so a peer died or stopped: {first_line}")
