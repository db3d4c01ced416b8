"""Pipeline parallelism: contiguous layers to stages, so that the slowest stage is as fast as can be.

The embedding weighs on the first stage and the head on the last, so the split is uneven where they weigh; stages of
unlike speed (mixed cards) get unlike numbers of layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

from cluster.errors import BadLayout
from strategies.formats import PLAIN, Format
from strategies.plan import ParallelDims, Shard
from strategies.quantize import check, mlp_unit
from strategies.spec import ModelSpec, Workload
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


@functools.lru_cache(maxsize=1024)
def _split(layers: int, head_layers: float, speeds: tuple[float, ...]) -> tuple[range, ...]:
    """Remembered: it is the same for every format and tp."""
    return tuple(split_layers(layers, head_layers, speeds=speeds))


FLOPS_PER_BYTE = 230.0  # what an H100 computes in bfloat16 while it reads a byte: 712 TFLOP/s, 3.1 TB/s


def head_cost_in_layers(spec: ModelSpec, workload: Workload) -> float:
    """What the head adds to the last stage, as a multiple of a layer, over a workload whose requests run together.

    A decode step reads the weights once for all sequences, and each one's KV; a prompt's tokens cost their FLOPs. Only
    a prompt's last token goes through the head, and through the last layer's products, which spares that stage some.
    """
    size = 2  # bytes of a number, of weights and of KV
    steps, sequences = workload.output_tokens, workload.concurrency
    context = workload.prompt_tokens + steps / 2
    kv_bytes = spec.kv_bytes_per_token("bfloat16") / spec.layers * context * sequences
    prompts = 2 * spec.layer_params * workload.prompt_tokens * sequences / FLOPS_PER_BYTE
    layer = steps * (size * spec.layer_params + kv_bytes) + prompts
    return max(0.0, (steps * size * spec.embedding_params - prompts) / layer)


def shard_replica(
    spec: ModelSpec,
    dims: ParallelDims,
    speeds: Sequence[float] = (),
    workload: Workload = Workload(),  # noqa: B008 (frozen)
    kept: Format = PLAIN,
) -> tuple[Shard, ...]:
    """Every rank's shard, in rank order: tp counts first. Raises BadLayout where the model cannot be split so.

    `workload` is one replica's: it decides what the head weighs. `kept`: the weights' format, whose groups stay whole.
    """
    head = head_cost_in_layers(spec, workload)
    split = _split(spec.layers, head, tuple(speeds) or (1.0,) * dims.pp)
    unit = mlp_unit(spec, kept)
    stages = (shard_stage(spec, dims.tp, stage, dims.pp, layers, unit) for stage, layers in enumerate(split))
    shards = tuple(shard for stage in stages for shard in stage)
    check(spec, kept, shards)
    return shards
