"""What is asked and what comes back. Frozen; parsed strictly, once, at the edge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import StrEnum

import msgspec

from cluster.errors import BadRequest


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to pick tokens; names and meanings are vLLM's. Greedy by default: an HTTP edge sets OpenAI's 1.0 itself."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True  # in text
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None  # token id -> what its logit gains
    allowed_token_ids: tuple[int, ...] | None = None  # no others
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that never come
    logprobs: int | None = None  # top log-probabilities beside each token's own
    n: int = 1

    def __post_init__(self) -> None:
        for name in _FLOATS:
            value = getattr(self, name)
            if not math.isfinite(value):
                raise BadRequest(f"{name} is {value}; it must be a finite number")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                rule = f"at least {low}" if value < low else f"from {low} to {high}"
                raise BadRequest(f"{name} is {value}; it must be {rule}")
        if self.top_p == 0:
            raise BadRequest("top_p is 0; it must be above 0 and at most 1")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            rule = f"0, which is greedy, or at least {LEAST_TEMPERATURE:g}"
            raise BadRequest(f"temperature is {self.temperature:g}; it must be {rule}")
        if self.min_tokens > self.max_tokens:
            raise BadRequest(f"min_tokens is {self.min_tokens}, above max_tokens, {self.max_tokens}")
        if self.temperature == 0 and self.n > 1:
            raise BadRequest(f"n is {self.n} at temperature 0: greedy gives {self.n} equal answers; use n=1")
        for token_id, bias in (self.logit_bias or {}).items():
            if not -_MOST_BIAS <= bias <= _MOST_BIAS:  # nan too
                raise BadRequest(f"logit_bias of {token_id} is {bias}; it must be from -100 to 100")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise BadRequest("allowed_token_ids is empty, which allows nothing; drop it")
        if () in self.bad_words_ids:
            raise BadRequest("bad_words holds an empty one; drop it")
        if "" in self.stop:
            raise BadRequest("stop holds an empty string, which would stop every answer at once; drop it")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def bends_logits(self) -> bool:
        """Whether the model's own logits are changed before a token is picked."""
        return (
            self.has_penalties
            or bool(self.logit_bias)
            or self.allowed_token_ids is not None
            or bool(self.bad_words_ids)
        )

    @property
    def needs_past(self) -> bool:
        """Whether what it samples depends on which tokens came before, not only on the model."""
        return self.has_penalties or any(len(word) > 1 for word in self.bad_words_ids)

    @property
    def named_ids(self) -> Iterator[int]:
        """All token ids that it speaks of."""
        yield from self.stop_token_ids
        yield from self.logit_bias or ()
        yield from self.allowed_token_ids or ()
        for word in self.bad_words_ids:
            yield from word


LEAST_TEMPERATURE = 1e-6  # logits over less may pass what float32 holds
_MOST_BIAS = 100.0  # OpenAI's
_MOST_TOKENS = 10**9  # of any length that a message between ranks carries

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_RANGES: Sequence[tuple[str, float, float]] = (
    ("max_tokens", 1, _MOST_TOKENS),
    ("min_tokens", 0, _MOST_TOKENS),
    ("temperature", 0, 1_000_000),
    ("top_k", -1, _MOST_TOKENS),
    ("top_p", 0, 1),
    ("min_p", 0, 1),
    ("repetition_penalty", 0.001, 1000),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, 20),
    ("n", 1, 128),
)


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"  # xgrammar's, which is llama.cpp's GBNF


class Grammar(msgspec.Struct, frozen=True):
    """What an answer's text must be, character by character."""

    kind: GrammarKind
    source: str


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. `n` answers are n requests, made by the coordinator."""

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop_ids: frozenset[int] = (
        frozenset()
    )  # the model's eos ids (unless ignored) and the request's stop tokens
    grammar: Grammar | None = None
    output_token_ids: list[int] = []
    """Of its answer, where another replica has begun it: this one goes on, as after a preemption."""


def check_tokens(
    prompt_token_ids: Sequence[int], sampling: SamplingParams, *, vocab: int, has_tokenizer: bool
) -> None:
    """Raises BadRequest where the model has no such tokens, or no text to find stop strings in."""
    for named in (prompt_token_ids, list(sampling.named_ids)):
        if named and not (min(named) >= 0 and max(named) < vocab):
            outside = next(token_id for token_id in named if not 0 <= token_id < vocab)
            raise BadRequest(
                f"token id {outside} is outside the vocabulary; it must be from 0 to {vocab - 1}"
            )
    if sampling.stop and not has_tokenizer:
        raise BadRequest("stop strings need a tokenizer, and this model has none; use stop_token_ids")


def check_context(prompt_tokens: int, context: int) -> None:
    """Raises BadRequest where a prompt leaves no room for an answer, or has nothing to answer."""
    if not prompt_tokens:
        raise BadRequest("the prompt has no tokens; it needs at least one")
    if prompt_tokens >= context:
        raise BadRequest(
            f"the prompt has {prompt_tokens} tokens; the context is {context} and must hold at least one more. "
            "Shorten it or raise --max-model-len"
        )


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token, as a replica streams it."""

    request_id: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One finished answer."""

    request_id: str
    prompt_tokens: int
    token_ids: list[int]
    finish_reason: FinishReason
    text: str | None = None  # None where the model has no tokenizer
    logprobs: list[TokenLogprobs] | None = None
    ttft_s: float = 0.0  # from admission to the first token
    latency_s: float = 0.0  # from admission to the last token
