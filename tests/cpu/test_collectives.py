"""The wires between ranks, by real processes over gloo."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from cluster.collectives.torch_dist import TorchCollectives, join
from cluster.errors import GangDied
from cluster.loopback import free_port

CPU = torch.device("cpu")
Body = Callable[[TorchCollectives], Any]


def run_rank(body: Body, rank: int, tp: int, pp: int, port: int, timeout_s: float, out: Connection) -> None:
    torch.set_num_threads(1)
    try:
        collectives = join(rank, tp * pp, tp, pp, f"tcp://127.0.0.1:{port}", "gloo", CPU, timeout_s)
        try:
            # By value: the pipe would send tensors as shared files, which are gone if this process ends too soon.
            out.send_bytes(pickle.dumps(body(collectives)))
        finally:
            collectives.leave()
    except GangDied as error:
        out.send(error)


def spawn(body: Body, tp: int, pp: int, timeout_s: float = 30.0) -> list[tuple[Any, Connection]]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports torch once, and forks before anything has run
    port = free_port()
    ranks = []
    for rank in range(tp * pp):
        mine, theirs = context.Pipe()
        process = context.Process(target=run_rank, args=(body, rank, tp, pp, port, timeout_s, theirs))
        process.start()
        theirs.close()
        ranks.append((process, mine))
    return ranks


def results(body: Body, tp: int, pp: int) -> list[Any]:
    """What `body` returns on each rank."""
    ranks = spawn(body, tp, pp)
    answers = [pipe.recv() for _, pipe in ranks]
    for process, _ in ranks:
        process.join()
    return answers


def own_numbers(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers whose float sum depends on the order in which they are added."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).mul(10.0**rank).to(dtype)


WIDTHS = {2: [5, 2], 3: [2, 7, 1]}


def summed_and_gathered(collectives: TorchCollectives) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensor = own_numbers(collectives.rank, 7, 33)
    total = collectives.stage.all_reduce(tensor)
    assert total.data_ptr() == tensor.data_ptr(), "in place"
    half = collectives.stage.all_reduce(own_numbers(collectives.rank, 7, 33, dtype=torch.bfloat16))
    widths = WIDTHS[collectives.world_size]
    columns = own_numbers(collectives.rank, 4, widths[collectives.rank])
    return total, half, collectives.stage.all_gather_columns(columns, widths)


@pytest.mark.parametrize("tp", [2, 3])
def test_sums_and_gathers_have_the_same_bits_on_every_rank(tp: int) -> None:
    answers = results(summed_and_gathered, tp, 1)
    expected = torch.cat([own_numbers(rank, 4, width) for rank, width in enumerate(WIDTHS[tp])], dim=1)
    in_order = own_numbers(0, 7, 33)
    for rank in range(1, tp):
        in_order += own_numbers(rank, 7, 33)
    for total, half, columns in answers:
        assert torch.equal(total, in_order)
        assert torch.equal(half, answers[0][1])
        assert torch.equal(columns, expected)


def relayed(collectives: TorchCollectives) -> torch.Tensor | None:
    """The first stage sends 20 tensors and waits for none; each stage adds its rank; the last keeps them."""
    kept = []
    for i in range(20):
        if collectives.previous_rank is None:
            tensor = torch.full((2, i + 1), float(i))
        else:
            tensor = collectives.recv((2, i + 1), torch.float32, collectives.previous_rank) + collectives.rank
        if collectives.next_rank is not None:
            collectives.send(tensor, collectives.next_rank)
        kept.append(tensor.mean())
    return torch.stack(kept) if collectives.next_rank is None else None


@pytest.mark.parametrize("pp", [2, 3])
def test_stages_receive_in_the_order_sent(pp: int) -> None:
    answers = results(relayed, 1, pp)
    added = sum(range(1, pp))
    assert answers[-1].tolist() == [i + added for i in range(20)]


def stage_sum_then_hop(collectives: TorchCollectives) -> tuple[float, float | None]:
    total = collectives.stage.all_reduce(torch.tensor([float(collectives.rank)]))
    if collectives.next_rank is not None:
        collectives.send(total, collectives.next_rank)
        return total.item(), None
    assert collectives.previous_rank is not None
    return total.item(), collectives.recv((1,), torch.float32, collectives.previous_rank).item()


def test_tp2pp2_sums_inside_a_stage_and_hops_between_them() -> None:
    assert results(stage_sum_then_hop, 2, 2) == [(1.0, None), (1.0, None), (5.0, 1.0), (5.0, 1.0)]


def test_a_world_of_one_needs_nobody() -> None:
    alone = join(0, 1, 1, 1, "tcp://127.0.0.1:1", "gloo", CPU, 1.0)
    tensor = torch.ones(2, 3)
    assert alone.stage.all_reduce(tensor) is tensor
    assert alone.stage.all_gather_columns(tensor, [3]) is tensor
    assert alone.previous_rank is None
    assert alone.next_rank is None
    alone.leave()


def sum_when_told(collectives: TorchCollectives) -> str:
    if collectives.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    collectives.stage.all_reduce(torch.ones(3))
    return "summed"


def test_a_stopped_peer_is_named_within_the_timeout() -> None:
    (first, pipe), (second, _) = spawn(sum_when_told, 2, 1, timeout_s=3.0)
    try:
        error = pipe.recv()
    finally:
        second.kill()
        second.join()
    first.join()
    assert isinstance(error, GangDied)
    assert "rank 0: all-reduce of [3] over ranks [0, 1] failed" in str(error)


def die_instead(collectives: TorchCollectives) -> str:
    if collectives.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    collectives.recv((1,), torch.float32, 1)
    return "received"


def test_a_killed_peer_is_named_at_once() -> None:
    (first, pipe), (second, _) = spawn(die_instead, 1, 2, timeout_s=60.0)
    assert pipe.poll(30), "seen from the broken connection, long before the timeout"
    error = pipe.recv()
    first.join()
    second.join()
    assert isinstance(error, GangDied)
    assert "receive of [1] from rank 1 failed" in str(error)


def test_nobody_comes_is_an_error_in_time() -> None:
    with pytest.raises(GangDied, match=r"rank 0: meeting 1 others at tcp://127\.0\.0\.1:\d+ in 1 s failed"):
        join(0, 2, 2, 1, f"tcp://127.0.0.1:{free_port()}", "gloo", CPU, 1.0)
