"""What cluster/prove.py has done on the devices: each rung compares bits, and says what was wrong, or None.

All data comes from seeds that every rank knows, so that the reference needs no wire.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from cluster.children import alive
from cluster.collectives import cuda
from cluster.link_probes import GlooMembers, met, open_transport
from cluster.paths import Path
from cluster.probes import Target

ROUNDS = 100
MOST_ELEMENTS = 100_000
PAIR_ELEMENTS = 4_194_301  # 16 MB in int32, and a prime
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WHOLE = 8  # numbers from -8 to 8: their sums over 8 ranks are exact in every dtype, in whatever order

_SOURCE = """
extern "C" __global__ void copy(int *to, const int *from, unsigned n)
{
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        to[i] = from[i];
}
"""


def peer_writes(targets: Sequence[Target]) -> str | None:
    """Each ordered pair that CUDA grants, from one process: a copy engine, a kernel that writes, one that reads."""
    devices = [target.open() for target in targets]
    pairs = [pair for pair in itertools.permutations(devices, 2) if torch.cuda.can_device_access_peer(*pair)]
    if not pairs:
        raise RuntimeError("CUDA grants no pair peer access, whatever NVML said")
    copies = {}
    for device in devices:
        alive()  # a context on each of eight GPUs, and then 56 pairs: together longer than a hang is waited for
        copies[device] = _copy_kernel(device)
    numbers = torch.randint(-(2**31), 2**31, (PAIR_ELEMENTS,), generator=torch.Generator().manual_seed(1))
    expected = numbers.to(torch.int32)
    for source, target in pairs:
        alive()
        wrong = _wrong_ways(source, target, copies[source], expected)
        if wrong:
            return f"GPU {source.index} to {target.index}: {', '.join(wrong)} arrived wrong"
    return None


def _copy_kernel(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    major, minor = torch.cuda.get_device_capability(device)
    torch.zeros(1, device=device)  # a context, which the module is loaded into
    with torch.cuda.device(device):
        kernel = cuda.Kernel(cuda.load(cuda.compile_source(_SOURCE, f"sm_{major}{minor}", {})), "copy")

    def copy(to: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            pointers = [ctypes.c_uint64(t.data_ptr()) for t in (to, source)]
            kernel.launch(64, 256, stream, *pointers, ctypes.c_uint32(to.numel()), overlap=False)

    return copy


def _wrong_ways(
    source: torch.device,
    target: torch.device,
    copy: Callable[[torch.Tensor, torch.Tensor], None],
    expected: torch.Tensor,
) -> list[str]:
    here, there = expected.to(source), torch.zeros_like(expected, device=target)
    wrong = []
    there.copy_(here)  # which also has torch grant kernels the access
    if not torch.equal(there.cpu(), expected):
        wrong.append("a copy engine's write")
    there.zero_()
    torch.cuda.synchronize(target)
    copy(there, here)
    torch.cuda.synchronize(source)
    if not torch.equal(there.cpu(), expected):
        wrong.append("a kernel's write")
    there.copy_(expected)
    here.zero_()
    torch.cuda.synchronize(target)
    copy(here, there)
    torch.cuda.synchronize(source)
    if not torch.equal(here.cpu(), expected):
        wrong.append("a kernel's read")
    return wrong


def peer_sums(target: Target, meeting: str) -> str | None:
    return _one_shot_sums(target, meeting, Path.PEER)


def mapped_sums(target: Target, meeting: str) -> str | None:
    return _one_shot_sums(target, meeting, Path.MAPPED)


def _one_shot_sums(target: Target, meeting: str, path: Path) -> str | None:
    """Our all-reduce against sums in rank order, in float32 and rounded once."""
    with met(target, meeting) as device:
        alive()
        one_shot = open_transport(GlooMembers(device), path)
        try:
            alive()
            wrong = 0
            for number in range(ROUNDS):
                dtype, size = _drawn(number, one_shot.max_bytes // 4)
                parts = [_normal(number, rank, size, dtype) for rank in range(target.ranks)]
                total = parts[0].float()
                for part in parts[1:]:
                    total = total + part.float()
                got = one_shot.all_reduce(parts[target.rank].to(device)).cpu()
                one_shot.check()
                wrong += not _same_bits(got, total.to(dtype))
            return _verdict(wrong, "all-reduce")
        finally:
            one_shot.close()


def collectives(target: Target, meeting: str) -> str | None:
    """NCCL's, or gloo's on a CPU: all-reduce, all-gather, all-to-all and a send to the next rank."""
    with met(target, meeting) as device:
        checks: dict[str, Callable[[int, int, torch.dtype], bool]] = {
            "all-reduce": lambda *drawn: _all_reduce_right(target, device, *drawn),
            "all-gather": lambda *drawn: _all_gather_right(target, device, *drawn),
            "all-to-all": lambda *drawn: _all_to_all_right(target, device, *drawn),
            "send and receive": lambda *drawn: _ring_right(target, device, *drawn),
        }
        verdicts = []  # of all, also after one was wrong: the other ranks may have seen nothing of it, and go on
        for name, right in checks.items():
            wrong = 0
            for number in range(ROUNDS):
                if number in (0, 1, ROUNDS // 2):  # NCCL connects in the first
                    alive()
                dtype, size = _drawn(number, MOST_ELEMENTS)
                wrong += not right(number, size, dtype)
            verdicts.append(_verdict(wrong, name))
        return "; ".join(filter(None, verdicts)) or None


def _all_reduce_right(
    target: Target, device: torch.device, number: int, size: int, dtype: torch.dtype
) -> bool:
    parts = [_whole(number, rank, size, dtype) for rank in range(target.ranks)]
    got = parts[target.rank].to(device, copy=True)
    dist.all_reduce(got)
    return _same_bits(got.cpu(), torch.stack([part.float() for part in parts]).sum(0).to(dtype))


def _all_gather_right(
    target: Target, device: torch.device, number: int, size: int, dtype: torch.dtype
) -> bool:
    parts = [_normal(number, rank, size, dtype) for rank in range(target.ranks)]
    got = [torch.empty(size, dtype=dtype, device=device) for _ in parts]
    dist.all_gather(got, parts[target.rank].to(device))
    return all(_same_bits(one.cpu(), part) for one, part in zip(got, parts, strict=True))


def _all_to_all_right(
    target: Target, device: torch.device, number: int, size: int, dtype: torch.dtype
) -> bool:
    ranks = target.ranks
    parts = [_normal(number, rank, size * ranks, dtype).view(ranks, size) for rank in range(ranks)]
    got = torch.empty(ranks, size, dtype=dtype, device=device)
    dist.all_to_all_single(got, parts[target.rank].to(device))
    return _same_bits(got.cpu(), torch.stack([part[target.rank] for part in parts]))


def _ring_right(target: Target, device: torch.device, number: int, size: int, dtype: torch.dtype) -> bool:
    before, after = ((target.rank + step) % target.ranks for step in (-1, 1))
    own, got = (
        _normal(number, target.rank, size, dtype).to(device),
        torch.empty(size, dtype=dtype, device=device),
    )
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, own, after), dist.P2POp(dist.irecv, got, before)]
    ):
        work.wait()
    return _same_bits(got.cpu(), _normal(number, before, size, dtype))


def _drawn(number: int, most: int) -> tuple[torch.dtype, int]:
    """The same on every rank: odd sizes, most of them small, one in ten as large as may be."""
    drawn = random.Random(number)
    largest = drawn.choice((300, 300, 300, 300, 5000, 5000, 5000, 60_000, 60_000, most))
    return drawn.choice(DTYPES), 2 * drawn.randrange(max(1, min(largest, most) // 2)) + 1


def _normal(number: int, rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, generator=_generator(number, rank)).to(dtype)


def _whole(number: int, rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-WHOLE, WHOLE + 1, (size,), generator=_generator(number, rank)).to(dtype)


def _generator(number: int, rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * number + rank)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _verdict(wrong: int, what: str) -> str | None:
    return f"{wrong} of {ROUNDS} rounds of {what} gave wrong bits" if wrong else None
