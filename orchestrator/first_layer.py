"""A model's first layer split over ranks against the same layer on one of them: a rung of a machine's proof.

What was proved before it are bits of random tensors. Here the engine itself runs, with the model's own weights, over
the ways that it will take: what it loads, how it splits and what it sums must give the logits of one device.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from cluster.children import alive
from cluster.probes import Target
from orchestrator.engine_config import EngineConfig
from orchestrator.scheduler import SchedulerConfig
from orchestrator.worker import Worker
from strategies.formats import FORMATS
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims

TOKENS = 24
APART = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
"""Relative L2 distance beyond which a split layer is wrong: sums in another order leave some 1e-6 and 0.01."""


def differs(target: Target, meeting: str, config: EngineConfig, tp: int) -> str | None:
    """What is wrong, told by the first rank; None where nothing is. `config` is what the model will be served with."""
    spec = config.spec
    layer = replace(config, spec=replace(spec, layers=1, windows=spec.windows[:1]), join_timeout_s=30.0)
    device = target.open()
    expected = _logits(
        layer, ParallelDims(), 0, meeting, device.index
    )  # compiles kernels, and waits for nobody
    got = _logits(layer, ParallelDims(tp=tp), target.rank, meeting, device.index)
    if got is None or expected is None:
        return None
    apart = float((got - expected).norm() / expected.norm())
    if apart <= APART[config.dtype]:  # nor nan
        return None
    return f"corrupt logits: {apart:.3g} off those of one device, and {APART[config.dtype]:g} is allowed"


def _logits(
    config: EngineConfig, dims: ParallelDims, rank: int, meeting: str, device_index: int | None
) -> torch.Tensor | None:
    """[T, vocabulary] on the first rank, None on the others."""
    worker, spec = Worker(), config.spec
    shard = shard_replica(spec, dims, kept=FORMATS[config.format])[rank]
    worker.join(config, shard, meeting, device_index or 0)
    try:
        alive()
        worker.load()
        blocks = -(-TOKENS // config.block_size)
        worker.allocate(SchedulerConfig(blocks, config.block_size, 1, max_model_len=TOKENS))
        alive()
        found = worker.score([(7919 * i + 11) % spec.vocab for i in range(TOKENS)])
        alive()
    finally:
        worker.collectives.leave()
    if found is None:
        return None
    return torch.frombuffer(bytearray(found), dtype=torch.float32).view(TOKENS, spec.vocab)
