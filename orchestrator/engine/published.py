"""Checkpoints in fewer bits as they are published: codes as stored, where a layer keeps them, else widened.

What the formats mean, and whose arithmetic the tests spell out:
  packed    compressed-tensors' pack-quantized: eight 4-bit (four 8-bit) codes an int32, the lowest bits first, along
            the columns, zero points along the rows; w = (code − zero point) × scale, of a group or of a channel
  channels  weights in int8 or float8 (e4m3) × weight_scale, of each channel or of the tensor
  blocks    weights in float8 × weight_scale_inv, of each block of rows and columns
  GPTQ      qweight [K / 8, N], qzeros [groups, N / 8], scales [groups, N], g_idx: each column's group
  NF4       bitsandbytes.py
  AWQ       qweight [K, N / 8], qzeros and scales as GPTQ's; the eight of an int32 are channels 0 2 4 6 1 3 5 7

Dimensions: N output channels, K columns, G groups.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import BadModel
from orchestrator.engine import bitsandbytes
from orchestrator.engine.safetensors_files import FLOATS, SafetensorsFiles
from orchestrator.engine.stored import StoredCodes
from strategies.published import Stored
from strategies.spec import ModelSpec
from strategies.tensor_shapes import check_shape, tensor_shapes

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight channels lies
_PARTS = {
    Stored.PACKED: ("weight_packed", "weight_scale"),
    Stored.CHANNELS: ("weight", "weight_scale"),
    Stored.BLOCKS: ("weight", "weight_scale_inv"),
    Stored.GPTQ: ("qweight", "qzeros", "scales"),
    Stored.AWQ: ("qweight", "qzeros", "scales"),
}


class PublishedCheckpoint:
    """A directory whose linear layers are stored in fewer bits, all or some of them."""

    chunk_bytes = 2**30  # whole tensors: what is packed along the channels is not read by rows

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        assert spec.published is not None, "a plain checkpoint"
        self.spec, self._how = spec, spec.published
        self._shapes = tensor_shapes(spec)
        self._files = SafetensorsFiles(directory, spec.name)
        if self._how.stored == Stored.NF4:  # which is read by rows, and takes much memory on its way
            self.chunk_bytes = 2**24

    def keeps(self, name: str) -> bool:
        """Whether the weights `name` are stored in codes."""
        stored = self._files.find(name)
        is_float = stored is not None and stored.dtype in FLOATS
        return name.endswith("_proj.weight") and not is_float

    def scales_dtype(self, name: str) -> torch.dtype:
        """That holds scales, and zero points times scales, as they are."""
        part = _PARTS[self._how.stored][-1]
        dtype = self._files.dtype(f"{name.removesuffix('weight')}{part}")
        return dtype if self._how.symmetric else torch.float32

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        n_rows = self._shapes[name][0]
        rows = range(n_rows) if rows is None else rows
        if not self.keeps(name):
            lines = self._files.read(name, rows)
            return lines if cols is None else lines[:, cols.start : cols.stop]
        cols = range(self._shapes[name][1]) if cols is None else cols
        if self._how.stored == Stored.NF4:
            lines = bitsandbytes.widened(self._files, self.spec, name, rows, self._shapes[name][1])
            return lines[:, cols.start : cols.stop]
        if self._how.stored == Stored.BLOCKS:
            return self._blocks(name, rows, cols)
        if self._how.stored == Stored.GPTQ and self._files.find(f"{name.removesuffix('weight')}g_idx"):
            return self._in_own_order(name, rows, cols)
        return self.codes(name, rows, cols).dequantized()

    def codes(self, name: str, rows: range, cols: range, group: int | None = None) -> StoredCodes:
        """Of some rows and columns, with a scale every `group` columns: a divisor of the group that is stored, which
        the columns begin and end with; by default the largest."""
        how, columns = self._how, self._shapes[name][1]
        self._check_in_order(name)
        codes_NK = self._codes(name, rows)[:, cols.start : cols.stop]
        scales, points = self._scales(name, rows)
        own = how.group or columns
        step = group or math.gcd(own, cols.start, len(cols))
        at = torch.arange(cols.start, cols.stop, step) // own
        return StoredCodes(
            codes_NK.contiguous(), scales[:, at], None if points is None else points[:, at].contiguous()
        )

    def verify(self) -> None:
        """Raises BadModel unless every tensor is there, in its shape. Reads headers only."""
        for name, shape in self._shapes.items():
            if self.keeps(name) and self._how.stored == Stored.NF4:
                bitsandbytes.expected(self._files, self.spec, name, shape)
            elif self.keeps(name):
                for part, expected in self._expected(shape).items():
                    full = f"{name.removesuffix('weight')}{part}"
                    check_shape(self.spec, full, self._files.shape(full), expected)
                self._verify_scales(name.removesuffix("weight"), *shape)
            else:
                check_shape(self.spec, name, self._files.shape(name), shape)
                self._files.check_float(name)

    def _verify_scales(self, stem: str, n: int, k: int) -> None:
        """What has several shapes that are right, or may be left away."""
        scales, order = f"{stem}{_PARTS[self._how.stored][-1]}", f"{stem}g_idx"
        self._files.check_float(scales)
        if self._how.stored == Stored.CHANNELS:
            found = self._files.shape(scales)
            if math.prod(found) != 1 and found != (n,):
                check_shape(self.spec, scales, found, (n, 1))
        points = f"{stem}weight_zero_point"
        is_symmetric = self._how.stored == Stored.PACKED and self._how.symmetric
        if (
            is_symmetric
            and self._files.find(points)
            and self._files.shape(points) == self._packed_points(n, k)
        ):
            raise BadModel(
                f"{self.spec.name} has {points}, which symmetric weights, as its config has them, have not; "
                "take both from one release"
            )
        if self._how.stored == Stored.GPTQ and self._files.find(order):
            check_shape(self.spec, order, self._files.shape(order), (k,))

    def _expected(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        n, k = shape
        how, per = self._how, 32 // self._how.bits
        groups = -(-k // how.group) if how.group else 1
        match how.stored:
            case Stored.PACKED:
                found: dict[str, tuple[int, ...]] = {
                    "weight_packed": (n, -(-k // per)),
                    "weight_scale": (n, groups),
                }
                return found if how.symmetric else {**found, "weight_zero_point": self._packed_points(n, k)}
            case Stored.CHANNELS:
                return {"weight": (n, k)}
            case Stored.BLOCKS:
                rows, cols = how.block
                return {"weight": (n, k), "weight_scale_inv": (-(-n // rows), -(-k // cols))}
            case Stored.GPTQ:
                return {"qweight": (k // per, n), "qzeros": (groups, n // per), "scales": (groups, n)}
            case Stored.AWQ:
                return {"qweight": (k, n // per), "qzeros": (groups, n // per), "scales": (groups, n)}
            case Stored.NF4 | Stored.GGUF:
                raise AssertionError(f"{how.stored} has a reader of its own")

    def _packed_points(self, n: int, k: int) -> tuple[int, int]:
        """The shape of compressed-tensors' zero points."""
        return -(-n * self._how.bits // 32), -(-k // self._how.group) if self._how.group else 1

    def _part(self, name: str, part: str, rows: range | None = None) -> Tensor:
        return self._files.read(f"{name.removesuffix('weight')}{part}", rows).clone()

    def _codes(self, name: str, rows: range) -> Tensor:
        """[rows, K]"""
        bits = self._how.bits
        match self._how.stored:
            case Stored.PACKED:
                packed = self._part(name, "weight_packed", rows)
                return unpacked(packed, bits)[:, : self._shapes[name][1]]
            case Stored.GPTQ:
                packed = self._part(name, "qweight")[:, rows.start : rows.stop]
                return unpacked(packed.T.contiguous(), bits)
            case Stored.AWQ:
                return self._of_channels(self._part(name, "qweight"), rows).T
            case _:
                return self._part(name, "weight", rows)

    def _scales(self, name: str, rows: range) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points, [rows, G]."""
        how = self._how
        if how.stored == Stored.CHANNELS:
            scales = self._part(name, "weight_scale")
            scales = scales.reshape(-1, 1)
            every = scales.expand(self._shapes[name][0], 1) if len(scales) == 1 else scales
            return every[rows.start : rows.stop], None
        if how.stored == Stored.PACKED:
            scales = self._part(name, "weight_scale", rows)
            if how.symmetric:
                points = torch.full(scales.shape, 1 << (how.bits - 1), dtype=torch.uint8)
                return scales, points
            packed = self._part(name, "weight_zero_point")
            every = unpacked(packed.T.contiguous(), how.bits).T
            return scales, every[rows.start : rows.stop].contiguous()
        scales = self._part(name, "scales")[:, rows.start : rows.stop].T.contiguous()
        packed = self._part(name, "qzeros")
        if how.stored == Stored.AWQ:
            return scales, self._of_channels(packed, rows).T.contiguous()
        points = unpacked(packed, how.bits)[:, rows.start : rows.stop].T
        # As far as it goes: the kernels that this format was made for wrap.
        points = (points.to(torch.int16) + how.zero_offset) & ((1 << how.bits) - 1)
        return scales, points.to(torch.uint8)

    def _of_channels(self, packed: Tensor, rows: range) -> Tensor:
        """AWQ's int32s of eight channels → uint8 [.., rows]."""
        codes = unpacked(packed.contiguous(), self._how.bits).view(len(packed), -1, 8)
        return codes[:, :, list(_AWQ_ORDER)].reshape(len(packed), -1)[:, rows.start : rows.stop]

    def _blocks(self, name: str, rows: range, cols: range) -> Tensor:
        height, width = self._how.block
        scales = self._part(name, "weight_scale_inv").float()
        row_at = torch.arange(rows.start, rows.stop) // height
        col_at = torch.arange(cols.start, cols.stop) // width
        wide = scales[row_at][:, col_at]
        codes = self._part(name, "weight", rows)[:, cols.start : cols.stop]
        return codes.float() * wide

    def _check_in_order(self, name: str) -> None:
        """Raises BadModel where GPTQ's columns are not in the order of their groups, as codes are kept."""
        if self._how.stored != Stored.GPTQ or not self._files.find(f"{name.removesuffix('weight')}g_idx"):
            return
        columns = self._shapes[name][1]
        if not torch.equal(
            self._part(name, "g_idx").long(), torch.arange(columns) // (self._how.group or columns)
        ):
            raise BadModel(
                f"{self.spec.name}: {name.removesuffix('weight')}g_idx has an order of its own, but desc_act is false "
                "by its config; take both from one release"
            )

    def _in_own_order(self, name: str, rows: range, cols: range) -> Tensor:
        group_of_K = self._part(name, "g_idx").long()
        scales, points = self._scales(name, rows)
        codes = self._codes(name, rows)[:, cols.start : cols.stop].float()
        at = group_of_K[cols.start : cols.stop]
        if int(at.max()) >= scales.shape[1] or int(at.min()) < -scales.shape[1]:
            raise BadModel(
                f"{self.spec.name}: {name.removesuffix('weight')}g_idx names group {int(at.max())}, but there are "
                f"{scales.shape[1]}, of {self._how.group} columns by its config; take both from one release"
            )
        assert points is not None
        return (codes - points.float()[:, at]) * scales.float()[:, at]


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """int32 [R, C] → uint8 [R, C × 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(1)


def packed(codes: Tensor, bits: int) -> Tensor:
    """The other way; columns are filled up with zeros."""
    per = 32 // bits
    rows, columns = codes.shape
    wide = torch.zeros((rows, -(-columns // per) * per), dtype=torch.int64)
    wide[:, :columns] = codes.long()
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    words = (wide.view(rows, -1, per) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
