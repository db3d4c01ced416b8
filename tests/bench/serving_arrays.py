"""The cost model's serving rows as arrays: all rows priced at once, so that a fit takes seconds where it took hours.

A second writing of cost_ops.py, cost_steps.py and steady.py for what serving rows have: one stage, like ranks, no
profile, nothing offloaded. fit_engines.py compares it with the model itself on every row before it fits anything, and
again with what it fitted. Times in seconds; shapes: R rows, [R, P] products of a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.measured import Case
from strategies import cost_links, cost_ops, steady
from strategies.cost_links import ByIdentity
from strategies.cost_memory import Memory
from strategies.engines import Engine
from strategies.formats import Width
from strategies.spec import BYTES_PER_ELEMENT

WIDTHS = (16, 8, 4)
Array = np.ndarray
Values = Mapping[str, Array | float]


@dataclass(frozen=True)
class Sums:
    """All-reduces of groups of devices, one group a row; times is 0 where there is none."""

    times: Array
    ranks: Array
    latency: Array
    ring: Array  # bytes/s
    one_shot: Array
    link: Array  # bytes/s

    @classmethod
    def of(cls, groups: Sequence[tuple[Case, tuple[int, ...], int]]) -> Sums:
        found = []
        for case, group, times in groups:
            link = cost_links.slowest_link(ByIdentity(case.placement.topology), group)
            n = len(group)
            if link is None or not times:
                found.append((0, 1, 0.0, 1.0, 0.0, 1.0))
                continue
            assert link.one_shot_s is not None
            latency, ring = cost_links.all_reduce_latency_s(link, n), cost_links._ring_rate(link, n)
            found.append((times, n, latency, ring, link.one_shot_s, link.bytes_per_s))
        return cls(*np.array(found, dtype=float).T)

    def seconds(self, n_bytes: Array) -> Array:
        moved = 2 * (self.ranks - 1) / self.ranks * n_bytes
        ring = self.latency + moved / self.ring
        one = self.one_shot + (self.ranks - 1) * n_bytes / self.link
        two = cost_links._TWO_PHASES * self.one_shot + moved / self.link
        return self.times * np.minimum(np.minimum(one, two), ring)


class Rows:
    """Measured rows, understood: all that does not depend on an engine's constants."""

    def __init__(self, cases: Sequence[Case], needs: Sequence[Sequence[Memory]]) -> None:
        self.facts = {k: np.array(v, dtype=float) for k, v in _columns(cases, needs).items()}
        self.engines = np.array([c.placement.engine.name for c in cases])
        self.devices = np.array([c.placement.device(0, 0).name for c in cases])
        self.width = np.array([WIDTHS.index(c.placement.format.width) for c in cases])
        ranks = [_products(c) for c in cases]
        most = max(len(one) for one in ranks)
        padded = [[*one, *[(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)] * (most - len(one))] for one in ranks]
        table = np.array(padded, dtype=float).transpose(2, 0, 1)
        self.n, self.k, self.times, self.weight_bytes, self.flops = table[:5]
        self.of_width, self.widened = table[5].astype(int), table[6] > 0
        groups = []
        crossing = []
        for c in cases:
            p = c.placement
            tp, spec = p.dims.tp, p.spec
            mixtures = spec.layers - spec.dense_layers
            crosses = spec.experts is not None and p.dims.expert_ranks > tp
            every = tuple(i for replica in range(p.dims.dp) for i in p.stage(replica, 0))
            sums = 2 * spec.layers + 1 - (mixtures if crosses else 0)
            groups.append((c, p.stage(0, 0), sums if tp > 1 else 0))
            crossing.append((c, every, 2 * mixtures if crosses else 0))
        self.sums, self.crossing = Sums.of(groups), Sums.of(crossing)

    def __len__(self) -> int:
        return len(self.engines)

    def some(self, which: Array) -> Rows:
        """The rows of a mask or of indices."""
        made = object.__new__(Rows)
        for name, value in vars(self).items():
            if isinstance(value, dict):
                own: Any = {key: column[which] for key, column in value.items()}
            elif isinstance(value, Sums):
                own = Sums(*(column[which] for column in vars(value).values()))
            else:
                own = value[which]
            setattr(made, name, own)
        return made


def _products(case: Case) -> list[tuple[float, ...]]:
    p = case.placement
    device = p.device(0, 0)
    compute = cost_ops.compute_dtype(p.format, p.dtype, device)
    return [
        (
            one.n,
            one.k,
            one.times,
            one.weight_bytes,
            device.flops_per_s[one.compute],
            WIDTHS.index(one.width),
            one.width is not Width.FULL and one.compute in BYTES_PER_ELEMENT,
        )
        for one in cost_ops.products(p.spec, p.shards[0], p.dims, p.format, p.dtype, compute)
    ]


def _columns(cases: Sequence[Case], needs: Sequence[Sequence[Memory]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for case, need in zip(cases, needs, strict=True):
        p, load = case.placement, case.workload
        spec, shard, dims, device = p.spec, p.shards[0], p.dims, p.device(0, 0)
        latent, e = spec.latent, spec.experts
        windows = [w for w in spec.windows if w]
        if dims.pp > 1 or len(set(windows)) > 1 or device.layer_overhead_s or device.step_overhead_s:
            raise ValueError(f"{spec.name} {dims.name} on {device.name}: not among what arrays price")
        compute = cost_ops.compute_dtype(p.format, p.dtype, device)
        row: dict[str, float] = {
            "bandwidth": device.bandwidth_bytes_per_s,
            "flops": device.flops_per_s[p.dtype],
            "kv_size": p.format.bytes_per_kv(p.dtype),
            "layers": len(shard.layers),
            "heads": len(shard.heads),
            "kv_heads": len(shard.kv_heads),
            "head_dim": spec.head_dim,
            "hidden": spec.hidden,
            "vocab": spec.vocab,
            "own_vocab": len(shard.vocab),
            "latent": latent is not None,
            "cached": latent.cached if latent else 0,
            "latent_pair": 2 * latent.kv_rank + latent.rope_dim if latent else 0,
            "prompt_pair": (
                2 * (latent.nope_dim + latent.rope_dim + latent.v_dim) if latent else 4 * spec.head_dim
            ),
            "windowed": len(windows) / len(spec.windows) if windows else 0.0,
            "window": windows[0] if windows else 0,
            "mixtures": spec.layers - spec.dense_layers,
            "experts": e.count if e else 1,
            "per_token": e.per_token if e else 1,
            "expert_params": 3 * spec.hidden * e.intermediate if e else 0,
            "expert_bytes": p.format.bytes_per_weight(p.dtype),
            "expert_flops": device.flops_per_s[compute],
            "expert_ranks": dims.expert_ranks,
            "together": dims.dp if dims.expert_ranks > dims.tp else 1,
            "ep": dims.ep,
            "weight_only": p.format.compute is None,
            "small": p.format.width is not Width.FULL,
            "tp": dims.tp,
            "dp": dims.dp,
            "prompt": load.prompt_tokens,
            "output": load.output_tokens,
            "at_once": load.concurrency,
            "kv_tokens": min(one.kv_tokens for one in need),
            "chunk": p.engine.chunk_tokens,
            "most": p.engine.max_sequences,
        }
        for key, value in row.items():
            found.setdefault(key, []).append(float(value))
    return found


def predict(rows: Rows, engines: Mapping[str, Engine]) -> Array:
    """[R, 2]: seconds a token, and until the first."""
    return _Priced(rows, engines).served()


class _Priced:
    """Rows with their engines' constants."""

    def __init__(self, rows: Rows, engines: Mapping[str, Engine]) -> None:
        self.r, self.f = rows, rows.facts
        names, which = np.unique(rows.engines, return_inverse=True)
        chosen = [engines[str(name)] for name in names]
        self.kernels = chosen[0].kernels
        one = {key: float(getattr(chosen[0], key)) for key in _NUMBERS}
        self.e = {key: np.array([float(getattr(e, key)) for e in chosen])[which] for key in one}
        known, device = np.unique(rows.devices, return_inverse=True)
        self.gaps_on = np.array([self.kernels.gaps_on.get(str(d), 1.0) for d in known])[device]
        waits = [[e.ungraphed_s.get(str(d), 0.0) for d in known] for e in chosen]
        self.ungraphed = np.array(waits)[which, device]

    def shares(self, name: str) -> Array:
        by_width = getattr(self.kernels, name)
        return np.minimum(cost_ops.MOST, np.array([by_width[width] for width in WIDTHS]))

    def stage(self, decodes: Array, prompts: Array | None = None) -> Array:
        """Seconds of a pass; `prompts`: tokens of prompts in it."""
        f, k, e = self.f, self.kernels, self.e
        joining = np.zeros_like(decodes) if prompts is None else prompts
        tokens, ending = decodes + joining, joining / f["prompt"]
        share = joining / tokens
        logits = decodes + ending
        slower = 1 + (e["prompts"] - 1) * share
        seconds = (self.r.times * self._products_s(tokens, slower)).sum(1)
        seconds = seconds + self._head_s(logits)
        gaps = self.r.times.sum(1) + 1
        seconds = seconds + gaps * k.product_gap_s * e["launches"] * self.gaps_on
        gap = k.attention_gap_s * e["launches"] + f["latent"] * k.latent_gap_s
        seconds = seconds + f["layers"] * gap * self.gaps_on
        seconds = seconds + self._experts_s(tokens)
        moved = f["layers"] * k.residual_passes * 4 * tokens * f["hidden"]
        moved = moved + k.sampling_passes * logits * f["vocab"] * 4
        seconds = seconds + moved / f["bandwidth"] + self._attention_s(decodes, joining)
        hidden = tokens * f["hidden"] * 2
        sums, crossing = self.r.sums, self.r.crossing
        seconds = seconds + k.all_reduce * sums.seconds(hidden)
        gathered = logits * 8 * f["tp"]
        gather = sums.latency + (sums.ranks - 1) / sums.ranks * gathered / sums.link
        seconds = seconds + np.where(sums.times > 0, gather, 0.0)
        return seconds + k.exchange * k.all_reduce * crossing.seconds(hidden * f["dp"])

    def _products_s(self, tokens: Array, slower: Array) -> Array:
        r, f, rows = self.r, self.f, tokens[:, None]
        n_bytes = r.n * r.k * r.weight_bytes + 2 * rows * (r.n + r.k)
        reads = np.minimum(cost_ops.MOST, self.shares("weights")[r.of_width] * self.e["reads"][:, None])
        of = np.array([self.kernels.compute[width] for width in WIDTHS])
        share = np.where(r.widened, of[0] * cost_ops.WIDENED, of[r.of_width]) / slower[:, None]
        flops = 2 * np.maximum(rows, cost_ops.LEAST_ROWS) * r.n * r.k
        computed = flops / (r.flops * np.minimum(cost_ops.MOST, share))
        return _joined(n_bytes / (f["bandwidth"][:, None] * reads), computed)

    def _head_s(self, logits: Array) -> Array:
        f, n = self.f, self.f["own_vocab"]
        n_bytes = 2 * n * f["hidden"] + 2 * logits * (n + f["hidden"])
        read = n_bytes / (
            f["bandwidth"] * np.minimum(cost_ops.MOST, self.shares("weights")[0] * self.e["reads"])
        )
        flops = 2 * np.maximum(logits, cost_ops.LEAST_ROWS) * n * f["hidden"]
        return _joined(read, flops / (f["flops"] * self.shares("compute")[0]))

    def _experts_s(self, tokens: Array) -> Array:
        f, k, width = self.f, self.kernels, self.r.width
        everyone = tokens * f["together"]
        hit = f["experts"] * (1 - (1 - f["per_token"] / f["experts"]) ** everyone)
        own = hit / f["expert_ranks"]
        n_bytes = own * f["expert_params"] * f["expert_bytes"]
        read = n_bytes / (f["bandwidth"] * self.shares("expert_weights")[width])
        tile = np.where(f["weight_only"] > 0, float(cost_ops.WEIGHT_ONLY_TILE), k.expert_tile)
        each = everyone * f["per_token"] / np.maximum(hit, 1e-9)
        of = self.shares("expert_compute")
        widened = (f["weight_only"] > 0) & (f["small"] > 0)
        share = np.where(widened, k.expert_compute[Width.FULL] * cost_ops.WIDENED, of[width])
        flops = own * 2 * f["expert_params"] * np.maximum(each, tile)
        work = _joined(read, flops / (f["expert_flops"] * share)) * self.e["experts"]
        moved = 3 * everyone * f["per_token"] / f["ep"] * f["hidden"] * 2 / f["bandwidth"]
        gap = k.experts_gap_s * self.e["launches"] * self.gaps_on
        return f["mixtures"] * (work + moved + gap)

    def _attention_s(self, decodes: Array, joining: Array) -> Array:
        f, k = self.f, self.kernels
        seen = self._seen(f["prompt"] + f["output"] / 2) * decodes * f["layers"]
        rate = f["bandwidth"] * min(cost_ops.MOST, k.kv)
        plain = seen * 2 * f["kv_heads"] * f["head_dim"] * f["kv_size"] / rate
        computed = 2 * seen * f["heads"] * f["latent_pair"] / (f["flops"] * cost_ops.LATENT_COMPUTE)
        latent = np.maximum(seen * f["cached"] * f["kv_size"] / rate, computed) * k.latent
        pairs = self._seen(f["prompt"] / 2) * joining * f["layers"] * f["heads"] * f["prompt_pair"]
        prompts = pairs * self.e["prompts"] / (f["flops"] * min(cost_ops.MOST, k.prompt_attention))
        return np.where(f["latent"] > 0, latent, plain) + prompts

    def _seen(self, context: Array) -> Array:
        share = self.f["windowed"]
        return (1 - share) * context + share * np.minimum(context, self.f["window"])

    def served(self) -> Array:
        """As steady.steady."""
        f, e = self.f, self.e
        offered = np.maximum(1.0, f["at_once"] / f["dp"])
        room = f["kv_tokens"] / (f["prompt"] + f["output"] / 2)
        most = np.maximum(1.0, np.minimum(np.minimum(offered, room), f["most"]))
        life, first, step = self._life(most)
        front = e["token_out_s"] * f["output"] * f["dp"]
        live = most
        ready = np.zeros(len(most), dtype=bool)
        for _ in range(steady._FRONT_ROUNDS):
            ready = ready | ((live * front <= life) & (live == most))
            if ready.all():
                break
            fewer = np.minimum(most, np.maximum(1.0, live * (life / (live * front)) ** 0.7))
            live = np.where(ready, live, fewer)
            life, first, step = (
                np.where(ready, a, b) for a, b in zip((life, first, step), self._life(live), strict=True)
            )
        whole = np.maximum(life, live * front) * offered / live
        token = np.where(f["output"] > 1, (life - first) / np.maximum(f["output"] - 1, 1), step)
        return np.stack([token, first + whole - life + e["first_s"]], axis=1)

    def _life(self, live: Array) -> tuple[Array, Array, Array]:
        f, e = self.f, self.e
        tokens = np.maximum(np.minimum(f["prompt"], f["chunk"]), live * f["prompt"] / f["output"])
        tokens = np.minimum(tokens, f["chunk"])
        chunks = f["prompt"] / tokens
        decoding = live
        for _ in range(steady._ROUNDS):
            alone = self.stage(decoding)
            host = e["step_s"] + e["sequence_s"] * decoding + np.where(decoding > 1, self.ungraphed, 0.0)
            step = alone + host
            joined = np.maximum(self.stage(decoding, tokens), f["layers"] * e["eager_layer_s"])
            prompt = chunks * (joined - alone) + e["prompt_s"] * np.minimum(1.0, chunks)
            life = live * prompt + f["output"] * step
            busy = np.minimum(steady._MOST_BUSY, live * prompt / life)
            ahead = np.minimum(live - 1, e["burst"] * busy / (1 - busy))
            own = prompt + step + ahead * prompt
            first = np.minimum(own, steady._MOST_FIRST * life)
            decoding = np.maximum(1.0, live * (1 - first / life))
        return life, first, step


_NUMBERS = ("reads", "launches", "prompts", "experts", "step_s", "sequence_s", "prompt_s", "first_s")
_NUMBERS += ("token_out_s", "burst", "eager_layer_s")


def _joined(read: Array, computed: Array) -> Array:
    most = np.maximum(np.maximum(read, computed), 1e-30)
    return most * (1 + (np.minimum(read, computed) / most) ** cost_ops.ROUNDING) ** (1 / cost_ops.ROUNDING)
