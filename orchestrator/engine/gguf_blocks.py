"""A GGUF file's blocks taken apart: codes, scales, and least values, as exact as the file has them.

w = code × scale + least, in float32: the same operations, in the same order, as gguf.quants.dequantize. The layouts of
blocks are those of https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.

Dimensions: R rows, K columns, B blocks (of all rows, one row after another), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Blocks:
    codes_RK: Codes
    scales_RG: Floats
    least_RG: Floats | None  # None: 0


def taken_apart(lines_RX: Bytes, kind: str, block_bytes: int) -> Blocks:
    """Rows of whole blocks."""
    rows = len(lines_RX)
    codes, scales, least = _READERS[kind](np.ascontiguousarray(lines_RX).reshape(-1, block_bytes))
    return Blocks(
        codes.astype(np.int8, copy=False).reshape(rows, -1),
        scales.reshape(rows, -1),
        None if least is None else least.reshape(rows, -1),
    )


_Parts = tuple[npt.NDArray[np.generic], Floats, Floats | None]


def _half(two_bytes: Bytes) -> Floats:
    """[B, 2] → [B, 1]"""
    halves: npt.NDArray[np.float16] = np.ascontiguousarray(two_bytes).view(np.float16)
    return halves.astype(np.float32)


def _nibbles(bytes_BX: Bytes, run: int) -> Bytes:
    """The low halves of a run of bytes, then their high halves: [B, 2 X]."""
    runs = bytes_BX.reshape(len(bytes_BX), -1, 1, run)
    halves: Bytes = np.concatenate((runs, runs >> 4), axis=2) & np.uint8(15)
    return halves.reshape(len(bytes_BX), -1)


def _fifth_bits(bytes_B4: Bytes) -> Bytes:
    """[B, 32], in the place of a code's fifth bit."""
    bits: Bytes = np.unpackbits(bytes_B4, axis=1, bitorder="little")
    return bits << np.uint8(4)


def _q8_0(b: Bytes) -> _Parts:
    return b[:, 2:].view(np.int8), _half(b[:, :2]), None


def _q4_0(b: Bytes) -> _Parts:
    return _nibbles(b[:, 2:], 16).astype(np.int8) - np.int8(8), _half(b[:, :2]), None


def _q4_1(b: Bytes) -> _Parts:
    return _nibbles(b[:, 4:], 16), _half(b[:, :2]), _half(b[:, 2:4])


def _q5_0(b: Bytes) -> _Parts:
    codes = _nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])
    return codes.astype(np.int8) - np.int8(16), _half(b[:, :2]), None


def _q5_1(b: Bytes) -> _Parts:
    return _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8]), _half(b[:, :2]), _half(b[:, 2:4])


def _k_scales(b: Bytes) -> tuple[Floats, Floats]:
    """Of the eight groups of a block, and their least values. Twelve bytes have six bits of each: those of the first
    four groups, and of the last four the upper two beside these and the lower four behind them."""
    first, second, lower = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate((first & 63, (lower & 15) | ((first >> 2) & 48)), axis=1)
    least = np.concatenate((second & 63, (lower >> 4) | ((second >> 2) & 48)), axis=1)
    return _half(b[:, :2]) * scales.astype(np.float32), -(_half(b[:, 2:4]) * least.astype(np.float32))


def _q4_k(b: Bytes) -> _Parts:
    return _nibbles(b[:, 16:], 32), *_k_scales(b)


def _q5_k(b: Bytes) -> _Parts:
    fifth = (
        b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]
    ) & 1  # a bit of each byte for each group
    return _nibbles(b[:, 48:], 32) | (fifth << 4).reshape(len(b), -1), *_k_scales(b)


def _q6_k(b: Bytes) -> _Parts:
    low = _nibbles(b[:, :128], 64)
    pairs = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    codes = low | ((pairs & 3) << 4).reshape(len(b), -1)
    scales = _half(b[:, 208:]) * b[:, 192:208].view(np.int8).astype(np.float32)
    return codes.astype(np.int8) - np.int8(32), scales, None


_READERS: Mapping[str, Callable[[Bytes], _Parts]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
