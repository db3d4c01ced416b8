"""What DeepSpeed does to transformers' models: AutoTP splits their layers, by name; ZeRO-3 keeps them in host memory.

Nothing is compiled: DeepSpeed's own collectives for CPUs would take minutes at their first use, and are left out.
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch._C._distributed_c10d import HashStore

from cluster.errors import BadLayout

PREFETCHED = 600_000_000  # weights that are sent for ahead
LIVE = 3_000_000_000  # weights that may be on a device at once


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


def zero3(model: nn.Module, rank: int, ranks: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The same model, whose weights lie split over the ranks in pinned host memory, and come together layer by layer.

    All ranks must run it as often.
    """
    if not torch.distributed.is_initialized():  # a rank alone meets nobody
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=rank, world_size=ranks)
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    deepspeed = ready(device, ranks)
    largest = max(parameter.numel() for parameter in model.parameters())
    layer = max(sum(p.numel() for p in part.parameters()) for part in model.modules() if part is not model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": device.type == "cuda"},
            "stage3_prefetch_bucket_size": min(PREFETCHED, layer),
            "stage3_max_live_parameters": max(LIVE, 2 * largest),
        },
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    streamed: nn.Module = engine
    return streamed


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
