"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, and a draw from (seed, position) alone.

The draw is Gumbel-max over noise hashed from seed, position and token id: no state, no order, the same in every batch,
layout and device. Rounding differences between layouts change a token only where two perturbed logits nearly tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.request import SamplingParams, TokenLogprobs

_MASK = (1 << 64) - 1


@dataclass(slots=True)
class History:
    """What a slot remembers of its sequence."""

    token_ids: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    stop_ids: list[int]

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_tokens :]


def sample(logits_RV: Tensor, rows: Sequence[History]) -> tuple[list[int], list[TokenLogprobs | None] | None]:
    """One token for each row of float32 logits; its log-probabilities by the model's own logits, where asked for."""
    raw_RV = logits_RV
    if any(
        r.sampling.has_penalties or len(r.token_ids) - r.prompt_tokens < r.sampling.min_tokens for r in rows
    ):
        logits_RV = logits_RV.clone()
        for row_V, history in zip(logits_RV, rows, strict=True):
            _ban_stops(row_V, history)
            _penalise(row_V, history)
    drawn = [i for i, r in enumerate(rows) if not r.sampling.is_greedy]
    tokens_R = logits_RV.argmax(dim=-1)
    if drawn:
        params = [rows[i].sampling for i in drawn]
        scaled = logits_RV[drawn] / _column([p.temperature for p in params], logits_RV)
        scaled = _filter(scaled, params)
        keys = [_mix(_mix(p.seed or 0) ^ len(rows[i].token_ids)) for p, i in zip(params, drawn, strict=True)]
        tokens_R[drawn] = (scaled + _gumbel(keys, scaled)).argmax(dim=-1)
    token_ids: list[int] = tokens_R.tolist()
    if all(r.sampling.logprobs is None for r in rows):
        return token_ids, None
    return token_ids, [_logprobs(raw_V, t, r) for raw_V, t, r in zip(raw_RV, token_ids, rows, strict=True)]


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _ban_stops(row_V: Tensor, history: History) -> None:
    if len(history.token_ids) - history.prompt_tokens < history.sampling.min_tokens:
        row_V[history.stop_ids] = -torch.inf


def _penalise(row_V: Tensor, history: History) -> None:
    params = history.sampling
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(history.token_ids)), device=row_V.device)
        values = row_V[seen]
        row_V[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if (params.presence_penalty or params.frequency_penalty) and history.output_ids:
        output = torch.tensor(history.output_ids, device=row_V.device)
        ids, counts = torch.unique(output, return_counts=True)
        row_V[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _filter(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """-inf where min-p, top-k or top-p leaves a token out; the likeliest token always stays."""
    if any(p.min_p for p in params):
        floor = _column([p.min_p for p in params], logits_RV).log()
        logits_RV = logits_RV.masked_fill(
            logits_RV < logits_RV.amax(dim=-1, keepdim=True) + floor, -torch.inf
        )
    if not any(p.top_k > 0 or p.top_p < 1 for p in params):
        return logits_RV
    vocab = logits_RV.shape[-1]
    ordered_RV, ids_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    top_k = _column([p.top_k if p.top_k > 0 else vocab for p in params], logits_RV)
    drop = torch.arange(vocab, device=logits_RV.device) >= top_k
    ordered_RV = ordered_RV.masked_fill(drop, -torch.inf)
    probabilities = ordered_RV.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # top_p 1 keeps all: the running sum may round to 1 before the end.
    top_p = _column([p.top_p if p.top_p < 1 else 2.0 for p in params], logits_RV)
    ordered_RV = ordered_RV.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(ordered_RV).scatter_(-1, ids_RV, ordered_RV)


def _mix(x: int) -> int:
    """splitmix64's finaliser (Steele, Lea, Flood 2014), on a Python integer."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _gumbel(keys: Sequence[int], like_RV: Tensor) -> Tensor:
    """Standard Gumbel noise [R, V]: a hash ("lowbias32", C. Wellons) of token id, then of the row's key."""
    low32 = 0xFFFFFFFF
    x = torch.arange(like_RV.shape[-1], device=like_RV.device)
    key = torch.tensor([[k & low32, k >> 32] for k in keys], device=like_RV.device)

    def scramble(x: Tensor) -> Tensor:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & low32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & low32
        return x ^ (x >> 16)

    bits = scramble(scramble(x ^ key[:, :1]) ^ key[:, 1:])
    uniform = (bits.double() + 0.5) / 2**32  # inside (0, 1)
    return (-(-uniform.log()).log()).to(like_RV.dtype)


def _logprobs(logits_V: Tensor, token_id: int, history: History) -> TokenLogprobs | None:
    count = history.sampling.logprobs
    if count is None:
        return None
    values_V = logits_V.log_softmax(dim=-1)
    top = values_V.topk(min(count, len(values_V)))
    return TokenLogprobs(float(values_V[token_id]), top.indices.tolist(), top.values.tolist())
