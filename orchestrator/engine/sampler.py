"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, and a draw from (seed, position) alone.

The draw is Gumbel-max over noise hashed from seed, position and token id: no state, no order, the same in every batch,
layout and device. Rounding differences between layouts change a token only where two perturbed logits nearly tie.
Nothing here waits for the device: what is sampled stays there until somebody reads it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from orchestrator.engine import ops
from orchestrator.request import SamplingParams, TokenLogprobs
from orchestrator.step import NOT_FINITE

_MASK = (1 << 64) - 1


@dataclass(slots=True)
class History:
    """What a slot remembers of its sequence. Tokens that were sampled ahead of the host may be missing at its end."""

    token_ids: list[int]
    prompt_tokens: int
    sampling: SamplingParams
    stop_ids: list[int]
    plain_from: int = field(init=False)
    """Tokens from which on it wants the likeliest next and nothing else; more than there can be where it wants more."""

    def __post_init__(self) -> None:
        asked = self.sampling
        plain = asked.is_greedy and asked.logprobs is None and not asked.bends_logits
        self.plain_from = self.prompt_tokens + asked.min_tokens if plain else sys.maxsize

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_tokens :]


@dataclass(frozen=True, slots=True)
class Draw:
    """A row of logits to sample from: whose they are, and how many tokens come before the new one."""

    history: History
    length: int
    mask: bytes = b""  # of allowed tokens, a bit each; empty: all

    @property
    def bans_stops(self) -> bool:
        # A grammar that has come to its end allows nothing else.
        is_early = self.length - self.history.prompt_tokens < self.history.sampling.min_tokens
        return is_early and not self.mask


def sample(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """One token for each row: [R], on the logits' device."""
    if any(draw.history.sampling.bends_logits or draw.bans_stops for draw in draws):
        logits_RV = logits_RV.float().clone()
        for row_V, draw in zip(logits_RV, draws, strict=True):
            if draw.bans_stops:
                row_V.index_fill_(0, on_device(row_V, draw.history.stop_ids, torch.int64), -torch.inf)
            _penalise(row_V, draw.history)
            _bend(row_V, draw.history)
    logits_RV = _masked(logits_RV, draws)
    tokens_R = ops.argmax(logits_RV)
    drawn = [i for i, draw in enumerate(draws) if not draw.history.sampling.is_greedy]
    if drawn:
        params = [draws[i].history.sampling for i in drawn]
        rows = on_device(logits_RV, drawn, torch.int64)
        scaled = logits_RV[rows].float()
        scaled = _filter(scaled / _column([p.temperature for p in params], scaled), params)
        keys = [_mix(_mix(p.seed or 0) ^ draws[i].length) for p, i in zip(params, drawn, strict=True)]
        tokens_R[rows] = (scaled + _gumbel(keys, scaled)).argmax(dim=-1)
    return tokens_R


def checked(tokens_R: Tensor, logits_RV: Tensor) -> Tensor:
    """NOT_FINITE where a row's logits are NaN. `logits_RV` may be one rank's columns.

    The first column tells: of whatever overflowed on the way the last norm makes a NaN, and the product spreads that to
    all columns. On the device a token stays one of the vocabulary, which the next step may read already.
    """
    return tokens_R.masked_fill(logits_RV[:, 0].isnan(), NOT_FINITE)


def _masked(logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """-inf where a row's grammar allows no token."""
    rows = [i for i, draw in enumerate(draws) if draw.mask]
    if not rows:
        return logits_RV
    words = np.frombuffer(b"".join(draws[i].mask for i in rows), dtype=np.int32).reshape(len(rows), -1)
    host = torch.from_numpy(words.copy())
    words_RW = (host.pin_memory() if logits_RV.is_cuda else host).to(logits_RV.device, non_blocking=True)
    bits_RV = (words_RW.unsqueeze(2) >> torch.arange(32, device=logits_RV.device)) & 1
    banned_RV = bits_RV.flatten(1)[:, : logits_RV.shape[-1]] == 0
    index = on_device(logits_RV, rows, torch.int64)
    masked = logits_RV[index].masked_fill(banned_RV, -torch.inf)
    return logits_RV.index_copy(0, index, masked)


def on_device(like: Tensor, values: Sequence[int | float], dtype: torch.dtype) -> Tensor:
    """`values` on a tensor's device, without waiting for what it is doing."""
    host = torch.tensor(values, dtype=dtype, pin_memory=like.is_cuda)
    return host.to(like.device, non_blocking=True)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return on_device(like, values, like.dtype).unsqueeze(1)


def _penalise(row_V: Tensor, history: History) -> None:
    params = history.sampling
    if params.repetition_penalty != 1:
        seen = on_device(row_V, sorted(set(history.token_ids)), torch.int64)
        values = row_V[seen]
        row_V[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if (params.presence_penalty or params.frequency_penalty) and history.output_ids:
        counts = Counter(history.output_ids)
        losses = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
        row_V[on_device(row_V, list(counts), torch.int64)] -= on_device(row_V, losses, row_V.dtype)


def _bend(row_V: Tensor, history: History) -> None:
    """What the request says of single tokens: a bias, a ban, or that no others may come."""
    params = history.sampling
    if params.logit_bias:
        ids = on_device(row_V, list(params.logit_bias), torch.int64)
        row_V[ids] += on_device(row_V, list(params.logit_bias.values()), row_V.dtype)
    banned = [word[-1] for word in params.bad_words_ids if _is_next(word, history.token_ids)]
    if banned:
        row_V.index_fill_(0, on_device(row_V, banned, torch.int64), -torch.inf)
    if params.allowed_token_ids is not None:
        ids = on_device(row_V, params.allowed_token_ids, torch.int64)
        allowed = row_V[ids]
        row_V.fill_(-torch.inf)
        row_V[ids] = allowed


def _is_next(word: Sequence[int], token_ids: Sequence[int]) -> bool:
    """Whether all of the word but its last token has just come."""
    start = list(word[:-1])
    return not start or list(token_ids[-len(start) :]) == start


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
    low = on_device(like_RV, [k & low32 for k in keys], torch.int64).unsqueeze(1)
    high = on_device(like_RV, [k >> 32 for k in keys], torch.int64).unsqueeze(1)

    def scramble(x: Tensor) -> Tensor:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & low32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & low32
        return x ^ (x >> 16)

    bits = scramble(scramble(x ^ low) ^ high)
    uniform = (bits.double() + 0.5) / 2**32  # inside (0, 1)
    return (-(-uniform.log()).log()).to(like_RV.dtype)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of the rows that asked for them, by the model's own logits; still on their way to the host."""

    rows: list[int]
    counts: list[int]  # how many of the likeliest each row wants
    own_R: Tensor
    top_RC: Tensor
    top_ids_RC: Tensor

    def of_all(self, rows: int) -> list[TokenLogprobs | None]:
        """By row of the step; None where nothing was asked. The copies must have landed."""
        found: list[TokenLogprobs | None] = [None] * rows
        own, top, ids = self.own_R.tolist(), self.top_RC.tolist(), self.top_ids_RC.tolist()
        for i, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            found[row] = TokenLogprobs(own[i], ids[i][:count], top[i][:count])
        return found


def logprobs(logits_RV: Tensor, tokens_R: Tensor, draws: Sequence[Draw]) -> Logprobs | None:
    asked = [(i, d.history.sampling.logprobs) for i, d in enumerate(draws)]
    rows = [i for i, count in asked if count is not None]
    if not rows:
        return None
    counts = [count for _, count in asked if count is not None]
    index = on_device(logits_RV, rows, torch.int64)
    values_RV = logits_RV[index].float().log_softmax(dim=-1)
    own_R = values_RV.gather(1, tokens_R[index].unsqueeze(1)).squeeze(1)
    top = values_RV.topk(min(max(counts), values_RV.shape[-1]))
    return Logprobs(rows, counts, *(to_host(t) for t in (own_R, top.values, top.indices)))


def to_host(tensor: Tensor) -> Tensor:
    """A copy that is on its way: it may be read once the device has come so far."""
    return tensor.to("cpu", non_blocking=True)
