"""The work that cluster/measure.py times, each probe in a process of its own."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from cluster.collectives.torch_dist import TorchCollectives, join
from cluster.measure import Point, Rates

LEAST_REPEATS = 3
HOPS = 30  # there and back, by size
TIMEOUT_S = 60.0
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of a probed weight: like a layer's of a model that fits such a device."""

PREFILL_TOKENS = {"cpu": 256, "cuda": 2048}

READ_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Least bytes of weights that a pass reads: caches (an H100's 50 MB) then hold little of the last pass."""

MESSAGE_BYTES = {
    "cpu": (2 << 10, 32 << 10, 256 << 10, 2 << 20),
    "cuda": (4 << 10, 64 << 10, 1 << 20, 16 << 20),
}
"""From one token's hidden state to a prefill chunk's."""


@dataclass(frozen=True, slots=True)
class Target:
    """Which device a process times, and its place among those that are at it together."""

    kind: str  # "cpu" or "cuda"
    uuid: str  # as NVML has it; empty for a CPU
    rank: int
    ranks: int
    threads: int
    probe_s: float  # a probe repeats for about this long

    def open(self) -> torch.device:
        if self.kind == "cpu":
            torch.set_num_threads(self.threads)
            return torch.device("cpu")
        # CUDA may count the cards in another order than NVML does.
        uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
        device = torch.device("cuda", uuids.index(self.uuid))
        torch.cuda.set_device(device)
        return device


def rates(target: Target) -> Rates:
    """Of one device, with whatever else runs at the time."""
    device = target.open()
    dtypes = DTYPES[device.type]
    return Rates(
        {name: _read_bytes_per_s(target, device, getattr(torch, name)) for name in dtypes},
        {name: _flops_per_s(target, device, getattr(torch, name)) for name in dtypes},
        _layer_s(target, device),
    )


def group(target: Target, init_method: str) -> tuple[list[Point], Rates]:
    """All-reduce times by size, and this rank's rates while the others measure theirs."""
    collectives = _join(target, init_method, tp=target.ranks, pp=1)
    device = target.open()

    def timed(n_bytes: int) -> Point:
        tensor = torch.zeros(n_bytes // 4, device=device)
        first_s = _typical_s(lambda: collectives.stage.all_reduce(tensor), device, LEAST_REPEATS)
        # All ranks must repeat equally often; their sum of first tries has the same bits on each.
        tries_s = collectives.stage.all_reduce(torch.tensor([first_s], device=device)).item()
        repeats = max(LEAST_REPEATS, min(200, int(target.probe_s * target.ranks / tries_s)))
        return n_bytes, _typical_s(lambda: collectives.stage.all_reduce(tensor), device, repeats)

    try:
        points = [timed(n_bytes) for n_bytes in MESSAGE_BYTES[device.type]]
        return points, rates(target)
    finally:
        collectives.leave()


def hop(target: Target, init_method: str) -> list[Point]:
    """Send times by size: half of a way there and back."""
    collectives = _join(target, init_method, tp=1, pp=2)
    device = target.open()
    other = 1 - target.rank

    def there_and_back(tensor: torch.Tensor) -> None:
        if target.rank == 0:
            collectives.send(tensor, other)
        got = collectives.recv(tuple(tensor.shape), tensor.dtype, other)
        if target.rank == 1:
            collectives.send(got, other)

    points = []
    try:
        for n_bytes in MESSAGE_BYTES[device.type]:
            tensor = torch.zeros(n_bytes // 4, device=device)
            seconds = _typical_s(functools.partial(there_and_back, tensor), device, HOPS) / 2
            points.append((n_bytes, seconds))
        return points
    finally:
        collectives.leave()


def _join(target: Target, init_method: str, tp: int, pp: int) -> TorchCollectives:
    backend = "gloo" if target.kind == "cpu" else "nccl"
    return join(target.rank, tp * pp, tp, pp, init_method, backend, target.open(), TIMEOUT_S)


def _read_bytes_per_s(target: Target, device: torch.device, dtype: torch.dtype) -> float:
    """Weights beyond the caches, each read once a pass by a product with one row."""
    n = MATRIX[device.type]
    size = torch.empty((), dtype=dtype).element_size()
    in_all = max(READ_BYTES[device.type], 2 * _last_level_cache_bytes() if device.type == "cpu" else 0)
    count = max(2, in_all // (target.ranks * n * n * size))
    weights = [torch.full((n, n), 0.01, dtype=dtype, device=device) for _ in range(count)]
    x = torch.full((1, n), 0.01, dtype=dtype, device=device)

    def read() -> None:
        for weight in weights:
            functional.linear(x, weight)

    return count * n * n * size / _repeated_s(read, device, target.probe_s)


def _flops_per_s(target: Target, device: torch.device, dtype: torch.dtype) -> float:
    n, tokens = MATRIX[device.type], PREFILL_TOKENS[device.type]
    weight = torch.full((n, n), 0.01, dtype=dtype, device=device)
    x = torch.full((tokens, n), 0.01, dtype=dtype, device=device)
    return 2 * tokens * n * n / _repeated_s(lambda: functional.linear(x, weight), device, target.probe_s)


def _layer_s(target: Target, device: torch.device) -> float:
    """The calls of one transformer layer of one token, on tensors so small that only the calls take time."""
    heads, head_dim, rows = 2, 16, 64
    hidden = heads * head_dim
    weight = torch.full((hidden, hidden), 0.01, device=device)
    cache = torch.zeros(rows, heads, head_dim, device=device)
    slot = torch.zeros(1, dtype=torch.int64, device=device)
    seen = torch.arange(rows, device=device)
    layers = 16

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * x + torch.cat((-second, first), dim=-1) * x

    def layer(x: torch.Tensor) -> torch.Tensor:
        qkv = functional.linear(functional.rms_norm(x, (hidden,)), weight).view(1, heads, head_dim)
        q, k = rotate(qkv), rotate(qkv)
        cache.index_copy_(0, slot, k)
        cache.index_copy_(0, slot, qkv)
        keys, values = cache[seen].transpose(0, 1), cache[seen].transpose(0, 1)
        attended = (
            functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values)
            .transpose(0, 1)
            .flatten(1)
        )
        x = x + functional.linear(attended, weight)
        gate = functional.linear(functional.rms_norm(x, (hidden,)), weight)
        return x + functional.linear(functional.silu(gate) * gate, weight)

    def run() -> None:
        x = torch.zeros(1, hidden, device=device)
        for _ in range(layers):
            x = layer(x)

    with torch.inference_mode():
        return _repeated_s(run, device, target.probe_s) / layers


def _repeated_s(run: Callable[[], object], device: torch.device, probe_s: float) -> float:
    """As `_typical_s`, as often as fits `probe_s`."""
    first_s = _typical_s(run, device, 1)
    return _typical_s(run, device, max(LEAST_REPEATS, min(1000, int(probe_s / first_s))))


def _typical_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one run, after one that does not count: the time that a quarter of the repeats beat.

    Noise is one-sided: what else runs here only ever adds. The quartile leaves it out and is no lucky single
    run.
    """
    run()
    times = []
    for _ in range(repeats):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 4]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Of the first core; 0 where the kernel does not say."""
    sizes = [path.read_text().strip() for path in root.glob("index*/size")]
    return max((int(size.rstrip("K")) << 10 for size in sizes if size.endswith("K")), default=0)
