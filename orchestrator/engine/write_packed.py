"""Weights in fewer bits on disk as compressed-tensors' safetensors, which vLLM and transformers read.

Of four bits (pack-quantized) each linear layer has weight_packed (eight codes an int32 along the columns),
weight_scale, weight_zero_point (eight an int32 along the rows) and weight_shape; of float8 (float-quantized) weight, in
it, and weight_scale, a channel's. Everything else is in the model's dtype.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.engine.checkpoint import Checkpoint
from orchestrator.engine.published import packed
from orchestrator.engine.stored import StoredCodes
from strategies.spec import ModelSpec
from strategies.tensor_shapes import tensor_shapes

BITS = 4
SHARD_BYTES = 4 * 2**30
_ATTENTION, _MLP = "self_attn", "mlp"


def four_bits_config(group: int) -> dict[str, object]:
    weights = _codes(BITS, "int", "group", symmetric=False) | {"group_size": group, "actorder": None}
    return _config("pack-quantized", weights, None)


def float8_config() -> dict[str, object]:
    """Rows of x are made float8 as they come: `dynamic`."""
    x = _codes(8, "float", "token", symmetric=True) | {"dynamic": True, "observer": None}
    return _config("float-quantized", _codes(8, "float", "channel", symmetric=True), x)


def _codes(bits: int, kind: str, strategy: str, *, symmetric: bool) -> dict[str, object]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": False,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _config(form: str, weights: dict[str, object], x: dict[str, object] | None) -> dict[str, object]:
    linears = {"targets": ["Linear"], "weights": weights, "input_activations": x, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": linears},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def layer_tensors(
    spec: ModelSpec, layer: int, linear: str, codes: StoredCodes
) -> Iterator[tuple[str, Tensor]]:
    """One of LINEARS, under the names of the checkpoint's parts of it."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    parts = {
        "attention.qkv": (
            (f"{_ATTENTION}.q_proj", q),
            (f"{_ATTENTION}.k_proj", kv),
            (f"{_ATTENTION}.v_proj", kv),
        ),
        "attention.o": ((f"{_ATTENTION}.o_proj", spec.hidden),),
        "mlp.gate_up": ((f"{_MLP}.gate_proj", spec.intermediate), (f"{_MLP}.up_proj", spec.intermediate)),
        "mlp.down": ((f"{_MLP}.down_proj", spec.hidden),),
    }[linear]
    at = 0
    for name, rows in parts:
        own = codes.rows(slice(at, at + rows))
        at += rows
        stem = f"model.layers.{layer}.{name}"
        yield f"{stem}.weight_scale", own.scales_NG.cpu().contiguous()
        if own.zero_points_NG is None:
            yield f"{stem}.weight", own.codes_NK.cpu().contiguous()
            continue
        yield f"{stem}.weight_packed", packed(own.codes_NK.cpu(), BITS)
        yield (
            f"{stem}.weight_zero_point",
            packed(own.zero_points_NG.cpu().T.contiguous(), BITS).T.contiguous(),
        )
        yield f"{stem}.weight_shape", torch.tensor(own.codes_NK.shape, dtype=torch.int64)


def plain_tensors(
    spec: ModelSpec, checkpoint: Checkpoint, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Embedding, head, norms and biases."""
    for name in tensor_shapes(spec):
        if not name.endswith("_proj.weight"):
            yield name, checkpoint.read(name).to(dtype).clone()


def _save(shard: Mapping[str, Tensor], path: Path) -> None:
    """Raises OSError, which safetensors tells in words alone."""
    try:
        save_file(dict(shard), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> int:
    """As they come, in files of up to some GB, with an index where there are several. → bytes."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    held = total = 0

    def flush() -> None:
        _save(shard, directory / f"part-{len(shards) + 1}.safetensors")
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if held and held + tensor.nbytes > SHARD_BYTES:
            flush()
            held = 0
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        made = (directory / f"part-{i + 1}.safetensors").rename(directory / name)
        made.chmod(0o644)  # safetensors makes files for their owner alone
    if len(shards) > 1:
        weight_map = {tensor: names[i] for i, found in enumerate(shards) for tensor in found}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total
