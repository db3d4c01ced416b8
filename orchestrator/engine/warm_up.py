"""Compiles the kernels that a model will want, several at a time: one after another they take most of a start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import cast

import numpy as np
import torch
from torch import Tensor

from orchestrator.engine import ops
from orchestrator.engine.captured import GRAPH_PROMPTS
from orchestrator.engine.kernels.attention import query_rows
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Layer, Transformer
from orchestrator.engine.paged_attention import (
    DeviceSlots,
    PagedBatch,
    PagedContext,
    Prompts,
    batch_in_graph,
    to_device,
)
from orchestrator.engine.quantized import Quantized
from orchestrator.engine.told import FIELDS, Block, Shape, numbers_of

THREADS = 8  # at work at once; a kernel takes one of them 0.5 to 2 s
ROWS = (1, 2, 64)  # the sizes of a step that choose different kernels
MANY_TOKENS = 2048


def compile_kernels(model: Transformer, cache: KVCache, slots: DeviceSlots) -> None:
    """Runs each kernel once, on what has no meaning, in the scratch slot. No collectives."""
    device = cache.keys[0].device
    on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
    with launchers_apart() as threads, ThreadPoolExecutor(threads, "compile", *on_device) as pool:
        for done in [pool.submit(_without_gradients, call) for call in _calls(model, cache, slots)]:
            done.result()


@contextmanager
def launchers_apart() -> Iterator[int]:
    """How many threads may compile Triton's kernels at once.

    Triton 3.6 imports a kernel's launcher as a module of one and the same name, and reads the function `launch` from
    it. Where the file was imported before, for another kernel of the same signature, Python gives the module that was
    imported last under the name, whose functions it replaces: a thread between import and reading may leave with
    another kernel's launcher (seen: "function takes exactly 26 arguments (22 given)").
    """
    from triton.runtime import build

    load, lock = getattr(build, "_load_module_from_path", None), threading.Lock()
    if load is None:  # another version, which may or may not do the same
        yield 1
        return

    def load_apart(name: str, path: str) -> ModuleType:
        apart = ModuleType(name)
        with lock:
            apart.__dict__.update(vars(load(name, path)))
        return apart

    build._load_module_from_path = load_apart
    try:
        yield THREADS
    finally:
        build._load_module_from_path = load


def _without_gradients(call: Callable[[], object]) -> None:
    with torch.inference_mode():
        call()


def _calls(model: Transformer, cache: KVCache, slots: DeviceSlots) -> Iterator[Callable[[], object]]:
    layer, spec = cast(Layer, model.layers[0]), model.spec
    device = cache.keys[0].device

    def states(rows: int, width: int) -> Tensor:
        return torch.zeros((rows, width), dtype=cache.dtype, device=device)

    block = Block(query_rows(spec.head_dim, cache.dtype, device), spec.heads // spec.kv_heads)
    for batch in _batches(slots, block):
        x_TN = states(batch.told_4T.shape[1], layer.attention.qkv.out_features)
        context = PagedContext(cache, slots, batch, spec, model.rope)
        yield partial(context.attend, 0, x_TN, layer.attention.q_norm, layer.attention.k_norm)
    products = [layer.attention.qkv, layer.attention.o, layer.mlp.down]
    if model.head is not None:
        products.append(model.head)
    gate_up = layer.mlp.gate_up
    for product in (*products, gate_up):
        # More go through cuBLAS, which wants 32 MiB to work in of each thread.
        tried: Sequence[int] = (1, 2)
        if isinstance(product, Quantized):
            x_1K = states(1, product.in_features)
            tried = ops.rows_by_kernel(x_1K, product.codes, product.scales, product.how)
        for rows in tried:
            yield partial(product.forward, states(rows, product.in_features))  # no hooks: no sums
    yield partial(gate_up.forward, states(ROWS[-1], spec.hidden))
    yield partial(ops.argmax, states(1, spec.vocab))
    for rows in (1, MANY_TOKENS):
        x_TE = states(rows, spec.hidden)
        yield partial(layer.input_norm, x_TE)
        yield partial(layer.input_norm, x_TE, x_TE.clone())


def _batches(slots: DeviceSlots, block: Block) -> Iterator[PagedBatch]:
    device = slots.tables.device

    def told(tokens: int) -> Tensor:
        numbers = np.zeros((FIELDS, tokens), dtype=np.int32)
        numbers[0], numbers[3] = slots.scratch, -1
        return torch.from_numpy(numbers).to(device)

    for rows in (*ROWS, len(slots.tables) - 1):
        yield PagedBatch(told(rows), rows, None)
    empty = torch.zeros(2, dtype=torch.int32, device=device)
    yield PagedBatch(told(16), 0, Prompts(empty[:1], empty[:1], empty, first=0, longest=16))
    shape = Shape(16, 0, GRAPH_PROMPTS, 16, block)
    yield batch_in_graph(told(16), to_device(numbers_of([], shape), device), shape)[0]
