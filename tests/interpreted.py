"""For tests whose kernels Triton interprets on the CPU: `from tests.interpreted import *` brings what that needs.

The names are fixtures that use themselves, and the mark that leaves the module out where kernels are compiled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

__all__ = ["loop_bounds_of_one_element", "multiply_adds_of_one_rounding", "pytestmark"]

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
def multiply_adds_of_one_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's. Triton's interpreter rounds the product too; that of two float32 is exact in float64."""

    def fused(self: object, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
