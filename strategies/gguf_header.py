"""The header of a GGUF file: metadata and where each tensor lies.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every command reads it at its
start, and gguf.GGUFReader takes seconds over a vocabulary; this takes a tenth of one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import BadModel


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Rows are cut in blocks of `elements` values, which take `bytes` each."""

    name: str
    elements: int
    bytes: int


# The quantizations that are supported, by ggml's numbers, with the sizes of gguf.constants.GGML_QUANT_SIZES.
FORMATS = {
    0: BlockFormat("F32", 1, 4),
    1: BlockFormat("F16", 1, 2),
    2: BlockFormat("Q4_0", 32, 18),
    3: BlockFormat("Q4_1", 32, 20),
    6: BlockFormat("Q5_0", 32, 22),
    7: BlockFormat("Q5_1", 32, 24),
    8: BlockFormat("Q8_0", 32, 34),
    12: BlockFormat("Q4_K", 256, 144),
    13: BlockFormat("Q5_K", 256, 176),
    14: BlockFormat("Q6_K", 256, 210),
    30: BlockFormat("BF16", 1, 2),
}

_SCALARS = {
    code: struct.Struct("<" + letter)
    for code, letter in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}.items()
} | {10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    shape: tuple[int, ...]  # as PyTorch counts: rows first
    format: BlockFormat
    offset: int  # bytes from the start of the file

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.format.elements * self.format.bytes

    @property
    def bytes(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: Mapping[str, object]
    tensors: Mapping[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Raises BadModel where the file is missing, no GGUF, cut short, or quantized in an unsupported way."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(data, path.name).header()
            size = len(data)
    except BadModel:
        raise
    except OSError as error:
        raise BadModel(f"{path} cannot be read: {error.strerror}; give a .gguf file") from None
    except (struct.error, IndexError, ValueError):  # ValueError: an empty file, or a string that is not UTF-8
        raise BadModel(
            f"{path.name} is cut short or corrupt: its header does not end; fetch it again"
        ) from None
    end = max((tensor.offset + tensor.bytes for tensor in header.tensors.values()), default=0)
    if end > size:
        raise BadModel(
            f"{path.name} is cut short: its tensors end at byte {end}, the file at {size}; fetch it again"
        )
    return header


class _Reader:
    """Walks a header. Running off its end raises struct.error or IndexError."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.at = 0

    def header(self) -> GgufHeader:
        if self.data[:4] != b"GGUF":
            raise BadModel(f"{self.name} is not a GGUF file: it starts with {self.data[:4]!r}, not b'GGUF'")
        self.at = 4
        version = self.scalar(_U32)
        if version not in (2, 3):
            raise BadModel(
                f"{self.name} is GGUF version {version}; versions 2 and 3, little-endian, are read"
            )
        tensors, fields = self.scalar(_U64), self.scalar(_U64)
        metadata = {self.string(): self.value(self.scalar(_U32)) for _ in range(fields)}
        infos = [self.tensor_info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise BadModel(f"{self.name}: general.alignment is {alignment!r}; it must be at least 1")
        start = -(-self.at // alignment) * alignment
        return GgufHeader(metadata, {name: self.tensor(name, start, *info) for name, *info in infos})

    def scalar(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def string(self) -> str:
        start = self.at + 8
        (length,) = _U64.unpack_from(self.data, self.at)
        self.at = start + length
        if self.at > len(self.data):
            raise IndexError
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(self.layout(kind))
        inner, count = self.scalar(_U32), self.scalar(_U64)
        if inner in (_STRING, _ARRAY):
            read = self.string if inner == _STRING else partial(self.value, _ARRAY)
            return [read() for _ in range(count)]
        layout = self.layout(inner)
        end = self.at + count * layout.size
        if end > len(self.data):
            raise IndexError
        values = [value for (value,) in layout.iter_unpack(self.data[self.at : end])]
        self.at = end
        return values

    def layout(self, kind: int) -> struct.Struct:
        if kind not in _SCALARS:
            raise BadModel(f"{self.name} is corrupt: it has a metadata value of type {kind}; fetch it again")
        return _SCALARS[kind]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """→ name, shape, number of the format, offset from the start of the tensors."""
        name = self.string()
        shape = tuple(self.scalar(_U64) for _ in range(self.scalar(_U32)))[::-1]
        return name, shape, self.scalar(_U32), self.scalar(_U64)

    def tensor(self, name: str, start: int, shape: Any, number: Any, offset: Any) -> GgufTensor:
        block = FORMATS.get(number)
        if block is None:
            supported = ", ".join(known.name for known in FORMATS.values())
            raise BadModel(
                f"{self.name}: {name} is quantized as {_format_name(number)}, which is not supported; "
                f"supported are {supported}"
            )
        if not shape or shape[-1] % block.elements:
            raise BadModel(
                f"{self.name}: {name} has rows of {shape[-1] if shape else 0} values, "
                f"not whole blocks of {block.elements} ({block.name}); fetch it again"
            )
        return GgufTensor(shape, block, start + offset)


def _format_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    names: dict[int, str] = {kind.value: kind.name for kind in GGMLQuantizationType}
    return names.get(number, f"type {number}")
