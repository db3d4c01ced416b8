"""bitsandbytes' four bits (NF4, FP4): codes of a table of sixteen values, in blocks with a scale, maybe a code too.

As Linear4bit saves them beside `weight`, [N × K / 2, 1]: two codes a byte, the first the upper; `weight.absmax` scales
of blocks of the weights one row after another; `weight.quant_map` the table; where scales are in eight bits themselves
`weight.nested_absmax` and `weight.nested_quant_map`; and the sizes of blocks in a JSON object, as bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import BadModel
from orchestrator.engine.safetensors_files import SafetensorsFiles
from strategies.spec import ModelSpec
from strategies.tensor_shapes import check_shape

_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


@dataclass(frozen=True, slots=True)
class _State:
    block: int  # weights
    nested_block: int  # scales; 0: they are float32
    offset: float  # of scales in eight bits


def expected(files: SafetensorsFiles, spec: ModelSpec, name: str, shape: tuple[int, ...]) -> None:
    """Raises BadModel unless all that the weights `name` are made of is there, in its shape."""
    state, count = _state(files, spec, name), shape[0] * shape[1]
    blocks = -(-count // state.block)
    parts = {"": (-(-count // 2), 1), ".absmax": (blocks,), ".quant_map": (16,)}
    if state.nested_block:
        parts |= {".nested_absmax": (-(-blocks // state.nested_block),), ".nested_quant_map": (256,)}
    for part, wanted in parts.items():
        check_shape(spec, f"{name}{part}", files.shape(f"{name}{part}"), wanted)
        stored = files.find(f"{name}{part}")
        if part and not (part == ".absmax" and state.nested_block):
            files.check_float(f"{name}{part}")
        elif stored is not None and stored.dtype != "U8":
            raise BadModel(
                f"{spec.name}: {name}{part} is stored as {stored.dtype}; bitsandbytes writes U8; fetch it again"
            )


def widened(files: SafetensorsFiles, spec: ModelSpec, name: str, rows: range, columns: int) -> Tensor:
    """float32 [rows, columns]: whole rows, to the bit of bitsandbytes' own."""
    state = _state(files, spec, name)
    first, last = rows.start * columns, rows.stop * columns
    some = files.read(name, range(first // 2, -(-last // 2))).flatten()
    codes = torch.stack((some >> 4, some & 15), dim=1).flatten()[first % 2 :][: last - first]
    begin = first // state.block
    scales = _scales(files, name, state)[begin : -(-last // state.block)].repeat_interleave(state.block)
    table = files.read(f"{name}.quant_map").float()
    wide = table[codes.int()].mul_(scales[first - begin * state.block :][: last - first])
    return wide.view(len(rows), columns)


def _scales(files: SafetensorsFiles, name: str, state: _State) -> Tensor:
    """float32, of each block."""
    scales = files.read(f"{name}.absmax").clone()
    if not state.nested_block:
        return scales.float()
    nested = files.read(f"{name}.nested_absmax").float().clone()
    table = files.read(f"{name}.nested_quant_map").float()
    return table[scales.long()] * nested[torch.arange(len(scales)) // state.nested_block] + state.offset


def _state(files: SafetensorsFiles, spec: ModelSpec, name: str) -> _State:
    found = next((f"{name}.{state}" for state in _STATES if files.find(f"{name}.{state}")), None)
    if found is None:
        raise BadModel(
            f"{spec.name}: {name} is in bytes without {_STATES[0]}, its quantization; fetch it again"
        )
    try:
        told = json.loads(bytes(files.read(found).tolist()))
        nested = int(told.get("nested_blocksize", 0))
        state = _State(int(told["blocksize"]), nested, float(told["nested_offset"]) if nested else 0.0)
        if not math.isfinite(state.offset):
            raise ValueError(state.offset)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise BadModel(
            f"{spec.name}: {found} is no quantization that bitsandbytes writes; fetch it again"
        ) from None
    if state.block < 1 or state.nested_block < 0:
        raise BadModel(f"{spec.name}: {found} has blocks of {state.block}; they must be at least 1")
    return state
