"""Compiles the kernels that a model will want, several at a time: one after another they take most of a start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from orchestrator.engine import ops
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Layer, Transformer
from orchestrator.engine.paged_attention import DeviceSlots, PagedBatch, PagedContext, Prompts
from orchestrator.engine.told import FIELDS, prompt_numbers

THREADS = 8  # at work at once; a kernel takes one of them 0.5 to 2 s
ROWS = (1, 2, 64)  # the sizes of a step that choose different kernels
MANY_TOKENS = 2048


def compile_kernels(model: Transformer, cache: KVCache, slots: DeviceSlots) -> None:
    """Runs each kernel once, on what has no meaning, in the scratch slot. No collectives."""
    device = cache.keys[0].device
    on_device = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
    with ThreadPoolExecutor(THREADS, "compile", *on_device) as pool:
        for done in [pool.submit(_without_gradients, call) for call in _calls(model, cache, slots)]:
            done.result()


def _without_gradients(call: Callable[[], object]) -> None:
    with torch.inference_mode():
        call()


def _calls(model: Transformer, cache: KVCache, slots: DeviceSlots) -> Iterator[Callable[[], object]]:
    layer, spec = cast(Layer, model.layers[0]), model.spec
    keys = cache.keys[0]

    def states(rows: int, width: int) -> Tensor:
        return torch.zeros((rows, width), dtype=keys.dtype, device=keys.device)

    for batch in _batches(slots):
        x_TN = states(batch.told_4T.shape[1], layer.attention.qkv.out_features)
        context = PagedContext(cache, slots, batch, spec, model.rope)
        yield partial(context.attend, 0, x_TN, layer.attention.q_norm, layer.attention.k_norm)
    products = [layer.attention.qkv, layer.attention.o, layer.mlp.down]
    if model.head is not None:
        products.append(model.head)
    gate_up = layer.mlp.gate_up
    for rows in (1, 2):  # more go through cuBLAS, which wants 32 MiB to work in of each thread
        for product in products:
            yield partial(product.forward, states(rows, product.in_features))  # no hooks: no sums
        yield partial(gate_up.forward, states(rows, spec.hidden))
    yield partial(gate_up.forward, states(ROWS[-1], spec.hidden))
    yield partial(ops.argmax, states(1, spec.vocab))
    for rows in (1, MANY_TOKENS):
        x_TE = states(rows, spec.hidden)
        yield partial(layer.input_norm, x_TE)
        yield partial(layer.input_norm, x_TE, x_TE.clone())


def _batches(slots: DeviceSlots) -> Iterator[PagedBatch]:
    device = slots.tables.device

    def told(tokens: int) -> Tensor:
        numbers = np.zeros((FIELDS, tokens), dtype=np.int32)
        numbers[0], numbers[3] = slots.scratch, -1
        return torch.from_numpy(numbers).to(device)

    for rows in (*ROWS, len(slots.tables) - 1):
        yield PagedBatch(told(rows), rows, None)
    one_row = torch.zeros(prompt_numbers(1), dtype=torch.int32, device=device)
    yield PagedBatch(told(16), 0, Prompts.of(one_row, 1, 16))
