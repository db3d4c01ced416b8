"""Parts of answers as OpenAI's API tells them: log-probabilities, usage, ids."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from orchestrator.request import Completion, TokenLogprobs
from orchestrator.text import Text

_LEAST = -9999.0  # in place of minus infinity, which JSON has not (vLLM's choice)


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
    }


def usage_of(answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """A prompt counts once, however many answers it has."""
    prompts = sum(choices[0].prompt_tokens for choices in answers)
    return usage(prompts, sum(len(done.token_ids) for choices in answers for done in choices))


def finite(value: float) -> float:
    return max(value, _LEAST)


def chat_logprobs(
    text: Text, token_ids: Sequence[int], told: Sequence[TokenLogprobs], most: int
) -> dict[str, Any]:
    """`most`: how many of the likeliest were asked for."""
    content = []
    for token_id, one in zip(token_ids, told, strict=False):
        top = zip(one.top_ids[:most], one.top_logprobs[:most], strict=True)
        likeliest = [_chat_token(text, other, logprob) for other, logprob in top]
        content.append({**_chat_token(text, token_id, one.logprob), "top_logprobs": likeliest})
    return {"content": content}


def _chat_token(text: Text, token_id: int, logprob: float) -> dict[str, Any]:
    piece = text.piece(token_id)
    return {"token": piece.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(piece)}


def completion_logprobs(
    text: Text | None, token_ids: Sequence[int], told: Sequence[TokenLogprobs], most: int, offset: int
) -> dict[str, Any]:
    """`offset`: characters before the first of these tokens."""

    def name(token_id: int) -> str:
        return text.piece(token_id).decode(errors="replace") if text else f"token_id:{token_id}"

    def likeliest(token_id: int, one: TokenLogprobs) -> dict[str, float]:
        """And the token itself, whether it is one of them or not."""
        top = zip(one.top_ids[:most], one.top_logprobs[:most], strict=True)
        return {name(i): finite(p) for i, p in top} | {name(token_id): finite(one.logprob)}

    tokens = [name(token_id) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(one.logprob) for one in told],
        "top_logprobs": [likeliest(i, one) for i, one in zip(token_ids, told, strict=False)],
        "text_offset": offsets,
    }
