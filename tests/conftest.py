"""Where there is no GPU, Triton interprets its kernels; it looks when a kernel is defined, so before any comes in."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
