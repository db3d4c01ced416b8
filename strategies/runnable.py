"""What this version's engine runs of all that can be planned and priced."""

from __future__ import annotations

from cluster.errors import BadModel
from strategies.plan import Layout
from strategies.spec import ModelSpec

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def why_not(spec: ModelSpec, layout: Layout) -> str | None:
    """Why the engine cannot run a layout of a model yet; None if it can."""
    if spec.family not in FAMILIES:
        kind = "a mixture of experts" if spec.experts is not None else f"of the {spec.family} family"
        return f"{spec.name} is {kind}, which this version plans and prices, but does not run"
    if layout.offload:
        return "offloaded weights are planned only"
    if layout.format.name:
        return f"+{layout.format.name} is planned only"
    return "expert parallelism is planned only" if layout.dims.ep > 1 else None


def check_runs(spec: ModelSpec) -> None:
    """Raises BadModel for a model that can be planned only."""
    if spec.family not in FAMILIES:
        runs = ", ".join(sorted(FAMILIES))
        kind = "a mixture of experts" if spec.experts is not None else "of another architecture"
        raise BadModel(
            f"{spec.name} ({spec.family}) is {kind}; this version plans it but runs the {runs} families only"
        )
