"""The compatibility runtime: what the engine does not know runs as transformers' own model.

Each rank reads the whole checkpoint into host memory; with tp, DeepSpeed's AutoTP then keeps its part. AutoTP splits
some architectures wrongly and says nothing, so what it made is held against the whole model before it serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import BadLayout, BadModel
from orchestrator.engine.deepspeed_parts import split, zero3
from orchestrator.engine.memory import available_host_bytes
from orchestrator.engine.residence import Residence
from orchestrator.engine_config import EngineConfig
from strategies.plan import Shard
from strategies.source import SourceKind
from strategies.spec import BYTES_PER_ELEMENT

PROBE_TOKENS = 12
WORST_ERROR = {"float32": 1e-3, "bfloat16": 0.08, "float16": 0.02}
"""Of split logits beside whole ones, ‖difference‖ / ‖whole‖: rounding gives a tenth of it, a wrong split 1."""


ROUTED_ELSEWHERE = 5
"""In half precision a router may choose another expert where two nearly tie: a right split was 0.175 off."""


def compatible(config: EngineConfig, shard: Shard, device: torch.device) -> tuple[nn.Module, Residence]:
    """transformers' model on the device, this rank's part of it. Raises BadModel and BadLayout."""
    if config.source.kind != SourceKind.HF:
        raise BadModel(
            f"the compatibility runtime wants a directory in the Hugging Face layout; {config.spec.name} is none"
        )
    _check_host(config, shard)
    model, layers = _whole(config), len(shard.layers)
    if config.zero3:
        streamed = zero3(model, shard.tp_rank, shard.tp, device, getattr(torch, config.dtype))
        streamed.eval()  # which returns nothing: DeepSpeed's engine has its own
        return streamed, Residence(layers, 0, _all_bytes(config) // shard.tp)
    return _on_device(model, config, shard, device).eval(), Residence(layers, layers, 0)


def _on_device(model: nn.Module, config: EngineConfig, shard: Shard, device: torch.device) -> nn.Module:
    dtype = getattr(torch, config.dtype)
    if shard.tp == 1:
        return model.to(device)
    probe = [7 * i % config.spec.vocab for i in range(1, PROBE_TOKENS + 1)]
    wanted = _logits(model, probe, torch.device("cpu")) if shard.tp_rank == 0 else None
    part = split(model, config.spec.name, shard.tp, device, dtype).to(device).eval()
    try:
        found = _logits(part, probe, device)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:  # parts that do not fit
        raise BadLayout(_wrong(config, shard.tp, str(error).strip().splitlines()[0][:120])) from error
    if wanted is not None:
        _check_split(wanted, found, config, shard.tp)
    return part


def _whole(config: EngineConfig) -> nn.Module:
    """As transformers makes it, in host memory."""
    import transformers

    assert config.source.path is not None
    transformers.utils.logging.disable_progress_bar()
    dtype: Any = getattr(torch, config.dtype)
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        if config.dummy_weights:
            torch.manual_seed(config.seed)  # the same on every rank
            made = transformers.AutoConfig.from_pretrained(config.source.path, **given)
            whole: nn.Module = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
        else:
            whole, told = transformers.AutoModelForCausalLM.from_pretrained(
                config.source.path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are told below
                **given,
            )
            if wrong := sorted(told["mismatched_keys"]):
                name, stored, meant = wrong[0]
                raise BadModel(
                    f"{config.spec.name}: {name} is {list(stored)} in the checkpoint, but {list(meant)} by its config; "
                    "take both from one release"
                )
            if lost := sorted(told["missing_keys"]):  # which transformers fills at random
                raise BadModel(
                    f"{config.spec.name}: the checkpoint has no {lost[0]}, the first of {len(lost)} that "
                    f"transformers' {type(whole).__name__} holds and it lacks; fetch it again"
                )
    except BadModel:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadModel(
            f"{config.spec.name}: transformers {transformers.__version__} does not load it: {reason[0][:200]}"
        ) from error
    return whole.requires_grad_(False).eval()


def _check_host(config: EngineConfig, shard: Shard) -> None:
    """Raises BadLayout."""
    each = _all_bytes(config)
    need, free = each * (shard.tp + config.zero3), available_host_bytes()
    if need > free:
        raise BadLayout(
            f"the compatibility runtime reads {config.spec.name} whole on every rank: {need / 1e9:.1f} GB "
            f"of host memory in all, of which {free / 1e9:.1f} GB is available; use fewer ranks"
        )


def _all_bytes(config: EngineConfig) -> int:
    return config.spec.total_params * BYTES_PER_ELEMENT.get(config.dtype, 8)


@torch.no_grad()
def _logits(model: nn.Module, token_ids: Sequence[int], device: torch.device) -> Tensor:
    """[T, V], float32, on the CPU."""
    logits: Tensor = model(input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False).logits
    return logits[0].float().cpu()


def _check_split(wanted: Tensor, found: Tensor, config: EngineConfig, tp: int) -> None:
    """Raises BadLayout."""
    worst = WORST_ERROR.get(config.dtype, 1e-6)
    if config.spec.experts is not None and config.dtype in ("bfloat16", "float16"):
        worst *= ROUTED_ELSEWHERE
    error = float((found - wanted).norm() / wanted.norm()) if found.shape == wanted.shape else float("nan")
    if not error <= worst:  # nan too
        raise BadLayout(
            _wrong(config, tp, f"logits are {error:.1%} off the whole model's, {worst:.1%} at most")
        )


def _wrong(config: EngineConfig, tp: int, why: str) -> str:
    return (
        f"DeepSpeed's AutoTP splits {config.spec.name} ({config.spec.family}) wrongly at tp{tp}: {why}; use tp1, or "
        f"dp{tp} for as many devices"
    )
