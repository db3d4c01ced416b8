"""DeepSpeed's AutoTP: splits transformers' model over the ranks of a stage, by the names of its layers.

Nothing is compiled: DeepSpeed's own collectives for CPUs would take minutes at their first use, and are left out.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import torch
from torch import nn

from cluster.errors import BadLayout


def split(model: nn.Module, name: str, tp: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The part of the model that this rank computes; torch's default group is the stage. Raises BadLayout."""
    deepspeed = ready(device, tp)
    from deepspeed.inference.engine import InferenceEngine

    InferenceEngine.inference_mp_group = torch.distributed.group.WORLD  # of this start, not of an earlier one
    try:
        engine = deepspeed.init_inference(
            model, tensor_parallel={"tp_size": tp}, dtype=dtype, replace_with_kernel_inject=False
        )
    except (ValueError, AssertionError, NotImplementedError, AttributeError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadLayout(
            f"DeepSpeed's AutoTP does not split {name}: {reason[0][:200]}; use tp1, or dp for more replicas"
        ) from error
    part: nn.Module = engine.module
    return part


def ready(device: torch.device, ranks: int) -> Any:
    """DeepSpeed, told where it is, which it would otherwise read from the environment of its own launcher."""
    from deepspeed import accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    class Cpu(CPU_Accelerator):  # type: ignore[misc]
        def device_count(self) -> int:
            return ranks

    accelerator.set_accelerator(CUDA_Accelerator() if device.type == "cuda" else Cpu())
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # By its full name: `torch` of the package deepspeed.comm is torch itself.
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
