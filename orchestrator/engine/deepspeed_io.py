"""DeepSpeed's asynchronous I/O as the reader of layers on a disk: libaio's queue in place of our threads.

It reads directly, whole layers at a time, and comes as a source that is compiled at its first use.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.engine.disk import STAGED, LayerFile
from orchestrator.engine.host_memory import paged

NAME = "DeepSpeed's asynchronous I/O"
_BLOCK_BYTES, _DEPTH = 2**20, 128  # its own defaults: larger blocks were no faster
_PARTS = ("async_io", "pin_memory")  # of what is compiled


@cache
def opened() -> tuple[Any, str]:
    """The extension, compiled if it never was, which takes minutes; or None, and why."""
    try:
        builder = import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
        is_there = import_module("deepspeed.git_version_info").installed_ops.get(_PARTS[0], False)
    except ImportError as error:
        return None, f"DeepSpeed cannot be imported ({error})"
    with contextlib.redirect_stdout(io.StringIO()):
        if not is_there and not builder.is_compatible(verbose=False):
            return None, "libaio's headers are missing; apt install libaio-dev"
        try:
            with _alone():
                return builder.load(verbose=False), ""
        except (RuntimeError, OSError, ImportError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            return None, f"it does not compile: {reason[0][:200]}"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process of this host at a time. torch's own lock outlives a process that is killed, and the next waits."""
    extensions: Any = import_module("torch.utils.cpp_extension")
    folders = [Path(extensions._get_build_directory(part, verbose=False)) for part in _PARTS]
    with open(folders[0].parent / "shardwise.lock", "w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        for folder in folders:
            (folder / "lock").unlink(missing_ok=True)
        yield


class AsyncReads:
    """Satisfies disk.Reads."""

    told = NAME

    def __init__(self, extension: Any, file: LayerFile, *, on_gpu: bool) -> None:
        self._extension, self._file, self._on_gpu = extension, file, on_gpu
        self._own = threading.local()  # a handle waits for all that it was asked
        self._locked = self._handle()  # which keeps what it gave
        self._waiting = ThreadPoolExecutor(STAGED, "offload")

    def memory(self, n_bytes: int) -> Tensor:
        """What it takes for locked: into other memory it would copy what it read."""
        if self._on_gpu:
            return paged(n_bytes)
        given: Tensor = self._locked.new_cpu_locked_tensor(n_bytes, torch.empty(0, dtype=torch.uint8))
        return given

    def begin(self, to: Tensor, layer: int, copied: torch.cuda.Event | None) -> list[Future[None]]:
        return [self._waiting.submit(self._read, to, layer, copied)]

    def _read(self, to: Tensor, layer: int, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        if not hasattr(self._own, "handle"):
            self._own.handle = self._handle()
        if self._own.handle.sync_pread(to, self._file.path, self._file.start(layer)) != 1:
            raise OSError(f"{NAME} did not read {len(to)} bytes of layer {layer}")

    def _handle(self) -> Any:
        return self._extension.aio_handle(_BLOCK_BYTES, _DEPTH, False, True, 1)
