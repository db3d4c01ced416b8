"""Parts of a batch that take turns at every sum, and how a step's rows are cut in two."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.step import Row, halves
from strategies.overlap import Overlap


@dataclass
class Summing:
    tensor: Tensor
    log: list[str]

    def landed(self) -> Tensor:
        self.log.append(f"wait {int(self.tensor[0])}")
        return self.tensor * 2


class TwoRanks:
    """The sum of two ranks that hold the same."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.log.append(f"sum {int(tensor[0])}")
        return tensor * 2

    def start_all_reduce(self, tensor: Tensor) -> Summing:
        self.log.append(f"start {int(tensor[0])}")
        return Summing(tensor, self.log)

    def all_gather_columns(self, tensor: Tensor, widths: list[int]) -> Tensor:
        raise NotImplementedError

    def check(self) -> None: ...


def summed_twice(overlap: Overlap, value: int) -> int:
    first = overlap.all_reduce(torch.tensor([value]))
    return int(overlap.all_reduce(first + 1))


def test_one_computes_while_the_sum_of_the_other_travels() -> None:
    group = TwoRanks()
    overlap = Overlap(group)
    found = overlap.run([lambda: summed_twice(overlap, 10), lambda: summed_twice(overlap, 20)])
    assert found == [42, 82]
    assert group.log == [
        *("start 10", "start 20"),
        *("wait 10", "start 21", "wait 20", "start 41"),
        *("wait 21", "wait 41"),
    ]


def test_one_part_and_whatever_runs_outside_wait_for_each_sum() -> None:
    group = TwoRanks()
    overlap = Overlap(group)
    assert overlap.run([lambda: summed_twice(overlap, 10)]) == [42]
    assert summed_twice(overlap, 1) == 6
    assert group.log == ["sum 10", "sum 21", "sum 1", "sum 3"]


def test_a_part_with_fewer_sums_ends_first_and_the_results_keep_their_order() -> None:
    overlap = Overlap(TwoRanks())
    assert overlap.run([lambda: summed_twice(overlap, 10), lambda: 7]) == [42, 7]
    assert overlap.run([lambda: 7, lambda: summed_twice(overlap, 10)]) == [7, 42]


def test_what_a_part_raises_comes_out_and_the_next_batch_runs() -> None:
    overlap = Overlap(TwoRanks())

    def fails() -> int:
        overlap.all_reduce(torch.tensor([1]))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        overlap.run([lambda: summed_twice(overlap, 10), fails])
    assert overlap.run([lambda: summed_twice(overlap, 10), lambda: summed_twice(overlap, 20)]) == [42, 82]


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12))
def test_halves_hold_every_token_once_and_in_order(shape: list[tuple[int, bool]]) -> None:
    rows = [Row(slot, 5, count, samples, -1, -1) for slot, (count, samples) in enumerate(shape)]
    first, second = halves(rows)
    tokens = [(row.slot, row.start + i) for row in rows for i in range(row.count)]
    assert [(row.slot, row.start + i) for row in first + second for i in range(row.count)] == tokens
    assert [row.slot for row in first + second if row.samples] == [row.slot for row in rows if row.samples]
    assert sum(row.count for row in first) == len(tokens) // 2 or rows[0].count == len(tokens) == 1
    assert all(row.count for row in first + second)


def test_what_the_ranks_must_be_told_goes_with_a_rows_first_token() -> None:
    rows = [Row(0, 7, 1, True, 99, 3), Row(1, 0, 5, True, -1, -1)]
    assert halves(rows) == (
        [Row(0, 7, 1, True, 99, 3), Row(1, 0, 2, False, -1, -1)],
        [Row(1, 2, 3, True, -1, -1)],
    )
