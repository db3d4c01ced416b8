"""What this version's engine runs of all that can be planned and priced."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import BadLayout, BadModel
from cluster.topology import Device
from strategies.formats import KV_FLOAT8, Format
from strategies.plan import Layout
from strategies.quantize import RUNS
from strategies.scheme import SPARSE24
from strategies.spec import ModelSpec

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def is_known(spec: ModelSpec) -> bool:
    """Whether the engine runs it; else the compatibility runtime does, as transformers' own model."""
    return spec.family in FAMILIES and not spec.sizes_only


def compatibility(spec: ModelSpec) -> str:
    """What a user is told of it."""
    return (
        f"{spec.name} ({spec.family}) runs as transformers' own model under the compatibility runtime, slower than "
        "planned, without paged KV cache, prefix caching, CUDA graphs, pp or fewer bits"
    )


def why_not(spec: ModelSpec, layout: Layout, *, named: bool = True) -> str | None:
    """Why the engine does not run a layout of a model; None if it does.

    What changes a model's answers, or brings weights at every step, runs only where somebody `named` it.
    """
    if layout.zero3 or not is_known(spec):
        return _incompatible(spec, layout, named)
    reason = _beyond_this_version(layout) or _together(layout) or _format(layout, named)
    if reason is None and layout.offload and not named:
        return "+offload brings weights from host memory at every step: it runs where --layout names it"
    return reason


def _incompatible(spec: ModelSpec, layout: Layout, named: bool) -> str | None:
    """Why the compatibility runtime does not run a layout; None if it does."""
    dims = layout.dims
    if spec.published is not None:
        return (
            f"the compatibility runtime, which {layout.name} of {spec.name} wants, does not read weights in "
            f"{spec.published.format or 'fewer bits'}; use a checkpoint in bfloat16"
        )
    if layout.zero3:
        return None if named else "zero3+offload is there to be compared with: it runs where it is named"
    if dims.pp > 1 or dims.ep > 1 or layout.format.name or layout.offload:
        return (
            f"the compatibility runtime, which {spec.name} ({spec.family}) runs under, has plain tp and dp alone, "
            f"not {layout.name}; use tp2, dp2 or tp1"
        )
    if dims.tp > 1 and (spec.latent is not None or spec.heads % dims.tp or spec.kv_heads % dims.tp):
        heads = (
            "latent attention"
            if spec.latent is not None
            else f"{spec.heads} heads and {spec.kv_heads} KV heads"
        )
        return (
            f"DeepSpeed's AutoTP splits whole heads evenly; {spec.name} has {heads}, not for {layout.name}; "
            f"use dp{dims.tp} for as many devices"
        )
    return None


def _beyond_this_version(layout: Layout) -> str | None:
    if layout.format.weights and layout.format.weights not in RUNS:
        return f"+{layout.format.weights} is planned only"
    return "expert parallelism is planned only" if layout.dims.ep > 1 else None


def _together(layout: Layout) -> str | None:
    """What a layout names that does not go together, on any machine."""
    if layout.offload and layout.format.weights == SPARSE24:
        return f"+{SPARSE24} keeps all layers on the device; leave +offload away, or use +int8+offload"
    return None


def _format(layout: Layout, named: bool) -> str | None:
    changes = layout.format.name and not named
    return (
        f"+{layout.format.name} changes a model's answers: it runs where --layout names it"
        if changes
        else None
    )


def lacking(kept: Format, devices: Sequence[Device]) -> str | None:
    """What devices cannot do that a format wants."""
    for device in devices:
        if "float8" in device.flops_per_s:
            continue
        if kept.weights == "fp8":
            return (
                f"+fp8 is multiplied in float8, which the {device.name} does not compute "
                "(GPUs do from compute capability 8.9 on); use +int8"
            )
        if kept.has_float8_kv and device.kind != "cpu":
            return (
                f"+{KV_FLOAT8} is read in float8, which the {device.name} does not convert "
                f"(GPUs do from compute capability 8.9 on); leave +{KV_FLOAT8} away"
            )
    return None


def check_layout(layout: Layout) -> Layout:
    """Raises BadLayout for a layout that can be planned only, or not at all, whatever the model."""
    if (reason := _together(layout)) is not None:
        raise BadLayout(f"layout {layout.name!r}: {reason}")
    reason = _beyond_this_version(layout)
    if reason is not None:
        plain = Layout(layout.dims.without_ep)
        raise BadLayout(
            f"layout {layout.name!r} can be planned, not run, by this version ({reason}); "
            f"run a plain one such as {plain.name}, or {plain.name}+int8"
        )
    return layout


def check_known(spec: ModelSpec) -> None:
    """Raises BadModel for a model that the engine does not run."""
    if not is_known(spec):
        runs = ", ".join(sorted(FAMILIES))
        kind = "a mixture of experts" if spec.experts is not None else "of another architecture"
        raise BadModel(f"{spec.name} ({spec.family}) is {kind}; the engine has the {runs} families only")
