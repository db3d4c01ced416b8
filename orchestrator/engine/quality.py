"""What fewer bits cost: a model's logits on a text beside those of a reference.

Perplexity is that of the next token over windows of a text, each read from its start. The divergence is
Kullback-Leibler's of the model from the reference, a token's mean, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.errors import BadRequest
from orchestrator.engine.memory import available_host_bytes
from orchestrator.engine_config import EngineConfig
from orchestrator.scheduler import SchedulerConfig
from orchestrator.worker import Worker
from strategies.formats import FORMATS
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims

ROWS = 128  # tokens whose whole vocabulary is compared at once
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Quality:
    tokens: int  # predicted
    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float

    @property
    def rise_percent(self) -> float:
        return 100 * (self.perplexity / self.reference_perplexity - 1)


def windows_of(token_ids: Sequence[int], context: int, most_tokens: int) -> list[list[int]]:
    """Pieces of `context` tokens, from the beginning; a shorter one where there are no more. Raises BadRequest."""
    if len(token_ids) < 2:
        raise BadRequest(f"the text has {len(token_ids)} tokens; quality needs 2 at least")
    most = min(most_tokens, len(token_ids))
    context = min(context, most)
    count = most // context
    return [list(token_ids[i * context : (i + 1) * context]) for i in range(count)]


def check_memory(windows: Sequence[Sequence[int]], vocab: int) -> None:
    """The reference's logits stay in host memory. Raises BadRequest where they would not fit."""
    tokens = sum(map(len, windows))
    need, free = tokens * vocab * _FLOAT_BYTES, available_host_bytes()
    if need > free:
        raise BadRequest(
            f"{tokens:,} tokens × {vocab:,} logits × 4 bytes are {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of "
            f"host memory are free; ask for --tokens {int(free // (vocab * _FLOAT_BYTES) // 2)}"
        )


def scored(
    config: EngineConfig, windows: Sequence[Sequence[int]], told: Callable[[int, int], None]
) -> Iterator[Tensor]:
    """A model's logits after each token of each window, float32 [T, V]: one device, this process."""
    (shard,) = shard_replica(config.spec, ParallelDims(), kept=FORMATS[config.format])
    worker = Worker()
    worker.join(config, shard, "", 0)
    worker.load()
    longest = max(map(len, windows))
    blocks = -(-longest // config.block_size)
    worker.allocate(SchedulerConfig(blocks, config.block_size, max_num_seqs=1, max_model_len=longest))
    for done, window in enumerate(windows, 1):
        logits = worker.score(list(window))
        assert logits is not None, "one device is the last stage"
        told(done, len(windows))
        yield torch.from_numpy(np.frombuffer(logits, np.float32).copy()).view(len(window), -1)


def compared(
    reference: Sequence[Tensor], model: Iterator[Tensor], windows: Sequence[Sequence[int]]
) -> Quality:
    own_nll = reference_nll = divergence = agreed = 0.0
    tokens = 0
    for expected_TV, actual_TV, window in zip(reference, model, windows, strict=True):
        targets = torch.tensor(window[1:])
        for start in range(0, len(targets), ROWS):
            rows = slice(start, min(start + ROWS, len(targets)))
            p = expected_TV[rows].log_softmax(-1)
            q = actual_TV[rows].log_softmax(-1)
            at = targets[rows, None]
            reference_nll -= p.gather(1, at).sum().item()
            own_nll -= q.gather(1, at).sum().item()
            divergence += (p.exp() * (p - q)).sum().item()
            agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
            tokens += len(at)
    return Quality(
        tokens,
        math.exp(own_nll / tokens),
        math.exp(reference_nll / tokens),
        divergence / tokens,
        agreed / tokens,
    )
