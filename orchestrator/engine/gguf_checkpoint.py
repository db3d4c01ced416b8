"""Weights from a GGUF file, dequantized or as codes: a rank touches only the blocks that hold its rows and columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from cluster.errors import BadModel
from orchestrator.engine.gguf_blocks import taken_apart
from orchestrator.engine.stored import StoredCodes
from strategies.gguf_header import GgufTensor, read_header
from strategies.gguf_kept import together
from strategies.scheme import Scheme
from strategies.spec import ModelSpec
from strategies.tensor_shapes import check_shape, tensor_shapes

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_ROTATED = re.compile(r"\.[qk]_proj\.")
_OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`"""
    if match := _LAYER.fullmatch(name):
        layer, part, suffix = match.groups()
        return f"blk.{layer}.{_IN_LAYERS[part]}.{suffix}"
    return _OUTSIDE_LAYERS[name]


class GgufCheckpoint:
    """Reads give float32, by Hugging Face names and in that layout. The file is mapped, not loaded."""

    chunk_bytes = 4 * 2**20

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        header = read_header(path)
        self.spec = spec
        self._path = path
        self._tensors: Mapping[str, GgufTensor] = header.tensors
        self._shapes = tensor_shapes(spec)
        self._interleaved = header.metadata.get("general.architecture") == "llama"

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        tensor = self._checked(name)
        lines = self._file[tensor.offset : tensor.offset + tensor.bytes].reshape(-1, tensor.row_bytes)
        chosen = self._stored_rows(name, rows)
        if len(tensor.shape) == 1:
            return torch.from_numpy(_dequantized(lines, tensor)[0][chosen])
        if cols is None:
            return torch.from_numpy(_dequantized(lines[chosen], tensor))
        size = tensor.format.elements
        first, last = cols.start // size, -(-cols.stop // size)
        blocks = lines[chosen, first * tensor.format.bytes : last * tensor.format.bytes]
        values = _dequantized(blocks, tensor)[:, cols.start - first * size : cols.stop - first * size]
        return torch.from_numpy(values)

    def scheme(self, names: Sequence[str]) -> Scheme | None:
        """What keeps the rows of these tensors in one layer as they are stored; None: some are in full."""
        return together([self._checked(name).format.name for name in names])

    def codes(self, name: str, rows: range, cols: range, group: int) -> StoredCodes:
        """Of some rows and columns, with a scale every `group` columns, which divide the tensor's own groups."""
        tensor = self._checked(name)
        lines = self._file[tensor.offset : tensor.offset + tensor.bytes].reshape(-1, tensor.row_bytes)
        size, n_bytes = tensor.format.elements, tensor.format.bytes
        first, last = cols.start // size, -(-cols.stop // size)
        chosen = np.array(lines[self._stored_rows(name, rows), first * n_bytes : last * n_bytes])
        found = taken_apart(chosen, tensor.format.name, n_bytes)
        own = (last - first) * size // found.scales_RG.shape[1]
        assert own % group == 0 and cols.start % group == 0, f"{name}: groups of {own} told as {group}"
        inside = slice(cols.start - first * size, cols.stop - first * size)
        at = np.arange(inside.start, inside.stop, group) // own
        return StoredCodes(
            torch.from_numpy(np.ascontiguousarray(found.codes_RK[:, inside])),
            torch.from_numpy(found.scales_RG[:, at]),
            None,
            None if found.least_RG is None else torch.from_numpy(found.least_RG[:, at]),
        )

    def verify(self) -> None:
        """Raises BadModel unless every tensor of the spec is there, in its shape."""
        for name in self._shapes:
            self._checked(name)

    @cached_property
    def _file(self) -> npt.NDArray[np.uint8]:
        return np.memmap(self._path, dtype=np.uint8, mode="r")

    def _checked(self, name: str) -> GgufTensor:
        stored = gguf_name(name)
        if stored not in self._tensors:
            raise BadModel(f"{self._path.name} has no tensor {stored}, which {self.spec.name} needs")
        tensor = self._tensors[stored]
        check_shape(self.spec, name, tensor.shape, self._shapes[name])
        return tensor

    def _stored_rows(self, name: str, rows: range | None) -> slice | npt.NDArray[np.int64]:
        """Where the file has these rows.

        Files of architecture `llama` store q and k with the two dimensions that RoPE pairs side by side in
        each head (llama.cpp's convert_hf_to_gguf.py, permute); Hugging Face has them half a head apart.
        """
        asked = range(self._shapes[name][0]) if rows is None else rows
        if not (self._interleaved and _ROTATED.search(name)):
            return slice(asked.start, asked.stop)
        head, within = np.divmod(np.arange(asked.start, asked.stop), self.spec.head_dim)
        half, pair = np.divmod(within, self.spec.head_dim // 2)
        stored: npt.NDArray[np.int64] = head * self.spec.head_dim + 2 * pair + half
        return stored


def _dequantized(blocks: npt.NDArray[np.uint8], tensor: GgufTensor) -> npt.NDArray[np.float32]:
    """[rows, bytes] → [rows, values]"""
    owned = np.array(blocks)  # off the mapped file, which torch must not write to
    values: npt.NDArray[np.float32] = dequantize(owned, GGMLQuantizationType[tensor.format.name])
    return values
