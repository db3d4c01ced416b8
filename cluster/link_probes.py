"""What cluster/measure.py times between devices: every collective by every path, eager and inside CUDA graphs.

Each function runs on all ranks of a group at once, each rank in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from cluster.children import say
from cluster.collectives import one_shot
from cluster.collectives.one_shot import Members, OneShot, Unusable
from cluster.collectives.protocols import reach
from cluster.collectives.rank_group import RankGroup
from cluster.collectives.transports import MappedHostMemory, PeerMemory, Transport
from cluster.paths import Curve, Op, Path, Point, curve_of
from cluster.probes import Target, rates
from cluster.profile import Rates

TIMEOUT_S = 60.0
PATIENCE_S = 10.0
MOST_SYMMETRIC_BYTES = 64 << 20
LEAST_RUNS, MOST_RUNS = 2, 64
ROUNDS = 5
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to time."""

    ops: tuple[Op, ...]
    sizes: tuple[int, ...]  # bytes of messages, ascending, each a multiple of 2 × 64 ranks
    paths: tuple[Path, ...]
    slow_s: float  # a curve ends at the first message that takes longer
    rates_together: bool = False  # also each rank's Rates while all others measure theirs


@dataclass(frozen=True, slots=True)
class Swept:
    curves: tuple[Curve, ...]
    absent: dict[str, str]  # path -> why
    rates: Rates | None


class GlooMembers(Members):
    """Members that talk through the host, so that nothing of a GPU's wires is needed before they are proved."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.ranks, self.device = dist.get_rank(), dist.get_world_size(), device

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        own = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(parts, own)
        return [part.view(tensor.dtype).view(tensor.shape).to(tensor.device) for part in parts]


@contextmanager
def met(target: Target, meeting: str) -> Iterator[torch.device]:
    """The default group of all ranks: gloo, and on GPUs NCCL too, which starts at its first use."""
    device = target.open()
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(backend, meeting, timeout=limit, world_size=target.ranks, rank=target.rank)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def sweep(target: Target, meeting: str, asked: Sweep) -> Swept:
    """The curves as the first rank saw them."""
    with met(target, meeting) as device:
        group = _Group(target, device, asked)
        curves: list[Curve] = []
        for path in asked.paths:
            try:
                curves += _OPENERS[path](group)
            except Unusable as error:
                group.absent[path.value] = str(error)
        return Swept(tuple(curves), group.absent, rates(target) if asked.rates_together else None)


class _Group:
    """One rank's part in the timing: all ranks must do the same, equally often."""

    def __init__(self, target: Target, device: torch.device, asked: Sweep) -> None:
        self.target, self.device, self.asked = target, device, asked
        self.rank, self.ranks = target.rank, target.ranks
        self.members = GlooMembers(device)
        self.absent: dict[str, str] = {}  # what could not be timed, and why

    def curves(
        self, op: Op, path: Path, make: Callable[[int], Run], most_bytes: int | None = None
    ) -> list[Curve]:
        """`make(bytes)` gives what does the operation once. Eager, and where there are GPUs in a graph too."""
        if op not in self.asked.ops or (op is Op.SEND_RECV and self.ranks > 2):
            return []
        if self.rank == 0:
            say(f"{op.replace('_', '-')} of {self.ranks} ranks by {path}")
        sizes = [s for s in self.asked.sizes if most_bytes is None or s <= most_bytes]
        modes = (False, True) if self.device.type == "cuda" else (False,)
        found: dict[bool, list[Point]] = {mode: [] for mode in modes}
        for size in sizes:
            run = make(size)
            for in_graph in modes:
                try:
                    found[in_graph].append((size, self._seconds(run, in_graph)))
                except RuntimeError as error:  # an operation that cannot be captured, on all ranks alike
                    if not in_graph:
                        raise
                    self.absent[f"{op} by {path} inside graphs"] = str(error).splitlines()[0]
                    modes = (False,)
            if found[False][-1][1] > self.asked.slow_s:
                break
        there_and_back = 2 if op is Op.SEND_RECV else 1
        return [
            curve_of(op, path, self.ranks, mode, [(n, s / there_and_back) for n, s in points], most_bytes)
            for mode, points in found.items()
            if points
        ]

    def _seconds(self, run: Run, in_graph: bool) -> float:
        run()
        first_s = self._agreed(self._clock(run))
        runs = max(LEAST_RUNS, min(MOST_RUNS, int(self.target.probe_s / first_s)))

        def repeated() -> None:
            for _ in range(runs):
                run()

        if not in_graph:
            return self._rounds(repeated) / runs
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            repeated()
        try:
            return self._rounds(graph.replay) / runs
        finally:
            graph.reset()

    def _rounds(self, run: Run) -> float:
        """What a quarter of the rounds beat, after one that does not count: noise only ever adds."""
        run()
        times = []
        for _ in range(ROUNDS):
            self._agreed(0.0)  # all begin together
            times.append(self._clock(run))
        return self._agreed(sorted(times)[ROUNDS // 4])

    def _clock(self, run: Run) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def _agreed(self, seconds: float) -> float:
        """The mean over the ranks: the same bits on each, so that all repeat equally often. Also a barrier, by gloo."""
        total = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(total)
        return max(total.item() / self.ranks, 1e-9)

    def zeros(self, n_bytes: int) -> torch.Tensor:
        return torch.zeros(n_bytes // 2, dtype=torch.bfloat16, device=self.device)


def _by_torch(group: _Group, path: Path) -> list[Curve]:
    """NCCL or gloo, as a replica's ranks use them (gloo's sums and gathers go by way of the first rank)."""
    stage = RankGroup(list(range(group.ranks)), group.rank, dist.group.WORLD)

    def all_reduce(n_bytes: int) -> Run:
        tensor = group.zeros(n_bytes)
        return lambda: stage.all_reduce(tensor)

    def all_gather(n_bytes: int) -> Run:
        own = group.zeros(n_bytes // group.ranks)
        if own.is_cpu:
            return lambda: stage.all_gather_columns(own.view(1, -1), [own.numel()] * group.ranks)
        whole = group.zeros(n_bytes // group.ranks * group.ranks)
        return lambda: dist.all_gather_into_tensor(whole, own)

    def all_to_all(n_bytes: int) -> Run:
        own = group.zeros(n_bytes // group.ranks * group.ranks)
        got = torch.empty_like(own)
        return lambda: dist.all_to_all_single(got, own)

    def send_recv(n_bytes: int) -> Run:
        tensor, other = group.zeros(n_bytes), 1 - group.rank

        def there_and_back() -> None:
            if group.rank == 0:
                dist.send(tensor, other)
            dist.recv(tensor, other)
            if group.rank == 1:
                dist.send(tensor, other)

        return there_and_back

    makers = {
        Op.ALL_REDUCE: all_reduce,
        Op.ALL_GATHER: all_gather,
        Op.ALL_TO_ALL: all_to_all,
        Op.SEND_RECV: send_recv,
    }
    return [curve for op, make in makers.items() for curve in group.curves(op, path, make)]


def open_transport(members: Members, path: Path) -> OneShot:
    """Our one-shot all-reduce by this path and no other. Raises Unusable on all ranks."""
    kind: type[Transport] = PeerMemory if path is Path.PEER else MappedHostMemory
    opened = one_shot.opened(members, kind, reach(kind, members.ranks), one_shot.compiled(members))
    opened.wait_at_most(PATIENCE_S)
    return opened


def _by_one_shot(group: _Group, path: Path) -> list[Curve]:
    sums = open_transport(group.members, path)
    try:

        def all_reduce(n_bytes: int) -> Run:
            tensor = group.zeros(n_bytes)
            return lambda: sums.all_reduce(tensor)

        found = group.curves(Op.ALL_REDUCE, path, all_reduce, sums.max_bytes)
        sums.check()
        return found
    finally:
        sums.close()


def _by_symmetric_memory(group: _Group, path: Path) -> list[Curve]:
    """The better of torch's one-shot and two-shot all-reduce at each size."""
    from torch.distributed import _symmetric_memory as symmetric

    world = dist.group.WORLD
    assert world is not None
    name = world.group_name

    def buffer(n_bytes: int) -> torch.Tensor:
        tensor: torch.Tensor = symmetric.empty(n_bytes // 2, dtype=torch.bfloat16, device=group.device)
        symmetric.rendezvous(tensor, name)
        return tensor.zero_()

    def one_shot(n_bytes: int) -> Run:
        tensor = buffer(n_bytes)
        return lambda: torch.ops.symm_mem.one_shot_all_reduce(tensor, "sum", name)

    def two_shot(n_bytes: int) -> Run:
        tensor = buffer(n_bytes)
        return lambda: torch.ops.symm_mem.two_shot_all_reduce_(tensor, "sum", name)

    def opened() -> bytes:
        two_shot(group.asked.sizes[0])()
        torch.cuda.synchronize()
        return b""

    group.members.everyone(opened)
    both = [group.curves(Op.ALL_REDUCE, path, make, MOST_SYMMETRIC_BYTES) for make in (one_shot, two_shot)]
    return [_lower(a, b) for a, b in zip(*both, strict=True)]


def _lower(a: Curve, b: Curve) -> Curve:
    points = [min(p, q, key=lambda point: point[1]) for p, q in zip(a.points, b.points, strict=False)]
    return curve_of(a.op, a.path, a.ranks, a.in_graph, points, a.most_bytes)


_OPENERS: dict[Path, Callable[[_Group], list[Curve]]] = {
    Path.PEER: lambda group: _by_one_shot(group, Path.PEER),
    Path.MAPPED: lambda group: _by_one_shot(group, Path.MAPPED),
    Path.NCCL: lambda group: _by_torch(group, Path.NCCL),
    Path.SYMMETRIC: lambda group: _by_symmetric_memory(group, Path.SYMMETRIC),
    Path.GLOO: lambda group: _by_torch(group, Path.GLOO),
}
