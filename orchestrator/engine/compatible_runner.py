"""Runs steps through transformers' own model: rows that decode in one batch, prompts of like lengths together.

Each slot has a cache of its own, as transformers keeps it; the KV blocks of a step only count how much there may be.
Rows of one batch are padded in front to one length, so that what a token sees lies as far behind it as by itself.

Dimensions: R rows, T tokens of a row, L cached tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.engine.runner import Pending
from orchestrator.engine.sampler import sample
from orchestrator.engine.slots import Slots
from orchestrator.step import Row, Step
from strategies.plan import Shard

LIKE_LENGTHS = 2
"""Prompts run together up to so many times the shortest: the rest would be padding."""

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [R, heads, L, head dimension]


@dataclass(slots=True)
class Cached:
    """Sequences that went through the model together, whose caches lie in one batch, padded in front."""

    slots: list[int]
    lengths: list[int]  # of each, without padding
    cache: Any  # transformers' Cache


class CompatibleRunner:
    """Feeds transformers' model, the same on every rank (satisfies StepRunner)."""

    def __init__(self, model: nn.Module, slots: Slots, shard: Shard, device: torch.device) -> None:
        self._model, self.slots, self._shard, self._device = model, slots, shard, device
        inner: Any = getattr(model, "module", model)  # DeepSpeed's engine passes on what it is given
        takes = inspect.signature(inner.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._keeps_last = "logits_to_keep" in takes
        self._vocab: int = inner.config.vocab_size
        self._cached: list[Cached] = []

    def capture(self) -> None:
        """Nothing to do: these steps are not replayed."""

    def graph_bytes(self) -> int:
        return 0

    @torch.no_grad()
    def run(self, step: Step) -> Pending | None:
        """Starts a step. Its tokens on the first rank, None on all others."""
        logits_RV = self.forward(step)
        if self._shard.tp_rank:
            return None
        draws = self.slots.draws(step.rows)
        return Pending.on_its_way(step, sample(logits_RV, draws), logits_RV, draws)

    def forward(self, step: Step) -> Tensor:
        """Logits of the rows that sample, [R, V]."""
        self.slots.remember(step)
        for admit in step.admits:
            self._forget(admit.slot)
        last: dict[int, Tensor] = {}  # by slot
        for batch in _batches(step.rows):
            last.update(zip((row.slot for row in batch), self._pass(batch), strict=True))
        wanted = [last[row.slot] for row in step.rows if row.samples]
        return torch.stack(wanted) if wanted else next(iter(last.values())).new_empty((0, self._vocab))

    @torch.no_grad()
    def score(self, token_ids: list[int]) -> Tensor | None:
        """Logits after each of the tokens, [T, V]."""
        logits: Tensor = self._model(
            input_ids=torch.tensor([token_ids], device=self._device), use_cache=False
        ).logits
        return logits[0]

    def _pass(self, rows: Sequence[Row]) -> Tensor:
        """The model once; the rows' caches grow by their tokens. → logits of each one's last, [R, V]."""
        held = self._together(rows)
        longest = max(held.lengths, default=0)
        width = max(row.count for row in rows)
        ids_RT = torch.zeros((len(rows), width), dtype=torch.int64)
        sees_RL = torch.zeros((len(rows), longest + width), dtype=torch.int64)
        positions_RT = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids_RT[i, width - row.count :] = torch.tensor(self.slots.token_ids([row]))
            sees_RL[i, longest - row.start : longest] = 1
            sees_RL[i, longest + width - row.count :] = 1
            positions_RT[i, width - row.count :] = torch.arange(row.start, row.start + row.count)
        given: dict[str, Any] = {"logits_to_keep": 1} if self._keeps_last else {}
        if self._takes_positions:
            given["position_ids"] = positions_RT.to(self._device)
        told = self._model(
            input_ids=ids_RT.to(self._device),
            attention_mask=sees_RL.to(self._device),
            past_key_values=held.cache,
            use_cache=True,
            **given,
        )
        held.cache, held.lengths = told.past_key_values, [row.start + row.count for row in rows]
        last_RV: Tensor = told.logits[:, -1]
        return last_RV

    def _together(self, rows: Sequence[Row]) -> Cached:
        """The rows' caches in one batch: as they lie, if they went through the last step together."""
        slots = [row.slot for row in rows]
        for held in self._cached:
            if held.slots == slots:
                return held
        parts = [self._part(row) for row in rows]
        for slot in slots:
            self._forget(slot)
        longest = max(row.start for row in rows)
        made = Cached(slots, [row.start for row in rows], _empty())
        if longest:
            for layer in range(len(parts[0])):
                padded = [
                    [F.pad(states, (0, 0, longest - row.start, 0)) for states in part[layer]]
                    for part, row in zip(parts, rows, strict=True)
                ]
                made.cache.update(*(torch.cat(states) for states in zip(*padded, strict=True)), layer)
        self._cached.append(made)
        return made

    def _part(self, row: Row) -> Layers:
        """What is cached of a row's sequence; nothing before its first token."""
        if not row.start:
            return []
        held = next(held for held in self._cached if row.slot in held.slots)
        i = held.slots.index(row.slot)
        assert held.lengths[i] >= row.start, (
            f"slot {row.slot} has {held.lengths[i]} tokens cached, not {row.start}"
        )
        end = max(held.lengths)
        first = end - held.lengths[i]
        return [
            (keys[i : i + 1, :, first : first + row.start], values[i : i + 1, :, first : first + row.start])
            for keys, values in _layers(held.cache)
        ]

    def _forget(self, slot: int) -> None:
        """Takes the slot out of its batch, whose others keep theirs."""
        for held in self._cached:
            if slot in held.slots:
                i = held.slots.index(slot)
                left = [j for j in range(len(held.slots)) if j != i]
                self._cached.remove(held)
                if left:
                    self._cached.append(_of(held, left))
                return


def _of(held: Cached, left: Sequence[int]) -> Cached:
    lengths = [held.lengths[j] for j in left]
    spare = max(held.lengths) - max(lengths)
    made = Cached([held.slots[j] for j in left], lengths, _empty())
    for layer, (keys, values) in enumerate(_layers(held.cache)):
        made.cache.update(keys[list(left), :, spare:], values[list(left), :, spare:], layer)
    return made


def _empty() -> Any:
    """transformers' cache of keys and values; windows are masked, not cut off."""
    from transformers import DynamicCache

    return DynamicCache()


def _layers(cache: Any) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    """Decodes together, fresh prompts of like lengths together, and what goes on in the middle of a prompt alone."""
    decodes = [row for row in rows if row.count == 1 and row.start]
    fresh = sorted((row for row in rows if not row.start), key=lambda row: row.count)
    found = [decodes] if decodes else []
    for row in fresh:
        if found and not found[-1][0].start and row.count <= LIKE_LENGTHS * found[-1][0].count:
            found[-1].append(row)
        else:
            found.append([row])
    return found + [[row] for row in rows if row.start and row.count > 1]
