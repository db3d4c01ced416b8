"""Runs steps on one device: remembers what each slot holds, makes the batch, runs this rank's layers, samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import Collectives
from orchestrator.engine.attention import Batch, Ints, SdpaContext
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Transformer
from orchestrator.engine.sampler import History, sample
from orchestrator.step import Row, Step, StepResult, one_prompt
from strategies.plan import Shard


class Slots:
    """Each slot's tokens, sampling parameters and block table, as the steps so far have told."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)
        self.histories: list[History | None] = [None] * max_num_seqs

    def remember(self, step: Step) -> None:
        for admit in step.admits:
            self.tables[admit.slot, : len(admit.blocks)] = admit.blocks
            self.histories[admit.slot] = History(
                list(admit.token_ids), admit.prompt_tokens, admit.sampling, admit.stop_ids
            )
        for row in step.rows:
            if row.new_block >= 0:
                self.tables[row.slot, row.start // self.block_size] = row.new_block
            if row.token_id >= 0 and row.start == len(self.history(row.slot).token_ids):
                self.history(row.slot).token_ids.append(row.token_id)

    def history(self, slot: int) -> History:
        history = self.histories[slot]
        assert history is not None, f"slot {slot} was never admitted"
        return history

    def batch(self, rows: Sequence[Row]) -> Batch:
        starts = np.array([row.start for row in rows], dtype=np.int64)
        counts = np.array([row.count for row in rows], dtype=np.int64)
        ends = np.cumsum(counts)
        positions = np.arange(ends[-1]) - np.repeat(ends - counts - starts, counts)
        return Batch(
            self._token_ids(rows), positions, starts, counts, self._tables(rows, int((starts + counts).max()))
        )

    def _token_ids(self, rows: Sequence[Row]) -> Ints:
        ids: list[int] = []
        for row in rows:
            tokens = self.history(row.slot).token_ids
            ids += tokens[row.start : row.start + row.count]
        return np.array(ids, dtype=np.int64)

    def _tables(self, rows: Sequence[Row], longest: int) -> Ints:
        return self.tables[[row.slot for row in rows], : -(-longest // self.block_size)]


class Runner:
    """Feeds one rank's transformer, the same on every rank. The first stage reads token ids, the last samples."""

    def __init__(
        self, model: Transformer, cache: KVCache, slots: Slots, shard: Shard, collectives: Collectives
    ) -> None:
        self.model, self.cache, self.slots, self.shard, self.collectives = (
            model,
            cache,
            slots,
            shard,
            collectives,
        )
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._windows = model.spec.windows or (None,) * model.spec.layers

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult | None:
        """Sampled tokens on the last stage's first rank, None on all others."""
        logits_RV = self.forward(step)
        if logits_RV is None or self.shard.tp_rank:
            return None
        histories = [self.slots.history(row.slot) for row in step.rows if row.samples]
        token_ids, logprobs = sample(logits_RV, histories) if histories else ([], None)
        return StepResult(step.id, token_ids, logprobs)

    def forward(self, step: Step) -> Tensor | None:
        """Logits of the rows that sample, [R, V], on the last stage; elsewhere the next stage gets the states."""
        hidden_TE = self._layers(step)
        if hidden_TE is None:
            return None
        ends = np.cumsum([row.count for row in step.rows]) - 1
        wanted = ends[[row.samples for row in step.rows]]
        if not len(wanted):
            return hidden_TE.new_empty((0, self.model.spec.vocab))
        return self.model.logits(hidden_TE[torch.from_numpy(wanted).to(self._device)])

    @torch.inference_mode()
    def score(self, token_ids: list[int]) -> Tensor | None:
        """Logits after each of the tokens, [T, V], on every rank of the last stage. Uses slot 0: not while serving."""
        hidden_TE = self._layers(one_prompt(token_ids, self.slots.block_size))
        return None if hidden_TE is None else self.model.logits(hidden_TE)

    def _layers(self, step: Step) -> Tensor | None:
        """This rank's layers: hidden states on the last stage; elsewhere they are sent on."""
        self.slots.remember(step)
        batch = self.slots.batch(step.rows)
        context = SdpaContext(self.cache, batch, self._windows, self._device)
        hidden_TE: Tensor = self.model(self._input(batch), context)
        if self.shard.is_last:
            return hidden_TE
        assert self.collectives.next_rank is not None
        self.collectives.send(hidden_TE, self.collectives.next_rank)
        return None

    def _input(self, batch: Batch) -> Tensor:
        if self.shard.is_first:
            return torch.from_numpy(batch.token_ids_T).to(self._device)
        assert self.collectives.previous_rank is not None
        shape = (len(batch.token_ids_T), self.model.spec.hidden)
        return self.collectives.recv(shape, self._dtype, self.collectives.previous_rank)
