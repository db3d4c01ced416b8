"""A model's linear layers in fewer bits, one layer after another, each calibrated on what it reads of a text.

A layer's inputs are those that the layers before it give in fewer bits, and each of its four products is rounded
knowing what the ones before it in the layer have become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.engine.attention import Batch, SdpaContext
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Transformer
from orchestrator.engine.stored import StoredCodes
from strategies.quantize import LINEARS

Found = tuple[int, str, StoredCodes]  # layer, which of LINEARS, codes
Told = Callable[[int, int], None]
State = tuple[Tensor, Tensor | None]  # of a window: x, and the sum that it is to be added to


def rounded(model: Transformer, to_nearest: Callable[[Tensor], StoredCodes], told: Told) -> Iterator[Found]:
    """Without a text: of each weight, what `to_nearest` makes of it."""
    for index, layer in enumerate(model.layers):
        for linear in LINEARS:
            weight_NK = layer.get_submodule(linear).get_parameter("weight").data
            yield index, linear, to_nearest(weight_NK)
        told(index + 1, len(model.layers))


@torch.no_grad()
def calibrated(
    model: Transformer,
    windows: Sequence[Sequence[int]],
    with_feedback: Callable[[Tensor, Tensor], StoredCodes],
    told: Told,
) -> Iterator[Found]:
    """Of each weight, what `with_feedback` makes of it and H. The model's weights are written over by that."""
    assert model.embed is not None, "the whole model is calibrated"
    contexts = [prompt_context(model, len(window)) for window in windows]
    device = model.embed.weight.device
    states: list[State] = [(model.embed(torch.tensor(window, device=device)), None) for window in windows]
    for index, layer in enumerate(model.layers):
        runs = [partial(_run, layer, index, state, c) for state, c in zip(states, contexts, strict=True)]
        for linear in LINEARS:
            product = layer.get_submodule(linear)
            hessian_KK = _read(product, runs)
            weight = product.get_parameter("weight")
            codes = with_feedback(weight.data, hessian_KK)
            weight.data.copy_(codes.dequantized())
            yield index, linear, codes
        states = [run() for run in runs]
        told(index + 1, len(model.layers))


def _run(layer: nn.Module, index: int, state: State, context: SdpaContext) -> State:
    """A layer may write over what it is given."""
    x, residual = state
    found: State = layer(x.clone(), None if residual is None else residual.clone(), index, context)
    return found


class _HasReadError(Exception):
    """Nothing behind a product is of interest once it has read."""


def _read(product: nn.Module, runs: Sequence[Callable[[], State]]) -> Tensor:
    """Σ x xᵀ of all that a product reads, float32."""
    k = product.get_parameter("weight").shape[1]
    hessian_KK = torch.zeros((k, k), device=product.get_parameter("weight").device)

    def add(_module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].float()
        hessian_KK.addmm_(x.T, x)
        raise _HasReadError

    hook = product.register_forward_pre_hook(add)
    try:
        for run in runs:
            with suppress(_HasReadError):
                run()
    finally:
        hook.remove()
    return hessian_KK


def prompt_context(model: Transformer, tokens: int) -> SdpaContext:
    """A prompt of so many tokens with a cache of its own, which every layer writes and reads in turn."""
    weight = model.get_parameter("embed.weight")
    blocks = -(-tokens // 16)
    cache = KVCache(model.spec, blocks, 16, weight.dtype, weight.device)
    at = np.arange(tokens, dtype=np.int64)
    one = np.array([0], dtype=np.int64)
    batch = Batch(at, at, one, np.array([tokens], dtype=np.int64), np.arange(blocks, dtype=np.int64)[None, :])
    return SdpaContext(cache, batch, model.spec, model.rope)
