"""Where there is no GPU, Triton interprets its kernels; it looks when a kernel is defined, so before any comes in."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("no deadline", deadline=None)  # an example is slow where the machine is busy
settings.load_profile("no deadline")
