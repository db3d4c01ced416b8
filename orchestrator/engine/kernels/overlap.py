"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

A kernel here that is launched with `pdl=True` announces at its start that its successor may come, then loads what no
kernel ever writes (weights), and only then waits for its predecessor. So memory stays busy over the seams of a
decode step. Three rules make that safe; a kernel keeps them in every program, with no branch around:

1. `gdc_wait` comes before the first read of anything that a kernel may have written (activations, positions, the
   KV cache), and before the first write of any kind: what is overwritten may still be read by the predecessor.
2. It comes in every program. So a grid is complete only after its predecessor is complete and its writes visible,
   and by induction after all before that: to wait for one is to wait for all.
3. Before the wait only parameters are read. Whoever changes those does it by ordinary launches or copies, which
   never announce a successor, and so end before any kernel here starts.

A launch without `pdl` waits for its predecessor's end as ever, so both kinds may be mixed. A successor is let in only
once all programs of its predecessor run, so one that waits never takes a place that its predecessor still needs.
Semantics: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def supported(device: torch.device) -> bool:
    """Whether kernels may be launched with `pdl=True` there: compute capability 9.0, Hopper, brought it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
