"""What ops.py calls, in one place: importing it imports Triton."""

from orchestrator.engine.kernels.activation import silu_mul, silu_mul_small
from orchestrator.engine.kernels.argmax import argmax
from orchestrator.engine.kernels.float8_products import float8_by_float8, takes_float8
from orchestrator.engine.kernels.gemv import MAX_ROWS, gate_up, gemv
from orchestrator.engine.kernels.int8_products import int8_by_int8, takes_int8
from orchestrator.engine.kernels.norm import add_rms_norm
from orchestrator.engine.kernels.overlap import supported
from orchestrator.engine.kernels.quantized import quantized, quantized_gate_up, rows_by_kernel
from orchestrator.engine.kernels.quantized_groups import groups_of_8

__all__ = [
    "MAX_ROWS",
    "add_rms_norm",
    "argmax",
    "float8_by_float8",
    "gate_up",
    "gemv",
    "groups_of_8",
    "int8_by_int8",
    "quantized",
    "quantized_gate_up",
    "rows_by_kernel",
    "silu_mul",
    "silu_mul_small",
    "supported",
    "takes_float8",
    "takes_int8",
]
