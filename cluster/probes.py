"""What cluster/measure.py times of a device by itself, each probe in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from cluster import onednn
from cluster.profile import Detail, Rates

LEAST_REPEATS = 3
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}

MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of a probed weight: like a layer's of a model that fits such a device."""

FEW_ROWS = (2, 4, 8, 16, 64)
"""Of products on a CPU."""

PREFILL_TOKENS = {"cpu": 256, "cuda": 2048}

READ_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Least bytes of weights that a pass reads: caches (an H100's 50 MB) then hold little of the last pass."""

SUM_BYTES = {"cpu": 128 << 20, "cuda": 4 << 30}
"""Of a plain read and a copy: a millisecond and more, beside which a launch is nothing."""

PRODUCT_ROWS = {"cpu": (1, 16, 64, 256), "cuda": (1, 16, 64, 256, 2048)}
PRODUCT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "int8", "float8")}
LEAST_INT8_ROWS = (
    32  # torch._int_mm takes no fewer than 17; others are padded, as a kernel of ours would have to
)
LAUNCHES = 1000
GRAPH_KERNELS = 200

Multiply = Callable[[torch.Tensor], torch.Tensor]


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
        torch.set_num_threads(self.threads)
        if self.kind == "cpu":
            return torch.device("cpu")
        # CUDA may count the cards in another order than NVML does.
        uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
        device = torch.device("cuda", uuids.index(self.uuid))
        torch.cuda.set_device(device)
        torch.cuda.empty_cache()  # what an earlier job of this process left
        return device


def rates(target: Target) -> Rates:
    """Of one device, with whatever else runs at the time."""
    device = target.open()
    dtypes = DTYPES[device.type]
    read = {name: _read_bytes_per_s(target, device, getattr(torch, name)) for name in dtypes}
    flops = {name: _flops_per_s(target, device, getattr(torch, name)) for name in dtypes}
    products = {}
    if device.type == "cpu":  # in what it computes in unless told otherwise
        one = read["float32"] / 2  # two FLOPs by a weight of four bytes
        products["float32"] = {1: one, **_few_rows(target, device), PREFILL_TOKENS["cpu"]: flops["float32"]}
    return Rates(read, flops, _layer_s(target, device), products)


def _read_bytes_per_s(target: Target, device: torch.device, dtype: torch.dtype) -> float:
    """Weights beyond the caches, each read once a pass by a product with one row."""
    weights = _beyond_caches(target, device, dtype)
    in_all = sum(weight.nbytes for weight in weights)
    run = _with_each([onednn.prepared(weight) for weight in weights], _rows(weights[0], 1))
    return in_all / repeated_s(run, device, target.probe_s)


def _few_rows(target: Target, device: torch.device) -> dict[int, float]:
    """FLOP/s by rows, in float32, weights from beyond the caches."""
    weights = _beyond_caches(target, device, torch.float32)
    flops = 2 * sum(weight.numel() for weight in weights)
    products = [onednn.prepared(weight) for weight in weights]
    runs = {rows: _with_each(products, _rows(weights[0], rows)) for rows in FEW_ROWS}
    return {rows: rows * flops / _typical_s(run, device, LEAST_REPEATS) for rows, run in runs.items()}


def _beyond_caches(target: Target, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    n = MATRIX[device.type]
    size = torch.empty((), dtype=dtype).element_size()
    in_all = max(READ_BYTES[device.type], 2 * _last_level_cache_bytes() if device.type == "cpu" else 0)
    count = max(2, in_all // (target.ranks * n * n * size))
    return [torch.full((n, n), 0.01, dtype=dtype, device=device) for _ in range(count)]


def _rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return weight.new_full((rows, weight.shape[1]), 0.01)


def _with_each(products: Sequence[Multiply], x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        for product in products:
            product(x)

    return run


def _flops_per_s(target: Target, device: torch.device, dtype: torch.dtype) -> float:
    n, tokens = MATRIX[device.type], PREFILL_TOKENS[device.type]
    weight = torch.randn(
        n, n, dtype=dtype, device=device
    )  # equal numbers take less power, so clocks stay higher
    x = torch.randn(tokens, n, dtype=dtype, device=device)
    product = onednn.prepared(weight)
    return 2 * tokens * n * n / repeated_s(lambda: product(x), device, target.probe_s)


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
        return repeated_s(run, device, target.probe_s) / layers


def repeated_s(run: Callable[[], object], device: torch.device, probe_s: float) -> float:
    """As `_typical_s`, as often as fits `probe_s`."""
    first_s = _typical_s(run, device, 1)
    return _typical_s(run, device, max(LEAST_REPEATS, min(1000, int(probe_s / first_s))))


def _typical_s(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one run, after one that does not count: the time that a quarter of the repeats beat.

    Noise is one-sided: what else runs here only ever adds. The quartile leaves it out and is no lucky single
    run. Of a CPU, where one thread works, the time that it ran counts.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    run()
    times = []
    for _ in range(repeats):
        _finish(device)
        start = clock()
        run()
        _finish(device)
        times.append(clock() - start)
    return sorted(times)[repeats // 4]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Of the first core; 0 where the kernel does not say."""
    sizes = [path.read_text().strip() for path in root.glob("index*/size")]
    return max((int(size.rstrip("K")) << 10 for size in sizes if size.endswith("K")), default=0)


# --- more closely -------------------------------------------------------------------------------------------


def detail(target: Target) -> Detail:
    """Of one device: memory, products by rows and dtype, launches."""
    device = target.open()
    read, copy = _memory_bytes_per_s(target, device)
    products = {}
    for dtype in PRODUCT_DTYPES[device.type]:
        if _has(device, dtype):
            products[dtype] = _products(target, device, dtype)
    return Detail(
        read_bytes_per_s=read,
        copy_bytes_per_s=copy,
        products=products,
        product_size=MATRIX[device.type],
        launch_s=_launch_s(device),
        graph_kernel_s=_graph_kernel_s(device) if device.type == "cuda" else None,
    )


def _has(device: torch.device, dtype: str) -> bool:
    """Whether the chip multiplies in it: int8 since Turing, bfloat16 since Ampere, float8 since Ada."""
    if device.type == "cpu":
        return True
    if torch.version.hip:
        return dtype in ("bfloat16", "float16")
    least = {"int8": (7, 5), "bfloat16": (8, 0), "float8": (8, 9)}.get(dtype, (0, 0))
    return torch.cuda.get_device_capability(device) >= least


def _memory_bytes_per_s(target: Target, device: torch.device) -> tuple[float, float]:
    """(read by a sum, read and written by a copy), over more bytes than caches hold."""
    least = max(SUM_BYTES[device.type], 2 * _last_level_cache_bytes() if device.type == "cpu" else 0)
    source = torch.ones(_room(device, least, 2) // 4, device=device)
    target_tensor = torch.zeros_like(source)
    read_s = repeated_s(lambda: source.sum(), device, target.probe_s)
    copy_s = repeated_s(lambda: target_tensor.copy_(source), device, target.probe_s)
    return source.nbytes / read_s, 2 * source.nbytes / copy_s


def _room(device: torch.device, wanted: int, parts: int) -> int:
    """Bytes to take for each of so many parts: no more than half of what is free."""
    if device.type == "cpu":
        return wanted
    return min(wanted, torch.cuda.mem_get_info(device)[0] // (2 * parts))


def _products(target: Target, device: torch.device, dtype: str) -> dict[int, float]:
    """FLOP/s by rows, where such products run. Each run goes through several weights, so that none is in a cache."""
    n = MATRIX[device.type]
    size = {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype, 1)
    count = max(2, _room(device, READ_BYTES[device.type] // 2, 1) // (n * n * size))
    products = [_by(_weight(n, dtype, device), dtype) for _ in range(count)]
    graphs, share_s = device.type == "cuda", target.probe_s / 4
    found = {}
    for rows in PRODUCT_ROWS[device.type]:
        padded = max(rows, LEAST_INT8_ROWS) if dtype == "int8" else rows
        run = _with_each(products, _weight(n, dtype, device)[:padded].contiguous())
        try:
            seconds = graphed_s(run, device, target.probe_s) if graphs else repeated_s(run, device, share_s)
        except RuntimeError:  # a shape for which the chip's library has no kernel
            continue
        found[rows] = count * 2 * rows * n * n / seconds
    return found


def _weight(n: int, dtype: str, device: torch.device) -> torch.Tensor:
    """Of random numbers: equal ones take less power, so a GPU's clocks stay higher than they do at work."""
    if dtype == "int8":
        return torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device)
    if dtype == "float8":
        return torch.randn(n, n, device=device).to(torch.float8_e4m3fn)
    return torch.randn(n, n, dtype=getattr(torch, dtype), device=device)


def _by(weight: torch.Tensor, dtype: str) -> Multiply:
    if dtype == "int8":
        return lambda x: torch._int_mm(x, weight.t())
    if dtype == "float8":
        one = torch.ones((), device=weight.device)
        return lambda x: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16)
    return onednn.prepared(weight)


def graphed_s(run: Callable[[], object], device: torch.device, probe_s: float) -> float:
    """Of one run inside a CUDA graph, whose launch hides the host."""
    graph = _captured(run)
    return repeated_s(graph.replay, device, probe_s)


def _captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


def _launch_s(device: torch.device) -> float:
    """Host time of an operation on next to nothing, launched one after the other."""
    x = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            x.zero_()

    return _typical_s(launches, device, LEAST_REPEATS) / LAUNCHES


def _graph_kernel_s(device: torch.device) -> float:
    """A kernel that does next to nothing, as one of many in a CUDA graph."""
    x = torch.zeros(1, device=device)

    def kernels() -> None:
        for _ in range(GRAPH_KERNELS):
            x.add_(1)

    return _typical_s(_captured(kernels).replay, device, LEAST_REPEATS) / GRAPH_KERNELS
