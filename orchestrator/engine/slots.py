"""What each slot holds, as the steps so far have told: the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.engine.sampler import Draw, History
from orchestrator.step import Row, Step

Ints = NDArray[np.int64]


def positions(starts: Ints, counts: Ints) -> Ints:
    """Of all tokens of rows that compute `counts` positions from `starts` on: [T]."""
    ends = np.cumsum(counts)
    return np.arange(counts.sum()) - np.repeat(ends - counts - starts, counts)


def sampling_ends(rows: Sequence[Row]) -> Ints:
    """The last token, among all tokens of the rows, of each row that samples."""
    ends = np.cumsum([row.count for row in rows], dtype=np.int64) - 1
    return ends[[row.samples for row in rows]]


class Slots:
    """Each slot's tokens, sampling parameters and block table."""

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
            if row.token_id >= 0:
                token_ids = self.history(row.slot).token_ids
                if row.start == len(token_ids):
                    token_ids.append(row.token_id)

    def history(self, slot: int) -> History:
        history = self.histories[slot]
        assert history is not None, f"slot {slot} was never admitted"
        return history

    def is_ahead(self, row: Row) -> bool:
        """Whether the row's token was sampled and the host has not seen it yet."""
        return row.token_id < 0 and row.start >= len(self.history(row.slot).token_ids)

    def draws(self, rows: Sequence[Row]) -> list[Draw]:
        """Of the rows that sample."""
        return [Draw(self.history(row.slot), row.start + row.count, row.mask) for row in rows if row.samples]

    def all_plain(self, rows: Sequence[Row]) -> bool:
        """Whether every row that samples wants the likeliest token and nothing else."""
        histories = self.histories
        return all(
            row.start + row.count >= history.plain_from and not row.mask
            for row in rows
            if row.samples and (history := histories[row.slot]) is not None
        )

    def token_ids(self, rows: Sequence[Row]) -> list[int]:
        """Of all positions of the rows; -1 for one that was sampled ahead of the host."""
        ids: list[int] = []
        for row in rows:
            known = self.history(row.slot).token_ids[row.start : row.start + row.count]
            ids += known or [row.token_id]
        return ids
