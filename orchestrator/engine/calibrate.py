"""A model's linear layers in four bits, one layer after another, each calibrated on what it reads of a text.

A layer's inputs are those that the layers before it give in four bits, and each of its four products is rounded knowing
what the ones before it in the layer have become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.engine.attention import Batch, SdpaContext
from orchestrator.engine.gptq import Codes, to_nearest, with_feedback
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Transformer
from strategies.quantize import LINEARS

Found = tuple[int, str, Codes]  # layer, which of LINEARS, codes
Told = Callable[[int, int], None]
State = tuple[Tensor, Tensor | None]  # of a window: x, and the sum that it is to be added to


def rounded(model: Transformer, group: int, dtype: torch.dtype, told: Told) -> Iterator[Found]:
    """To nearest, without a text. `dtype`: of the scales."""
    for index, layer in enumerate(model.layers):
        for linear in LINEARS:
            weight_NK = layer.get_submodule(linear).get_parameter("weight").data
            yield index, linear, to_nearest(weight_NK, group, dtype)
        told(index + 1, len(model.layers))


@torch.no_grad()
def calibrated(
    model: Transformer, windows: Sequence[Sequence[int]], group: int, dtype: torch.dtype, told: Told
) -> Iterator[Found]:
    """With error feedback. The model's weights are written over by what they become."""
    assert model.embed is not None, "the whole model is calibrated"
    contexts = [_context(model, len(window)) for window in windows]
    device = model.embed.weight.device
    states: list[State] = [(model.embed(torch.tensor(window, device=device)), None) for window in windows]
    for index, layer in enumerate(model.layers):
        run = partial(_run, layer, index, states, contexts)
        for linear in LINEARS:
            product = layer.get_submodule(linear)
            hessian_KK = _read(product, run)
            weight = product.get_parameter("weight")
            codes = with_feedback(weight.data, hessian_KK, group, dtype)
            weight.data.copy_(codes.dequantized())
            yield index, linear, codes
        states = run()
        told(index + 1, len(model.layers))


def _run(
    layer: nn.Module, index: int, states: Sequence[State], contexts: Sequence[SdpaContext]
) -> list[State]:
    """A layer may write over what it is given."""
    return [
        layer(x.clone(), None if residual is None else residual.clone(), index, context)
        for (x, residual), context in zip(states, contexts, strict=True)
    ]


def _read(product: nn.Module, run: Callable[[], object]) -> Tensor:
    """Σ x xᵀ of all that a product reads, float32."""
    k = product.get_parameter("weight").shape[1]
    hessian_KK = torch.zeros((k, k), device=product.get_parameter("weight").device)

    def add(_module: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].float()
        hessian_KK.addmm_(x.T, x)

    hook = product.register_forward_pre_hook(add)
    try:
        run()
    finally:
        hook.remove()
    return hessian_KK


def _context(model: Transformer, tokens: int) -> SdpaContext:
    """A prompt of so many tokens with a cache of its own, which every layer writes and reads in turn."""
    weight = model.get_parameter("embed.weight")
    blocks = -(-tokens // 16)
    cache = KVCache(model.spec, blocks, 16, weight.dtype, weight.device)
    at = np.arange(tokens, dtype=np.int64)
    one = np.array([0], dtype=np.int64)
    batch = Batch(at, at, one, np.array([tokens], dtype=np.int64), np.arange(blocks, dtype=np.int64)[None, :])
    return SdpaContext(cache, batch, model.spec, model.rope)
