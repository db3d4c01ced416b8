"""Runs steps on one device: makes the batch, runs this rank's layers, samples. Here by plain torch, step by step.

cuda_runner.py does the same with graphs and kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import Collectives
from orchestrator.engine.attention import Batch, SdpaContext
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Transformer
from orchestrator.engine.sampler import Draw, Logprobs, checked, logprobs, sample, to_host
from orchestrator.engine.slots import Ints, Slots, positions, sampling_ends
from orchestrator.step import Row, Step, StepResult, whole_prompts
from strategies.plan import Shard
from strategies.tensor import Vocabulary


@dataclass(frozen=True, slots=True)
class Pending:
    """A step's tokens, on their way from the device to the host."""

    step_id: int
    token_ids_R: Tensor
    logprobs: Logprobs | None
    landed: torch.cuda.Event | None  # None: they are here

    @staticmethod
    def on_its_way(step: Step, tokens_R: Tensor, logits_RV: Tensor, draws: Sequence[Draw]) -> Pending:
        """Sets the copies off. Of the logits one column is read, and more where log-probabilities are asked for."""
        told = logprobs(logits_RV, tokens_R, draws)
        token_ids_R = to_host(checked(tokens_R, logits_RV))
        landed = torch.cuda.Event() if tokens_R.is_cuda else None  # type: ignore[no-untyped-call]
        if landed is not None:
            landed.record()
        return Pending(step.id, token_ids_R, told, landed)

    def result(self) -> StepResult:
        """Waits for the device to come so far."""
        if self.landed is not None:
            self.landed.synchronize()
        token_ids: list[int] = self.token_ids_R.tolist()
        told = self.logprobs.of_all(len(token_ids)) if self.logprobs is not None else None
        return StepResult(self.step_id, token_ids, told)


class StepRunner(Protocol):
    """What the worker's loops drive."""

    def capture(self) -> None:
        """Makes steps of every size that is replayed ready for it. All ranks of a stage call it at once."""

    def graph_bytes(self) -> int:
        """What `capture` will take, found out by capturing a few. All ranks of a stage call it at once."""

    def run(self, step: Step) -> Pending | None:
        """Starts a step. Its tokens on the last stage's first rank, None on all others."""

    def score(self, token_ids: list[int]) -> Tensor | None:
        """Logits after each of the tokens, [T, V], on every rank of the last stage. Uses slot 0: not while serving."""


class Runner:
    """Feeds one rank's transformer, the same on every rank. The first stage reads token ids, the last samples."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        slots: Slots,
        shard: Shard,
        collectives: Collectives,
        vocabulary: Vocabulary,
    ) -> None:
        self.model, self.cache, self.slots, self.shard = model, cache, slots, shard
        self.collectives, self._vocabulary = collectives, vocabulary
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype

    def capture(self) -> None:
        """Nothing to do: these steps are not replayed."""

    def graph_bytes(self) -> int:
        return 0

    @torch.inference_mode()
    def run(self, step: Step) -> Pending | None:
        logits_RV = self.forward(step)
        if logits_RV is None or self.shard.tp_rank:
            return None
        draws = self.slots.draws(step.rows)
        return Pending.on_its_way(step, sample(logits_RV, draws), logits_RV, draws)

    def forward(self, step: Step) -> Tensor | None:
        """Logits of the rows that sample, [R, V], on the last stage; elsewhere the next stage gets the states."""
        ends = sampling_ends(step.rows)
        hidden_RE = self._layers(step, ends if len(ends) else None)
        if hidden_RE is None:
            return None
        if not len(ends):
            return hidden_RE.new_empty((0, self.model.spec.vocab))
        return self._vocabulary.whole(self.model.logits(hidden_RE))

    @torch.inference_mode()
    def score(self, token_ids: list[int]) -> Tensor | None:
        hidden_TE = self._layers(whole_prompts([token_ids], self.slots.block_size))
        return None if hidden_TE is None else self._vocabulary.whole(self.model.logits(hidden_TE))

    def _layers(self, step: Step, wanted_R: Ints | None = None) -> Tensor | None:
        """This rank's layers: hidden states on the last stage; elsewhere they are sent on.

        Of the tokens `wanted_R` alone, where it is given and this is the last stage.
        """
        self.slots.remember(step)
        batch = self._batch(step.rows)
        context = SdpaContext(self.cache, batch, self.model.spec, self.model.rope)
        if self.shard.is_last:
            wanted = None if wanted_R is None else torch.from_numpy(wanted_R).to(self._device)
            found: Tensor = self.model(self._input(batch), context, wanted)
            return found
        hidden_TE: Tensor = self.model(self._input(batch), context)
        assert self.collectives.next_rank is not None
        self.collectives.send(hidden_TE, self.collectives.next_rank)
        return None

    def _batch(self, rows: Sequence[Row]) -> Batch:
        starts = np.array([row.start for row in rows], dtype=np.int64)
        counts = np.array([row.count for row in rows], dtype=np.int64)
        longest = int((starts + counts).max())
        tables = self.slots.tables[[row.slot for row in rows], : -(-longest // self.slots.block_size)]
        token_ids = np.array(self.slots.token_ids(rows), dtype=np.int64)
        return Batch(token_ids, positions(starts, counts), starts, counts, tables)

    def _input(self, batch: Batch) -> Tensor:
        if self.shard.is_first:
            return torch.from_numpy(batch.token_ids_T).to(self._device)
        assert self.collectives.previous_rank is not None
        shape = (len(batch.token_ids_T), self.model.spec.hidden)
        return self.collectives.recv(shape, self._dtype, self.collectives.previous_rank)
