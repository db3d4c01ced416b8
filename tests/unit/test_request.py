"""Sampling parameters are parsed strictly: a bad value is one line that names the value and the rule."""

from __future__ import annotations

import math

import msgspec
import pytest

from cluster.errors import BadRequest
from orchestrator.request import SamplingParams


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
        ({"repetition_penalty": 0.0}, "must be above 0"),
    ],
)
def test_out_of_range(params: dict[str, object], says: str) -> None:
    with pytest.raises(BadRequest, match=says):
        SamplingParams(**params)  # type: ignore[arg-type]


def test_unknown_fields_and_wrong_types_are_errors() -> None:
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        msgspec.convert({"temprature": 1}, SamplingParams)
    with pytest.raises(msgspec.ValidationError, match="max_tokens"):
        msgspec.convert({"max_tokens": "ten"}, SamplingParams)


def test_defaults_are_greedy() -> None:
    assert SamplingParams().is_greedy
    assert not SamplingParams().has_penalties
