"""The sampler: each parameter does what it says, and a draw depends on seed and position alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from orchestrator.engine.sampler import Draw, History, checked, logprobs, sample
from orchestrator.request import SamplingParams
from orchestrator.step import NOT_FINITE


def history(tokens: list[int], prompt: int = 1, stop_ids: tuple[int, ...] = (), **params: object) -> History:
    return History(tokens, prompt, SamplingParams(**{"max_tokens": 1000, **params}), list(stop_ids))  # type: ignore[arg-type]


def draws_of(rows: Sequence[History]) -> list[Draw]:
    return [Draw(row, len(row.token_ids)) for row in rows]


def draw(logits: torch.Tensor, *rows: History) -> list[int]:
    found: list[int] = sample(logits.expand(len(rows), -1).contiguous(), draws_of(rows)).tolist()
    return found


def frequencies(logits: torch.Tensor, draws: int = 4000, **params: object) -> torch.Tensor:
    rows = [history([0], **{"temperature": 1.0, **params, "seed": seed}) for seed in range(draws)]  # type: ignore[arg-type]
    counts = torch.bincount(torch.tensor(draw(logits, *rows)), minlength=len(logits))
    return counts / draws


LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))


def test_greedy_takes_the_likeliest() -> None:
    assert draw(LOGITS, history([0])) == [0]


def test_draws_follow_the_distribution() -> None:
    assert torch.allclose(frequencies(LOGITS), LOGITS.exp(), atol=0.03)


def test_temperature_sharpens() -> None:
    assert torch.allclose(frequencies(LOGITS, temperature=0.5), (LOGITS * 2).softmax(0), atol=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_p": 0.69}, 2),
        ({"top_p": 0.71}, 3),
        ({"min_p": 0.3}, 3),
        ({"top_k": 4, "top_p": 0.5}, 2),
    ],
)
def test_filters_leave_the_head_of_the_distribution(params: dict[str, object], kept: int) -> None:
    expected = torch.where(torch.arange(5) < kept, LOGITS.exp(), 0.0)
    assert torch.allclose(frequencies(LOGITS, **params), expected / expected.sum(), atol=0.03)


def test_rows_do_not_disturb_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 400, generator=generator)
    rows = [
        history([1, 2, 3], temperature=1.0, seed=5),
        history([1], temperature=0.0),
        history([4, 4, 9], temperature=0.7, seed=5, top_k=20),
        history([4, 4, 9], temperature=1.3, seed=6, top_p=0.8, repetition_penalty=1.3),
        history([1, 2], temperature=0.9, seed=-1, min_p=0.1),
        history([3, 3, 3], prompt=1, frequency_penalty=1.5),
    ]
    draws = draws_of(rows)
    together = sample(logits.clone(), draws).tolist()
    alone = [int(sample(logits[i : i + 1].clone(), draws[i : i + 1])) for i in range(len(rows))]
    assert together == alone


def test_seed_and_position_make_the_draw() -> None:
    flat = torch.zeros(1000)
    same = draw(flat, *[history([0, 1], temperature=1.0, seed=3)] * 2)
    assert same[0] == same[1]
    others = draw(flat, *[history([0] * n, temperature=1.0, seed=s) for n in (1, 2, 3) for s in (0, 1, 2)])
    assert len(set(others)) == 9


def test_penalties() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0, -0.9])
    assert draw(logits, history([0], repetition_penalty=1.1)) == [1]
    assert draw(-logits.abs(), history([3, 0], repetition_penalty=1.2)) == [2]
    assert draw(logits, history([0], presence_penalty=1.0)) == [0], "the prompt is not penalised"
    assert draw(logits, history([3, 0], presence_penalty=1.0)) == [1]
    assert draw(logits, history([3, 0, 0, 1], frequency_penalty=0.2)) == [1]


def test_stops_are_banned_until_min_tokens_are_out() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert draw(logits, history([5, 1], stop_ids=(0,), min_tokens=2)) == [1]
    assert draw(logits, history([5, 1, 1], stop_ids=(0,), min_tokens=2)) == [0]


def test_a_draw_needs_no_token_that_is_still_on_the_device() -> None:
    """Only how many there are: the history of a sequence that runs ahead ends too early."""
    flat = torch.zeros(1, 1000)
    known = Draw(history([0, 1, 2], temperature=1.0, seed=3), 3)
    ahead = Draw(history([0], temperature=1.0, seed=3), 3)
    assert sample(flat, [known]).tolist() == sample(flat, [ahead]).tolist()


def test_logprobs_are_the_models_own() -> None:
    asked = [
        history([0]),
        history([0], temperature=2.0, seed=1, logprobs=2, top_k=1),
        history([0], logprobs=1),
    ]
    logits = LOGITS.expand(3, -1)
    tokens = sample(logits.contiguous(), draws_of(asked))
    told = logprobs(logits, tokens, draws_of(asked))
    assert told is not None
    nothing, two, one = told.of_all(3)
    assert nothing is None and two is not None and one is not None
    assert two.logprob == pytest.approx(math.log(0.4), abs=1e-5)
    assert two.top_ids == [0, 1]
    assert two.top_logprobs == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-5)
    assert one.top_ids == [0]


def masked(logits: torch.Tensor, allowed: Sequence[int], row: History) -> int:
    bits = np.zeros(32 * -(-len(logits) // 32), dtype=np.uint8)
    bits[list(allowed)] = 1
    mask = np.packbits(bits, bitorder="little").tobytes()
    found: list[int] = sample(logits.unsqueeze(0), [Draw(row, len(row.token_ids), mask)]).tolist()
    return found[0]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3, "top_k": 2}])
def test_a_mask_leaves_what_a_grammar_allows(params: dict[str, object]) -> None:
    for allowed in ([4], [3, 4], [0, 33]):
        logits = torch.linspace(5, 0, 40)
        assert masked(logits, allowed, history([0], **params)) in allowed
    assert masked(LOGITS, [3, 4], history([0])) == 3


def test_a_masked_row_leaves_the_others_alone() -> None:
    rows = [history([0]), history([0])]
    mask = np.packbits(np.array([0] * 4 + [1] + [0] * 27, dtype=np.uint8), bitorder="little").tobytes()
    draws = [Draw(rows[0], 1), Draw(rows[1], 1, mask)]
    assert sample(LOGITS.expand(2, -1).contiguous(), draws).tolist() == [0, 4]


def test_a_grammars_end_comes_before_min_tokens() -> None:
    assert masked(LOGITS, [2], history([0], stop_ids=(2,), min_tokens=5)) == 2


def test_biases_bans_and_allowed_tokens() -> None:
    assert draw(LOGITS, history([0], logit_bias={4: 10.0})) == [4]
    assert draw(LOGITS, history([0], logit_bias={0: -10.0})) == [1]
    assert draw(LOGITS, history([0], allowed_token_ids=(3, 2))) == [2]
    assert draw(LOGITS, history([0], bad_words_ids=((0,), (1,)))) == [2]
    after_three = ((3, 0),)  # never 0 after 3
    assert draw(LOGITS, history([3], bad_words_ids=after_three), history([2], bad_words_ids=after_three)) == [
        1,
        0,
    ]


def test_what_is_not_a_number_gives_no_token_and_its_neighbours_theirs() -> None:
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, torch.nan), LOGITS])
    tokens = torch.tensor([0, 3, 2])
    assert checked(tokens, logits).tolist() == [0, NOT_FINITE, 2]
    assert tokens.tolist() == [0, 3, 2], "the device reads them again"
