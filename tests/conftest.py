"""Where there is no GPU, Triton interprets its kernels; it looks when a kernel is defined, so before any comes in."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(
    1
)  # beside a gang's processes on two cores, two threads wait for each other: ten times as long

settings.register_profile("no deadline", deadline=None)  # an example is slow where the machine is busy
settings.load_profile("no deadline")
