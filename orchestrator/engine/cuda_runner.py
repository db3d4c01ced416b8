"""Runs steps on a GPU: a step that only decodes is one CUDA graph, any other goes through the same kernels one by one.

Nothing here waits for the device. Sampled tokens stay on it, so that the next step may start before the host has seen
them: a row whose token the host does not know takes its slot's newest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.collectives import Collectives
from orchestrator.engine import ops
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.model import Transformer
from orchestrator.engine.paged_attention import (
    DeviceSlots,
    PagedBatch,
    PagedContext,
    batch_of,
    to_device,
    told_of_decodes,
)
from orchestrator.engine.runner import Pending
from orchestrator.engine.sampler import sample
from orchestrator.engine.slots import Slots
from orchestrator.step import Row, Step, whole_prompts
from strategies.plan import Shard


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Rows of the steps that are captured: a step is padded to the next of them, by an eighth at most from 64 on."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class CudaRunner:
    """Feeds one rank's transformer, the same on every rank (satisfies StepRunner)."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        slots: Slots,
        shard: Shard,
        collectives: Collectives,
        vocab: int,
    ) -> None:
        """`vocab` is the whole model's."""
        self.model, self.cache, self.slots, self.shard = model, cache, slots, shard
        self.collectives = collectives
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._max_num_seqs, blocks = slots.tables.shape
        self._on_device = DeviceSlots(self._max_num_seqs, blocks * slots.block_size, cache)
        self._sizes = graph_sizes(self._max_num_seqs)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._make_buffers(vocab if shard.is_last else 0)

    def _make_buffers(self, vocab: int) -> None:
        """What decode steps read and write: always at the same places, since graphs hold them."""
        rows, spec = self._max_num_seqs, self.model.spec
        with torch.device(self._device):
            self._told = torch.zeros(4 * rows, dtype=torch.int32)
            states = 0 if self.shard.is_first and self.shard.is_last else rows
            self._hidden_TE = torch.zeros((states, spec.hidden), dtype=self._dtype)
            self._sampled_R = torch.zeros(rows, dtype=torch.int64)
            self._logits_RV = torch.zeros((rows if vocab else 0, vocab), dtype=self._dtype)

    @torch.inference_mode()
    def capture(self, *, largest_only: bool = False) -> None:
        for size in reversed(self._sizes[-1:] if largest_only else self._sizes):
            self._capture(size)  # what the largest takes serves the others too

    def _capture(self, size: int) -> None:
        told = told_of_decodes([], self.slots, size, self._on_device.scratch)
        self._told[: told.size].copy_(to_device(told.reshape(-1), self._device))
        self._decode(size)  # compiles, and opens NCCL's connections
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # Other threads (NCCL's watchdog) may ask the driver things meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._decode(size)
        self._graphs[size] = graph

    @torch.inference_mode()
    def run(self, step: Step) -> Pending | None:
        """Starts a step. Its tokens on the last stage's first rank, None on all others."""
        self.slots.remember(step)
        self._on_device.admit(step.admits)
        if all(row.count == 1 and row.samples for row in step.rows):
            logits_RV, tokens_R = self._run_decodes(step.rows)
        else:
            logits_RV, tokens_R = self._run_any(step.rows)
        if logits_RV is None or tokens_R is None:
            return None
        draws = self.slots.draws(step.rows)
        if not all(draw.is_plain for draw in draws):
            tokens_R = sample(logits_RV, draws)
            self._keep(tokens_R, self._sampling_slots(step.rows))
        if self.shard.tp_rank:
            return None
        return Pending.on_its_way(step, tokens_R, logits_RV, draws)

    @torch.inference_mode()
    def score(self, token_ids: list[int]) -> Tensor | None:
        """Logits after each of the tokens, [T, V], on every rank of the last stage. Uses slot 0: not while serving."""
        step = whole_prompts([token_ids], self.slots.block_size)
        self.slots.remember(step)
        self._on_device.admit(step.admits)
        batch = batch_of(step.rows, self.slots, self._device)
        hidden_TE = self._layers(batch, self._received(len(token_ids)))
        if self.shard.is_last:
            return self.model.logits(hidden_TE)
        self._send(hidden_TE)
        return None

    # -- steps that only decode --

    def _run_decodes(self, rows: Sequence[Row]) -> tuple[Tensor | None, Tensor | None]:
        """→ logits and greedy tokens, on the last stage."""
        count = len(rows)
        size = next(size for size in self._sizes if size >= count)
        told = told_of_decodes(rows, self.slots, size, self._on_device.scratch)
        self._told[: told.size].copy_(torch.from_numpy(told.reshape(-1)).pin_memory(), non_blocking=True)
        received = self._received(count)
        if received is not None:
            self._hidden_TE[:count] = received
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
        else:
            self._decode(size)
        if self.shard.is_last:
            return self._logits_RV[:count], self._sampled_R[:count]
        self._send(self._hidden_TE[:count].clone())  # the next step writes over them
        return None, None

    def _decode(self, size: int) -> None:
        """What a graph holds."""
        told_4T = self._told[: 4 * size].view(4, size)
        hidden_TE = self._layers(PagedBatch(told_4T, size, None), self._hidden_TE[:size])
        if not self.shard.is_last:
            self._hidden_TE[:size] = hidden_TE
            return
        self._logits_RV[:size] = self.model.logits(hidden_TE)
        self._sampled_R[:size] = ops.argmax(self._logits_RV[:size])
        self._keep(self._sampled_R[:size], told_4T[0])

    # -- any step --

    def _run_any(self, rows: Sequence[Row]) -> tuple[Tensor | None, Tensor | None]:
        batch = batch_of(rows, self.slots, self._device)
        hidden_TE = self._layers(batch, self._received(batch.told_4T.shape[1]))
        if not self.shard.is_last:
            self._send(hidden_TE)
            return None, None
        ends = np.cumsum([row.count for row in rows]) - 1
        wanted = ends[[row.samples for row in rows]]
        if not len(wanted):
            return self._logits_RV[:0], self._sampled_R[:0]
        logits_RV = self.model.logits(hidden_TE[to_device(wanted, self._device)])
        tokens_R = ops.argmax(logits_RV)
        self._keep(tokens_R, self._sampling_slots(rows))
        return logits_RV, tokens_R

    def _layers(self, batch: PagedBatch, received_TE: Tensor | None) -> Tensor:
        context = PagedContext(self.cache, self._on_device, batch, self.model.spec, self.model.rope)
        x = context.token_ids_T if self.shard.is_first else received_TE
        hidden_TE: Tensor = self.model(x, context)
        return hidden_TE

    def _sampling_slots(self, rows: Sequence[Row]) -> Tensor:
        slots = np.array([row.slot for row in rows if row.samples], dtype=np.int32)
        return to_device(slots, self._device)

    def _keep(self, tokens_R: Tensor, slots_R: Tensor) -> None:
        self._on_device.newest.index_put_((slots_R,), tokens_R)

    # -- between stages --

    def _received(self, tokens: int) -> Tensor | None:
        """The previous stage's hidden states; None on the first stage."""
        if self.shard.is_first:
            return None
        assert self.collectives.previous_rank is not None
        shape = (tokens, self.model.spec.hidden)
        return self.collectives.recv(shape, self._dtype, self.collectives.previous_rank)

    def _send(self, hidden_TE: Tensor) -> None:
        assert self.collectives.next_rank is not None
        self.collectives.send(hidden_TE, self.collectives.next_rank)
