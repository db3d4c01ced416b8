"""Prefill by FlashInfer, where it is installed and its kernels are compiled. Nothing else imports it.

Its kernels are compiled on the machine that wants them, which takes minutes, or come in the wheel flashinfer-jit-cache.
A start compiles none: what is not there is not used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.engine.paged_attention import pinned
from orchestrator.engine.slots import Slots
from orchestrator.step import Row
from strategies.spec import ModelSpec

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128, 256)  # of its kernels for Hopper and for all GPUs, 0.6.14
WORKSPACE_BYTES = {"fa2": 128 * 2**20, "fa3": 2**20}
"""fa2 cuts long rows' keys into parts and sums them up here; FlashInfer's examples give it so much. fa3 cuts none."""

PLANS = 4  # two steps' worth, each in two parts


class Unusable(Exception):
    """Why FlashInfer cannot serve, in one line."""


@dataclass(frozen=True, slots=True)
class Pages:
    """What a plan wants to know of the rows: int32, in the rows' order."""

    offsets_R1: NDArray[np.int32]  # of each row's first token
    page_offsets_R1: NDArray[np.int32]  # of each row's first page, in pages_P
    pages_P: NDArray[np.int32]  # the blocks of each row's keys, up to its last token in this step
    last_lengths_R: NDArray[np.int32]  # keys in each row's last page
    lengths_R: NDArray[np.int32]  # keys of each row


def pages_of(rows: Sequence[Row], slots: Slots) -> Pages:
    size = slots.block_size
    ends = np.array([row.start + row.count for row in rows], dtype=np.int32)
    pages = -(-ends // size)
    tables = [slots.tables[row.slot, :count] for row, count in zip(rows, pages, strict=True)]
    return Pages(
        offsets_R1=_offsets(np.array([row.count for row in rows])),
        page_offsets_R1=_offsets(pages),
        pages_P=np.concatenate(tables).astype(np.int32),
        last_lengths_R=ends - (pages - 1) * size,
        lengths_R=ends,
    )


def _offsets(counts: NDArray[np.signedinteger[Any]]) -> NDArray[np.int32]:
    offsets = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=offsets[1:])
    return offsets


class FlashInferPrefill:
    """Attention of an eager step's prompts: planned once a step, run once a layer (satisfies PromptAttention)."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        """`spec` is of the transformer that this rank runs. Raises Unusable."""
        flashinfer = _installed()
        self.version: str = flashinfer.__version__
        windows = set(spec.windows or (None,))
        backend = _backend(flashinfer, dtype, device)
        for window in windows:
            _require_compiled(flashinfer, backend, dtype, spec.head_dim, windowed=window is not None)
        # Shared by all: one runs after the other.
        workspace = torch.empty(WORKSPACE_BYTES[backend], dtype=torch.uint8, device=device)
        self._plans = deque(
            _Plan(
                {
                    window: flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
                    for window in windows
                },
                spec,
                dtype,
                device,
            )
            for _ in range(PLANS)
        )

    def plan(self, rows: Sequence[Row], slots: Slots) -> _Plan:
        """Good until as many others are made as there are plans."""
        self._plans.rotate()
        self._plans[0].make(pages_of(rows, slots), slots.block_size)
        return self._plans[0]


class _Plan:
    """What each window's wrapper knows of one step's rows (satisfies PlannedAttention)."""

    def __init__(
        self, wrappers: Mapping[int | None, Any], spec: ModelSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._wrappers, self._spec, self._dtype, self._device = wrappers, spec, dtype, device
        self._left: torch.cuda.Event | None = None

    def make(self, pages: Pages, block_size: int) -> None:
        if self._left is not None:
            # A plan goes to the device from a pinned buffer of the wrapper's own, which the next is written to: the
            # last must have left. It has, unless the host is more than a step ahead.
            self._left.synchronize()
        spec = self._spec
        offsets_R1 = pinned(pages.offsets_R1, self._device)
        page_offsets_R1 = pinned(pages.page_offsets_R1, self._device)
        pages_P = pinned(pages.pages_P, self._device)
        last_lengths_R = pinned(pages.last_lengths_R, self._device)
        # Which it could work out, but in memory that is not pinned: to copy that, CUDA waits for all that the stream
        # has to do, and the host is no longer ahead.
        lengths_R = pinned(pages.lengths_R, self._device)
        for window, wrapper in self._wrappers.items():
            wrapper.plan(
                offsets_R1,
                page_offsets_R1,
                pages_P,
                last_lengths_R,
                num_qo_heads=spec.heads,
                num_kv_heads=spec.kv_heads,
                head_dim_qk=spec.head_dim,
                page_size=block_size,
                causal=True,
                sm_scale=spec.head_dim**-0.5,
                seq_lens=lengths_R,
                window_left=-1 if window is None else window - 1,  # the keys beside the query's own
                q_data_type=self._dtype,
                kv_data_type=self._dtype,
            )
        self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._left.record()

    def attend(
        self,
        q_THD: Tensor,
        keys: Tensor,
        values: Tensor,
        block_size: int,
        window: int | None,
        out_THD: Tensor,
    ) -> None:
        shape = (-1, block_size, *keys.shape[1:])
        # The kernel before it lets the next begin early; one launched plainly waits for all that it writes.
        self._wrappers[window].run(
            q_THD, (keys.view(shape), values.view(shape)), out=out_THD, enable_pdl=False
        )


def compile_kernels(
    dtype: torch.dtype, head_dim: int, device: torch.device, *, windowed: bool = False
) -> None:
    """Takes minutes, and nvcc. Raises Unusable where there is nothing to compile for."""
    flashinfer = _installed()
    backend = _backend(flashinfer, dtype, device)
    _kernels(flashinfer, backend, dtype, head_dim, windowed=windowed).build(verbose=False)


def _installed() -> Any:
    if find_spec("flashinfer") is None:
        raise Unusable("FlashInfer is not installed")
    try:
        return import_module("flashinfer")
    except Exception as error:  # another's package: a missing dependency, a driver that it does not know, …
        raise Unusable(f"FlashInfer does not import: {first_line(error)}") from error


def _backend(flashinfer: Any, dtype: torch.dtype, device: torch.device) -> str:
    """fa3 on Hopper, fa2 elsewhere: as FlashInfer itself would choose."""
    if dtype not in DTYPES:
        raise Unusable(f"FlashInfer has no prefill of {str(dtype).removeprefix('torch.')}")
    backend: str = flashinfer.utils.determine_attention_backend(device, 0, False, False, dtype, dtype)
    return backend


def _kernels(flashinfer: Any, backend: str, dtype: torch.dtype, head_dim: int, *, windowed: bool) -> Any:
    """FlashInfer's own description of the library that a wrapper will load."""
    if head_dim not in HEAD_DIMS:
        raise Unusable(f"FlashInfer has no prefill of heads of {head_dim}")
    return flashinfer.jit.gen_batch_prefill_module(
        backend, dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, windowed, False, False
    )


def _require_compiled(
    flashinfer: Any, backend: str, dtype: torch.dtype, head_dim: int, *, windowed: bool
) -> None:
    """`is_compiled` looks for the library in flashinfer-jit-cache and in FlashInfer's own cache folder."""
    if not _kernels(flashinfer, backend, dtype, head_dim, windowed=windowed).is_compiled:
        name = str(dtype).removeprefix("torch.")
        raise Unusable(
            "FlashInfer's kernels are not compiled: install flashinfer-jit-cache or run python -m "
            f"launch.compile_flashinfer {name} {head_dim}{' --windowed' * windowed}"
        )


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
