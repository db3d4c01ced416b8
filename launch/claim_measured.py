"""What was measured of the guides' claims, and what it says of them: pure, the figures are handed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.claim_model import DEPENDS, HOLDS, NEAR, WRONG, off_by

NOT_MEASURED = "not measured"
GRAPHS_CUT, PINNED_GAIN, PRUNING_GAIN, INT8_RISE, ADAPTIVE_GAIN = 0.15, 0.10, 0.20, 0.02, 0.40
LEAST_GAIN = 0.02  # less is noise
CONTINUOUS, RULE = "continuous", "the rule"
MOST_AT_ONCE = 32  # by the rule


def adaptive(queued: int) -> int:
    """The guides' rule: how many of those that wait make the next batch."""
    wanted = MOST_AT_ONCE if queued > 16 else queued // 2 + 8 if queued > 8 else 4
    return min(queued, wanted)


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    claim: str
    measured: str
    verdict: str
    why: str


@dataclass(frozen=True, slots=True)
class Alone:
    """One request at a time."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Product:
    """Of `rows` rows of x with one weight, through the engine's layers."""

    rows: int
    dense_s: float
    zeros_s: float  # 30 % of the weight set to 0, the smallest
    sparse24_s: float | None  # None: the device's kernels refuse, see `refused`
    is_halved: bool = False  # whether 2:4 is read as half of the weights, not as zeros
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Loss:
    """Of a real model in fewer bits."""

    model: str
    text: str
    tokens: int
    rise: Mapping[str, float]  # of perplexity, as a share, by format


@dataclass(frozen=True, slots=True)
class Found:
    """All that was measured; what could not be is None, and `absent` says why, by the part's name."""

    shape: str  # of the model that requests went to
    device: str  # cpu or cuda
    with_graphs: Alone | None = None
    eager: Alone | None = None
    pinned_bytes_per_s: float | None = None
    pageable_bytes_per_s: float | None = None
    products: Sequence[Product] = ()
    weight: str = ""  # whose products these are
    loss: Loss | None = None
    drained: Mapping[str, float] = field(default_factory=dict)  # tokens/s, by how batches are made
    load: str = ""  # that was drained
    absent: Mapping[str, str] = field(default_factory=dict)


PARTS = {"graphs": "A6", "pinned": "A6", "pruning": "A6", "int8": "A6", "adaptive": "C5"}
"""What is measured, and which claim it is of."""


def rows_of(found: Found, parts: Sequence[str]) -> list[Row]:
    return [_ROWS[part](found) for part in parts]


def promised(claimed: float, got: float) -> str:
    """Of a gain that a guide promises and one that was measured, as shares."""
    if got >= claimed / NEAR:
        return HOLDS
    return WRONG if got < LEAST_GAIN else off_by(claimed, got)


def _graphs(found: Found) -> Row:
    said = "CUDA graphs: first token 15 % sooner"
    if found.with_graphs is None or found.eager is None:
        why = found.absent.get("graphs", "a CPU has no CUDA graphs; run this where there is a GPU")
        return Row("A6", said, "–", NOT_MEASURED, why)
    graphed, eager = found.with_graphs, found.eager
    cut, gap = (1 - a / b for a, b in ((graphed.ttft_s, eager.ttft_s), (graphed.tpot_s, eager.tpot_s)))
    measured = (
        f"{found.shape}: first token {_ms(eager.ttft_s)} without, {_ms(graphed.ttft_s)} with ({-cut:+.0%}); "
        f"each next one {_ms(eager.tpot_s)} and {_ms(graphed.tpot_s)} ({-gap:+.0%})"
    )
    why = "a graph saves the host's launches: much where kernels are short, as a token's are; nothing of a long prompt"
    return Row("A6", said, measured, promised(GRAPHS_CUT, cut), why)


def _pinned(found: Found) -> Row:
    said = "pinned memory: 10 % more throughput"
    pinned, pageable = found.pinned_bytes_per_s, found.pageable_bytes_per_s
    if pinned is None or pageable is None:
        why = found.absent.get("pinned", "a CPU copies nothing to a device; run this where there is a GPU")
        return Row("A6", said, "–", NOT_MEASURED, why)
    gain = pinned / pageable - 1
    measured = f"host to device {pinned / 1e9:.1f} GB/s pinned, {pageable / 1e9:.1f} pageable ({gain:+.0%})"
    why = (
        "all of it is had where weights are streamed at every step (+offload, always pinned); where the model fits, a "
        "step copies some kilobytes, and nothing of it shows"
    )
    return Row("A6", said, measured, DEPENDS if gain >= PINNED_GAIN / NEAR else WRONG, why)


def _pruning(found: Found) -> Row:
    said = "pruning 30 %: 20 % faster"
    if not found.products:
        why = found.absent.get("pruning", "no product was timed")
        return Row("A6", said, "–", NOT_MEASURED, why)
    told, gains = [], []
    for product in found.products:
        zeros = product.dense_s / product.zeros_s - 1
        words = f"{_rows(product.rows)} {_us(product.dense_s)} dense, {zeros:+.0%} with 30 % zeros"
        if product.sparse24_s is not None:
            gain = product.dense_s / product.sparse24_s - 1
            gains += [gain] if product.is_halved else []  # else the same bytes: noise
            words += f", {gain:+.0%} at 2:4"
        told.append(words)
    zeros_gain = min(product.dense_s / product.zeros_s - 1 for product in found.products)
    best = max(gains, default=0.0)
    verdict = promised(PRUNING_GAIN, zeros_gain)
    if verdict != HOLDS and best >= PRUNING_GAIN / NEAR:
        verdict = DEPENDS
    return Row("A6", said, f"{found.weight}: {'; '.join(told)}", verdict, _why_pruning(found))


def _why_pruning(found: Found) -> str:
    why = "zeros are bytes like any others"
    last = found.products[-1]
    if last.refused:
        why += f"; 2:4 does not run here: {last.refused}"
    elif last.is_halved:
        why += "; 2:4 (half of the weights gone, not 30 %) has kernels that read fewer"
    else:
        why += "; for 2:4 there are kernels on GPUs alone, here its zeros are kept"
    if found.loss is not None and "sparse24" in found.loss.rise:
        loss = found.loss
        why += f", and it costs {loss.model} {loss.rise['sparse24']:+,.0%} perplexity"
    return why


def _int8(found: Found) -> Row:
    said = "INT8: less than 2 % lost"
    loss = found.loss
    if loss is None:
        return Row("A6", said, "–", NOT_MEASURED, found.absent.get("int8", "no model with weights is here"))
    rise = loss.rise["int8"]
    measured = f"{loss.model}: perplexity {rise:+.2%} on {loss.tokens:,} tokens of {loss.text}"
    verdict = HOLDS if rise < INT8_RISE else off_by(INT8_RISE, rise)
    return Row(
        "A6",
        said,
        measured,
        verdict,
        "a scale for each output channel; `shardwise quality` tells it of any model",
    )


def _adaptive(found: Found) -> Row:
    said = "adaptive batch size (queue > 16: up to 32; > 8: half + 8; else 4): 40 % more throughput"
    rates = found.drained
    if RULE not in rates:
        return Row("C5", said, "–", NOT_MEASURED, found.absent.get("adaptive", "no batch was run"))
    fixed = {how: rate for how, rate in rates.items() if how not in (RULE, CONTINUOUS)}
    gains = {how: rates[RULE] / rate - 1 for how, rate in fixed.items()}
    measured = f"{found.shape}, {found.load}: the rule {rates[RULE]:,.0f} tok/s; " + "; ".join(
        f"{how} {rates[how]:,.0f} ({gain:+.0%})" for how, gain in gains.items()
    )
    why = "the gain is that over the batch which it replaces"
    if CONTINUOUS in rates:
        over = rates[CONTINUOUS] / rates[RULE] - 1
        measured += f"; continuous batching {rates[CONTINUOUS]:,.0f}"
        why += f"; continuous batching, which fills a place as soon as it is free, is {over:+.0%} beside the rule"
    verdicts = {promised(ADAPTIVE_GAIN, gain) for gain in gains.values()}
    return Row("C5", said, measured, verdicts.pop() if len(verdicts) == 1 else DEPENDS, why)


_ROWS = {"graphs": _graphs, "pinned": _pinned, "pruning": _pruning, "int8": _int8, "adaptive": _adaptive}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs"


def _rows(rows: int) -> str:
    return "one row" if rows == 1 else f"{rows} rows"
