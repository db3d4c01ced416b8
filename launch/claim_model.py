"""What claims are put beside: built-in models on cards of the catalogue, and by how much a claim is off."""

from __future__ import annotations

from cluster import catalog
from cluster.topology import LinkKind, Topology
from strategies.cost import estimate
from strategies.cost_memory import memories
from strategies.place import place
from strategies.plan import Estimate, Layout, Placement
from strategies.read_spec import builtin
from strategies.spec import ModelSpec, Workload

HOLDS, DEPENDS, IMPOSSIBLE, WRONG = "holds", "depends", "impossible", "wrong"
NEAR = 1.25  # a claim so near is taken to hold


def off_by(claimed: float, computed: float) -> str:
    """`holds`, or by which factor a claim is off."""
    ratio = max(claimed / computed, computed / claimed)
    return HOLDS if ratio <= NEAR else f"off by {ratio:,.1f}×" if ratio < 100 else f"off by {ratio:,.0f}×"


def spec_of(name: str) -> ModelSpec:
    found = builtin(name)
    assert found is not None, f"{name} is built in"
    return found


def on(name: str, layout: str, card: str, n: int = 1) -> Placement:
    """A built-in model in a layout on cards of the catalogue."""
    sheet = catalog.sheet(card)
    kind = None if sheet.peer_access else LinkKind.HOST
    links = catalog.prior_links([(sheet, "node0")] * n, kind)
    machine = Topology(f"{n} × {card}", tuple(sheet.device(i) for i in range(n)), links)
    dtype = "bfloat16" if "bfloat16" in sheet.flops_per_s else "float16"
    return place(spec_of(name), Layout.parse(layout), dtype, machine)


def made(
    name: str,
    layout: str,
    card: str,
    n: int = 1,
    *,
    prompt_tokens: int = 1024,
    output_tokens: int = 256,
    concurrency: int = 1,
) -> Estimate:
    return estimate(on(name, layout, card, n), Workload(prompt_tokens, output_tokens, concurrency))


def weights_gb(name: str, layout: str = "tp1") -> float:
    placed = on(name, layout, "h200")
    return sum(need.weights for need in memories(placed, Workload())) / 1e9
