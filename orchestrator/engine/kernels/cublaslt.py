"""cuBLASLt by ctypes: the algorithms that its heuristic proposes for y = x Wᵀ, of which cuBLAS itself takes the first.

Descriptors are arrays of words that the library's functions fill; cublasLt.h of CUDA 13.1 has their sizes. A call
that fails raises RuntimeError with its name and status (cublasStatus_t).

Dimensions: M rows of x, N rows and K columns of the weight.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

WORKSPACE_BYTES = 32 * 2**20  # as much as torch gives cuBLAS on Hopper
_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # CUDA_R_16F, CUDA_R_16BF
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68  # CUDA_R_32F, CUBLAS_COMPUTE_32F
_TRANSPOSE_A, _TRANSPOSED = 3, 1  # CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T
_MOST_WORKSPACE, _REDUCTIONS = 1, 3  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, _REDUCTION_SCHEME_MASK
_IN_FLOAT32 = (
    1 | 2
)  # CUBLASLT_REDUCTION_SCHEME_INPLACE, _COMPUTE_TYPE: parts of K are not rounded before they are added


class _Words8(ctypes.Structure):
    """cublasLtMatrixLayoutOpaque_t, cublasLtMatmulPreferenceOpaque_t, cublasLtMatmulAlgo_t."""

    _fields_ = [("data", c_uint64 * 8)]


class _Words32(ctypes.Structure):
    """cublasLtMatmulDescOpaque_t."""

    _fields_ = [("data", c_uint64 * 32)]


class _Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algorithm", _Words8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@cache
def _library() -> ctypes.CDLL:
    """The one that torch has loaded, wherever that came from."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "libcublasLt.so" in line:
                return ctypes.CDLL(line[line.index("/") :].strip())
    raise OSError("torch has loaded no libcublasLt")


def _call(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name}: status {status}")


def version() -> int:
    count: int = _library().cublasLtGetVersion()
    return count


class Library:
    """A handle, and memory that algorithms may work in, on the current device. Products run one after another."""

    def __init__(self, device: torch.device) -> None:
        self.handle = c_void_p()
        _call("cublasLtCreate", byref(self.handle))
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def algorithms(self, m: int, n: int, k: int, dtype: torch.dtype, most: int) -> list[Product]:
        """For m rows of x, the heuristic's best first. Each serves other numbers of rows as well."""
        preference = _Words8()
        size = c_size_t(ctypes.sizeof(preference))
        _call("cublasLtMatmulPreferenceInit_internal", byref(preference), size)
        for attribute, value in (
            (_MOST_WORKSPACE, c_uint64(WORKSPACE_BYTES)),
            (_REDUCTIONS, c_uint32(_IN_FLOAT32)),
        ):
            _call(
                "cublasLtMatmulPreferenceSetAttribute",
                *(byref(preference), attribute, byref(value), c_size_t(ctypes.sizeof(value))),
            )
        description, a, b, d = _described(m, n, k, dtype)
        results, count = (_Result * most)(), c_int()
        _call(
            "cublasLtMatmulAlgoGetHeuristic",
            *(self.handle, byref(description), byref(a), byref(b), byref(d), byref(d)),
            *(byref(preference), most, results, byref(count)),
        )
        found = [result for result in results[: count.value] if result.state == 0]
        return [Product(self, result.algorithm) for result in found]


class Product:
    """One algorithm."""

    def __init__(self, library: Library, algorithm: _Words8) -> None:
        self._library, self._algorithm = library, algorithm
        self._one, self._zero = c_float(1.0), c_float(0.0)

    def __call__(self, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        """→ [M, N]. Contiguous tensors. By cuBLAS's own choice where the algorithm cannot."""
        (m, k), n = x_MK.shape, weight_NK.shape[0]
        out_MN = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
        description, a, b, d = _described(m, n, k, x_MK.dtype)
        out, workspace = c_void_p(out_MN.data_ptr()), self._library.workspace
        status = _library().cublasLtMatmul(
            *(self._library.handle, byref(description), byref(self._one)),
            *(c_void_p(weight_NK.data_ptr()), byref(a), c_void_p(x_MK.data_ptr()), byref(b)),
            *(byref(self._zero), out, byref(d), out, byref(d), byref(self._algorithm)),
            *(c_void_p(workspace.data_ptr()), c_size_t(workspace.nbytes)),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if status:
            return F.linear(x_MK, weight_NK)
        return out_MN


@lru_cache(4096)  # prefills have any number of rows
def _described(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[_Words32, _Words8, _Words8, _Words8]:
    """In cuBLAS's words, column by column: D[N, M] = Aᵀ B, where A is the weight and B is x."""
    description, transposed = _Words32(), c_int32(_TRANSPOSED)
    size = c_size_t(ctypes.sizeof(description))
    _call("cublasLtMatmulDescInit_internal", byref(description), size, _COMPUTE_FLOAT32, _FLOAT32)
    _call(
        "cublasLtMatmulDescSetAttribute",
        *(byref(description), _TRANSPOSE_A, byref(transposed), c_size_t(ctypes.sizeof(transposed))),
    )
    return description, _layout(k, n, dtype), _layout(k, m, dtype), _layout(n, m, dtype)


def _layout(rows: int, columns: int, dtype: torch.dtype) -> _Words8:
    layout = _Words8()
    size = c_size_t(ctypes.sizeof(layout))
    sizes = c_uint64(rows), c_uint64(columns), c_int64(rows)
    _call("cublasLtMatrixLayoutInit_internal", byref(layout), size, _TYPES[dtype], *sizes)
    return layout
