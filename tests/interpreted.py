"""For tests whose kernels Triton interprets on the CPU: `from tests.interpreted import *` brings what that needs.

The names are fixtures that use themselves, and the mark that leaves the module out where kernels are compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

__all__ = [
    "float8_as_torch_rounds_it",
    "functions_patched_once_a_launch",
    "loop_bounds_of_one_element",
    "multiply_adds_of_one_rounding",
    "overflow_seen_by_numpy",
    "pytestmark",
]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled for the GPU here: tests/gpu runs them"
)


@pytest.fixture(autouse=True)
def loop_bounds_of_one_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 interprets a scalar as an array of one element, whose int() numpy has refused since 2.4."""
    patch_lang_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture(autouse=True)
def float8_as_torch_rounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter drops the carry of a mantissa that is rounded up: of -1.95 it makes -1."""
    convert = interpreter._convert_float

    def converted(data: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        if tl.float8e4nv not in (given, wanted) or data.dtype == np.uint16:  # which numpy calls bfloat16
            return convert(data, given, wanted, rounding)
        if given == tl.float8e4nv:
            wide = torch.from_numpy(data.copy()).view(torch.float8_e4m3fn).float().numpy()
            return wide if wanted == tl.float32 else convert(wide, tl.float32, wanted, rounding)
        return torch.from_numpy(data.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", converted)


@pytest.fixture(autouse=True)
def multiply_adds_of_one_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's. Triton's interpreter rounds the product too; that of two float32 is exact in float64."""

    def fused(self: object, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)


@pytest.fixture(autouse=True)
def functions_patched_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter looks through its language at each call of a kernel's functions: a quarter of the time."""
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch_lang(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


@pytest.fixture(autouse=True)
def overflow_seen_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check of each sum and product of integers, without eight interpreted operations: another quarter."""
    wide = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: TritonSemantic, lhs: Any, rhs: Any, operation: Any) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        found = wide[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        fits = kind.get_int_min_value() <= found.min() and found.max() <= kind.get_int_max_value()
        assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"

    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", check)
