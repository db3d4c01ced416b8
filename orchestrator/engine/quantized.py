"""Weights in fewer bits: how they are made from what a checkpoint has, and what multiplies by them.

int8 and fp8 (and int8w8a8, whose rows of x are in int8 as well): codes × a scale of each output channel, symmetric.
int4: (code − 8) × scale + zero in groups of columns, asymmetric: a group's own range takes all sixteen codes, where a
symmetric one leaves some unused (of normal numbers in groups of 128 the error is a tenth less). Scales and zeros are
rounded to the model's dtype first, and codes are chosen for what they then come to.

gguf: code × scale + least in groups of 32 or 16, as a GGUF file has them, of 4 bits kept like int4's, or of 8. A GPU's
kernels of 4 bits read zero, least + 8 scale, in place of least: there `finish` makes it so.

A byte of int4 has two codes, a word of eight: of a group's columns, word w of W has w (its lowest four bits), W + w,
2 W + w, …, so that a kernel reads eight runs of x for a run of words, and ranks may have whole groups.

Dimensions: M rows of x, N output channels, K columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.engine import cpu_products, ops
from orchestrator.engine.model import RMSNorm
from orchestrator.engine.small_rows import RoundsTo, Rows, never
from orchestrator.engine.stored import StoredCodes
from strategies.scheme import GGUF, W8A8, Scheme

INT8 = ("int8", W8A8)
INT8_MOST = 127.0
FP8_MOST = 448.0  # of e4m3
FLOAT8_ROWS = 16
"""Of x, up to which weights in float8 are widened: to round x as well costs a launch more."""

PLANES = 8  # codes of a word


class Quantized(nn.Module):
    """Stands in for a linear layer. A loader fills it by rows, whole ones of the checkpoint, and calls `finish`."""

    def __init__(
        self,
        shape: tuple[int, int],
        how: Scheme,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
        scales_dtype: torch.dtype | None = None,
        home: torch.device | None = None,
    ) -> None:
        """`scales_dtype`: of a checkpoint's own; by default `dtype`, and float32 where rows of x are scaled too.

        It works on `device`; its weights are kept there, or at `home`.
        """
        super().__init__()
        n, k = shape
        self.out_features, self.in_features, self.how = n, k, how
        self._computes_in, self.device = dtype, device

        def made(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=home or device), requires_grad=False)

        if how.group:
            self.codes = made(n, k // 2, dtype=torch.uint8) if how.bits == 4 else made(n, k, dtype=torch.int8)
            of_gguf = torch.float16 if how.half else torch.float32
            kept = of_gguf if how.format == GGUF else scales_dtype or dtype
            self.scales = made(n, k // how.group, how.numbers, dtype=kept)  # and zeros
        else:
            kept = torch.int8 if how.format in INT8 else torch.float8_e4m3fn
            self.codes = made(n, k, dtype=kept)
            wide = how.format in ("fp8", W8A8)
            self.scales = made(n, dtype=torch.float32 if wide else scales_dtype or dtype)
        self.bias = made(n, dtype=dtype) if bias else None
        self.packed = False  # for torch's kernel of int4 on CPUs

    @property
    def row_bytes(self) -> int:
        """Of one output channel, as kept."""
        return int((self.codes.nbytes + self.scales.nbytes) // self.out_features)

    def fill(self, start: int, rows_NK: Tensor, cols: range | None) -> None:
        """Channels from `start` on, whole rows of the checkpoint, of which this rank has the columns `cols`."""
        rows = slice(start, start + len(rows_NK))
        wide_NK = rows_NK.to(self.device, torch.float32)
        if self.how.group:
            own_NK = wide_NK if cols is None else wide_NK[:, cols.start : cols.stop]
            codes_NK, scales_NG2 = quantize_groups(own_NK, self.how.group, self.scales.dtype)
            self.codes.data[rows] = pack(codes_NK, self.how.group)
            self.scales.data[rows] = scales_NG2
            return
        scales_N = channel_scales(wide_NK, self.how.format, self.scales.dtype)
        own_NK = wide_NK if cols is None else wide_NK[:, cols.start : cols.stop]
        self.codes.data[rows] = quantize_channels(own_NK, scales_N, self.how.format)
        self.scales.data[rows] = scales_N

    def put(self, start: int, stored: StoredCodes) -> None:
        """Channels from `start` on, as a checkpoint has them, this rank's columns."""
        device, rows = self.device, slice(start, start + len(stored.codes_NK))
        codes_NK, scales_NG = stored.codes_NK.to(device), stored.scales_NG.to(device)
        if not self.how.group:
            self.codes.data[rows] = codes_NK
            self.scales.data[rows] = scales_NG.squeeze(1).to(self.scales.dtype)
            return
        if self.how.format == GGUF:
            least_NG = None if stored.least_NG is None else stored.least_NG.to(device)
            codes_NK, scales_NG2 = as_gguf(codes_NK, scales_NG, least_NG, self.how)
            self.codes.data[rows] = pack(codes_NK, self.how.group) if self.how.bits == 4 else codes_NK
            self.scales.data[rows] = scales_NG2.to(self.scales.dtype)
            return
        assert stored.zero_points_NG is not None, "codes in groups have zero points"
        self.codes.data[rows] = pack(codes_NK, self.how.group)
        from_eight_NG = 8 - stored.zero_points_NG.to(device, torch.float32)
        zeros_NG = (from_eight_NG * scales_NG.float()).to(self.scales.dtype)
        self.scales.data[rows] = torch.stack((scales_NG.to(self.scales.dtype), zeros_NG), 2)

    def finish(self) -> None:
        """All rows are there: bring them into the form that the fastest product wants."""
        codes, scales = self.codes.data, self.scales.data
        if self.how.format == GGUF:
            if self.device.type == "cuda" and self.how.bits == 4:
                scales[:, :, 1] += 8 * scales[:, :, 0]
            return
        fits = scales.dtype == self._computes_in and cpu_products.has_int4(self.out_features, scales.dtype)
        if self.how.group and self.device.type != "cuda" and fits:
            cpu_products.pack_int4(codes, lambda some: unpack(some, self.how.group))
            turned = scales.transpose(0, 1).clone(memory_format=torch.contiguous_format)
            self.scales.data = scales.view(turned.shape).copy_(turned)  # where they are: it may be a file
            self.packed = True

    def _has_int8_product(self, x_MK: Tensor) -> bool:
        is_int8 = self.how.format == "int8" and self.scales.dtype == x_MK.dtype
        return is_int8 and cpu_products.has_int8(len(x_MK), x_MK.dtype)

    def dequantized(self, rows: slice) -> Tensor:
        """[rows, K] in the scales' dtype; not once `packed`."""
        return dequantize(self.codes[rows], self.scales[rows], self.how)

    def rounds_to(self, x_MK: Rows) -> torch.dtype | None:
        """What rows may come in that are so many."""
        return ops.rounds_to(x_MK, self.codes, self.how) if ops.has_kernels(x_MK) else None

    def forward(self, x_MK: Rows) -> Tensor:
        if ops.has_kernels(x_MK):
            return ops.quantized_linear(x_MK, self.codes, self.scales, self.bias, self.how)
        assert isinstance(x_MK, Tensor), "rows in 8 bits come from kernels"
        if self.packed:
            product_MN = cpu_products.int4(x_MK, self.codes, self.scales, self.how.group)
        elif self.how.format == W8A8:
            product_MN = by_int8(x_MK, self.codes, self.scales)
        elif self.how.format == "fp8" and multiplies_float8(x_MK, self.codes):
            product_MN = by_float8(x_MK, self.codes, self.scales)
        elif self._has_int8_product(x_MK):
            product_MN = cpu_products.int8(x_MK, self.codes, self.scales)
        elif self.how.group:
            product_MN = in_blocks(x_MK, self.out_features, self.dequantized)
        else:  # scaled once they are summed: one pass over the weights less
            wide_MN = in_blocks(x_MK, self.out_features, lambda rows: self.codes[rows])
            product_MN = (wide_MN * self.scales).to(x_MK.dtype)
        return product_MN if self.bias is None else product_MN + self.bias


class QuantizedGateUp(Quantized):
    """With silu(gate) · up behind the product, as the layer that it stands in for."""

    next_rounds_to: RoundsTo = staticmethod(never)

    def forward(self, x_MK: Rows) -> Rows:  # type: ignore[override]  # nobody calls it by the other's name
        if ops.has_kernels(x_MK):
            small = self.next_rounds_to(x_MK)
            return ops.quantized_gate_up(x_MK, self.codes, self.scales, self.bias, self.how, small)
        gate_MN, up_MN = super().forward(x_MK).chunk(2, dim=-1)
        return F.silu(gate_MN) * up_MN


def round_on_the_way(layers: Iterable[nn.Module]) -> None:
    """What a norm or an activation writes for one product, which rounds its rows, is rounded as it is written."""
    for layer in layers:
        parts: Any = layer
        attention, mlp = parts.attention, parts.mlp
        pairs = ((parts.input_norm, attention.qkv), (parts.post_norm, mlp.gate_up), (mlp.gate_up, mlp.down))
        for writer, reader in pairs:
            if isinstance(writer, RMSNorm | QuantizedGateUp) and isinstance(reader, Quantized):
                writer.next_rounds_to = reader.rounds_to


BLOCK_WEIGHTS = 2**18  # widened at once: 1 MiB in float32, which stays in cache until it is multiplied


def in_blocks(x_MK: Tensor, n: int, weights: Callable[[slice], Tensor]) -> Tensor:
    """x @ weight.T, some channels of the weight at a time, widened to x's dtype."""
    step = max(1, BLOCK_WEIGHTS // x_MK.shape[-1])
    parts = [F.linear(x_MK, weights(slice(at, at + step)).to(x_MK.dtype)) for at in range(0, n, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


# --- the arithmetic -----------------------------------------------------------------------------------------


def channel_scales(wide_NK: Tensor, kept: str, dtype: torch.dtype) -> Tensor:
    """[N]: what the largest of a row becomes is the largest code."""
    most = INT8_MOST if kept in INT8 else FP8_MOST
    scales_N = (wide_NK.abs().amax(dim=1) / most).to(dtype)
    return torch.where(scales_N == 0, torch.ones_like(scales_N), scales_N)  # a row of zeros


def quantize_channels(wide_NK: Tensor, scales_N: Tensor, kept: str) -> Tensor:
    ratios_NK = wide_NK / scales_N.float().unsqueeze(1)
    if kept in INT8:
        return ratios_NK.round_().clamp_(-INT8_MOST, INT8_MOST).to(torch.int8)
    return ratios_NK.clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)


def multiplies_float8(x_MK: Rows, codes: Tensor) -> bool:
    """Whether x's rows are made float8 too, on devices that can: cuBLAS and CUTLASS want sixteens, and give bfloat16
    where rows have scales of their own."""
    fits = x_MK.dtype == torch.bfloat16 and codes.shape[1] % 16 == 0 and len(codes) % 16 == 0
    return fits and len(x_MK) > FLOAT8_ROWS


def by_float8(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor) -> Tensor:
    """x @ weight.T as GPUs have it that multiply float8: each row of x in it by its largest, sums in float32."""
    small_MK, scales_M1 = rows_in_float8(x_MK)
    sums_MN = in_blocks(small_MK.float(), len(codes_NK), lambda rows: codes_NK[rows])
    return (sums_MN * (scales_M1 * scales_N)).to(x_MK.dtype)


def rows_in_float8(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    wide_MK = x_MK.float()
    scales_M1 = (wide_MK.abs().amax(dim=1, keepdim=True) / FP8_MOST).clamp_(min=1e-12)
    return (wide_MK / scales_M1).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn), scales_M1


def by_int8(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor) -> Tensor:
    """x @ weight.T, each row of x in int8 by its largest; summed exactly."""
    wide_MK = x_MK.float()
    scales_M1 = (wide_MK.abs().amax(dim=1, keepdim=True) / INT8_MOST).clamp_(min=1e-12)
    small_MK = (wide_MK / scales_M1).round_().clamp_(-INT8_MOST, INT8_MOST).to(torch.int8)
    sums_MN = torch._int_mm(small_MK, codes_NK.t())
    return (sums_MN.float() * (scales_M1 * scales_N)).to(x_MK.dtype)


def quantize_groups(wide_NK: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """→ codes 0 to 15, uint8 [N, K], and scales with zeros, [N, G, 2]: a group's least and largest are 0 and 15."""
    n, k = wide_NK.shape
    groups = wide_NK.reshape(n, k // group, group)
    least, most = groups.amin(dim=2), groups.amax(dim=2)
    scales = ((most - least) / 15).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = (least + 8 * scales.float()).to(dtype)
    codes = (groups - zeros.float().unsqueeze(2)) / scales.float().unsqueeze(2)
    return codes.round_().add_(8).clamp_(0, 15).to(torch.uint8).view(n, k), torch.stack((scales, zeros), 2)


def pack(codes_NK: Tensor, group: int) -> Tensor:
    """Eight codes a word, a group's words one after another: uint8 [N, K / 2]."""
    n, k = codes_NK.shape
    planes = codes_NK.view(n, k // group, PLANES, group // PLANES)
    bytes_ = planes[:, :, 0::2] | (planes[:, :, 1::2] << 4)  # [N, G, 4, words]
    return bytes_.transpose(2, 3).reshape(n, k // 2)


def unpack(packed: Tensor, group: int) -> Tensor:
    """uint8 [N, K]."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    bytes_ = packed.view(n, k // group, group // PLANES, PLANES // 2).transpose(2, 3)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=3).view(n, k)


def as_gguf(
    codes_NK: Tensor, scales_NG: Tensor, least_NG: Tensor | None, how: Scheme
) -> tuple[Tensor, Tensor]:
    """As `how` keeps them: codes, and scales with their least values, float32 [N, G, 1 or 2]."""
    if how.numbers == 1:
        return codes_NK, scales_NG.unsqueeze(2)
    if how.bits == 8:
        least_NG = torch.zeros_like(scales_NG) if least_NG is None else least_NG
    elif least_NG is None:  # codes from -8 on
        codes_NK, least_NG = codes_NK + 8, -8 * scales_NG
    return codes_NK.view(torch.uint8) if how.bits == 4 else codes_NK, torch.stack((scales_NG, least_NG), 2)


def dequantize_gguf(codes: Tensor, scales: Tensor, how: Scheme) -> Tensor:
    """[N, K] in float32, before `finish`."""
    wide = (unpack(codes, how.group) if how.bits == 4 else codes).view(len(codes), -1, how.group).float()
    wide *= scales[:, :, :1].float()
    if how.numbers == 2:
        wide += scales[:, :, 1:].float()
    return wide.view(len(codes), -1)


def dequantize(codes: Tensor, scales: Tensor, how: Scheme) -> Tensor:
    """[N, K] in the scales' dtype, computed in float32 and rounded once."""
    if how.format == GGUF:
        return dequantize_gguf(codes, scales, how)
    if not how.group:
        return (codes.float() * scales.float().unsqueeze(1)).to(scales.dtype)
    wide = unpack(codes, how.group).view(len(codes), -1, how.group).float() - 8
    scale, zero = scales.float().unsqueeze(3).unbind(2)
    return (wide * scale + zero).to(scales.dtype).view(len(codes), -1)
