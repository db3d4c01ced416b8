"""Binaries of CUDA C++, compiled by NVRTC on this machine and kept where Triton keeps its kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from triton.runtime.cache import get_cache_manager

from cluster.collectives import cuda

_FILE = "kernel.cubin"
_DIGEST_BYTES = 32  # of SHA-256


def binaries(texts: Sequence[str], architecture: str) -> list[bytes]:
    """Compiled here, several at once, or by an earlier start with the same CUDA. Needs NVRTC but no GPU."""
    keys = [
        hashlib.sha256(f"{torch.version.cuda} {architecture} {text}".encode()).hexdigest() for text in texts
    ]
    kept = [get_cache_manager(key) for key in keys]
    found = {i: binary for i, one in enumerate(kept) if (binary := _whole(one.get_file(_FILE))) is not None}
    missing = [i for i in range(len(texts)) if i not in found]
    made = cuda.compile_sources([texts[i] for i in missing], architecture) if missing else []
    for i, binary in zip(missing, made, strict=True):
        kept[i].put(hashlib.sha256(binary).digest() + binary, _FILE)
        found[i] = binary
    return [found[i] for i in range(len(texts))]


def _whole(path: str | None) -> bytes | None:
    """A binary as it was kept, behind its digest; None where there is none, or another's bytes are in it."""
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError:
        return None
    digest, binary = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return binary if hashlib.sha256(binary).digest() == digest else None
