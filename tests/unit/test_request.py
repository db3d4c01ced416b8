"""Sampling parameters are parsed strictly: a bad value is one line that names the value and the rule."""

from __future__ import annotations

import math

import msgspec
import pytest

from cluster.errors import BadRequest
from orchestrator.request import SamplingParams, check_context, check_tokens


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"temperature": math.nan}, "temperature is nan; it must be a finite number"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"max_tokens": -1}, "max_tokens is -1; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "from 0 to 1"),
        ({"min_tokens": 20, "max_tokens": 10}, "above max_tokens"),
        ({"n": 2}, "greedy gives 2 equal answers"),
        ({"stop": ("",)}, "empty string"),
        ({"logprobs": 50}, "from 0 to 20"),
        ({"repetition_penalty": 0.0}, "must be at least 0.001"),
        ({"temperature": 1e-40}, "temperature is 1e-40; it must be 0, which is greedy, or at least 1e-06"),
        ({"max_tokens": 10**30}, "must be from 1 to 1000000000"),
    ],
)
def test_out_of_range(params: dict[str, object], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        SamplingParams(**params)  # type: ignore[arg-type]


def test_a_request_is_held_against_the_model() -> None:
    def check(ids: list[int], **params: object) -> None:
        check_tokens(ids, SamplingParams(**params), vocab=10, has_tokenizer=False)  # type: ignore[arg-type]

    check([0, 9], stop_token_ids=(5,))
    with pytest.raises(BadRequest, match=r"token id 10 is outside the vocabulary; it must be from 0 to 9"):
        check([0, 10])
    with pytest.raises(BadRequest, match="token id -1 is outside"):
        check([0], stop_token_ids=(-1,))
    with pytest.raises(BadRequest, match="stop strings need a tokenizer"):
        check([0], stop=("x",))


def test_a_prompt_leaves_room_for_an_answer() -> None:
    check_context(9, 10)
    with pytest.raises(BadRequest, match="the prompt has 10 tokens; the context is 10"):
        check_context(10, 10)
    with pytest.raises(BadRequest, match="the prompt has no tokens"):
        check_context(0, 10)


def test_unknown_fields_and_wrong_types_are_errors() -> None:
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        msgspec.convert({"temprature": 1}, SamplingParams)
    with pytest.raises(msgspec.ValidationError, match="max_tokens"):
        msgspec.convert({"max_tokens": "ten"}, SamplingParams)


def test_defaults_are_greedy() -> None:
    assert SamplingParams().is_greedy
    assert not SamplingParams().has_penalties
