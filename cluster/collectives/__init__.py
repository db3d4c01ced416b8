"""How the ranks of one replica talk: sums and gathers inside a stage, sends between stages.

Two Protocols, which torch_dist.py satisfies: NCCL on GPUs, gloo on CPUs. It hands small sums of one host's GPUs to
one_shot.py, whose kernel (one_shot.cu) pushes over the wires of transports.py; protocols.py chooses how, cuda.py
compiles and launches it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class StageGroup(Protocol):
    """The tp ranks of one pipeline stage. What strategies.tensor needs, and no more."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the stage's ranks, in place and returned; the same bits on every rank."""

    def start_all_reduce(self, tensor: torch.Tensor) -> Incoming:
        """Starts the same and returns, where it can; the tensor is nobody's until it has landed."""

    def all_gather_columns(self, tensor: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """[tokens, own width] → [tokens, sum of widths], columns in tp-rank order."""

    def check(self) -> None:
        """Raises GangDied where a sum that ran on the device by itself waited in vain. Cheap: for every step."""


class Incoming(Protocol):
    def landed(self) -> torch.Tensor:
        """The tensor, once it is here; on a GPU, once its stream has come so far."""


class Collectives(Protocol):
    """One rank's ends of all the wires of its replica. Ranks count tp first: rank = stage × tp + tp_rank."""

    rank: int
    world_size: int
    previous_rank: int | None  # same tp_rank, one stage before; None on the first stage
    next_rank: int | None  # same tp_rank, one stage after; None on the last stage

    @property
    def stage(self) -> StageGroup: ...

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Starts sending and returns; the tensor must not be written to afterwards."""

    def recv(self, shape: tuple[int, ...], dtype: torch.dtype, src: int) -> torch.Tensor:
        """The next tensor from `src`, in the order in which it sent them."""

    def send_to_first(self, tensor: torch.Tensor) -> None:
        """From the last stage to the first, beside all else; the tensor must not be written to afterwards."""

    def recv_from_last(self, shape: tuple[int, ...], dtype: torch.dtype) -> Incoming:
        """On the first stage: starts receiving what the last sends, in its order."""

    def leave(self) -> None:
        """Cut the wires. Nothing may be sent or received after it."""
