"""Pipeline parallelism: contiguous layers to stages, so that the slowest stage is as fast as can be.

The embedding weighs on the first stage and the head on the last, so the split is uneven where they weigh; stages of
unlike speed (mixed cards) get unlike numbers of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from cluster.errors import BadLayout
from strategies.plan import ParallelDims, Shard
from strategies.spec import ModelSpec
from strategies.tensor import shard_stage


def split_layers(
    layers: int, head_layers: float, first_layers: float = 0.0, *, speeds: Sequence[float]
) -> list[range]:
    """Layers for each stage, one at least, minimising the slowest stage's time.

    Costs are in units of one layer: `head_layers` for norm and head on the last stage, `first_layers` for the
    embedding on the first. `speeds` are the stages' relative speeds, one a stage. Raises BadLayout.
    """
    stages = len(speeds)
    if stages > layers:
        raise BadLayout(f"pp={stages} exceeds the model's {layers} layers; use pp{layers} or less")

    def cost(stage: int, n: int) -> float:
        extra = (first_layers if stage == 0 else 0.0) + (head_layers if stage == stages - 1 else 0.0)
        return (n + extra) / speeds[stage]

    # best[s][n]: (slowest of stages 0..s holding the first n layers, layers of stage s). Ties: fewer on later stages.
    best: list[dict[int, tuple[float, int]]] = [{n: (cost(0, n), n) for n in range(1, layers - stages + 2)}]
    for stage in range(1, stages):
        row: dict[int, tuple[float, int]] = {}
        for n in range(stage + 1, layers - stages + stage + 2):
            row[n] = min((max(best[-1][n - k][0], cost(stage, k)), k) for k in range(1, n - stage + 1))
        best.append(row)
    bounds, end = [layers], layers
    for stage in reversed(range(stages)):
        end -= best[stage][end][1]
        bounds.append(end)
    bounds.reverse()
    return [range(a, b) for a, b in pairwise(bounds)]


def head_cost_in_layers(spec: ModelSpec) -> float:
    """What the head costs beside a layer: both are bound by the bytes of their weights, or by FLOPs in proportion."""
    return spec.embedding_params / spec.layer_params


def shard_replica(spec: ModelSpec, dims: ParallelDims, speeds: Sequence[float] = ()) -> tuple[Shard, ...]:
    """Every rank's shard, in rank order: tp counts first. Raises BadLayout where the model cannot be split so."""
    split = split_layers(spec.layers, head_cost_in_layers(spec), speeds=speeds or [1.0] * dims.pp)
    stages = (shard_stage(spec, dims.tp, stage, dims.pp, layers) for stage, layers in enumerate(split))
    return tuple(shard for stage in stages for shard in stage)
