"""Which kernel makes each product on this GPU: cuBLAS's choice, another of its algorithms, or hopper.cu's. By time.

A layer's `ways` say it: for so many rows of x, that kernel. Where they say nothing, cuBLAS chooses.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import triton
from torch import Tensor, nn
from triton.runtime.cache import get_cache_manager

from cluster.files import read_back
from orchestrator.engine.kernels import cublaslt, hopper
from orchestrator.engine.kernels.activation import silu_mul
from orchestrator.engine.kernels.gated import gated_many
from orchestrator.engine.kernels.gemv import MAX_ROWS as GEMV_ROWS
from orchestrator.engine.kernels.overlap import supported
from orchestrator.engine.model import GateUp, Linear
from orchestrator.engine.ops import Way

Product = Callable[[Tensor, Tensor], Tensor]  # of x and a weight

FEW_ROWS = (64, 128, 192, 256)  # one is measured for all down to the one before: steps that are captured
MANY_ROWS = (range(1024, 4096), range(4096, 2**31))  # steps that are not; what is between them goes by cuBLAS
TILES, ALGORITHMS, ALGORITHMS_OF_MANY = 2, 8, 4  # tried in each place
MOST_WEIGHT_BYTES = (
    500e6  # whose tiles are tried: not a head's, which cuBLAS streams as fast as memory allows
)
MOST_PRODUCT_BYTES = 1e9  # beyond, nothing is tried: a head multiplies no more rows than are sampled after
GAIN = 0.99  # what is taken takes at most so much of the time that cuBLAS's choice takes
APART = 0.01
"""Relative L2 distance from cuBLAS's product beyond which one is wrong: both round to bfloat16, which leaves 0.003."""

COLD_BYTES = 150e6  # of weights that are gone through before one comes again: three times an H100's L2
LEAST_CALLS, MOST_CALLS, ROUNDS = 4, 8, 3
HOLD_UP_CYCLES = 1_000_000  # some 0.6 ms, in which the host starts a round

_KEPT_FILE = "products.json"
CUBLAS = "cuBLAS's choice"
FUSED = "Triton's gated"
OTHERS = "cuBLAS's choice, or another where that is faster"


@dataclass(frozen=True, slots=True)
class Choice:
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Kind:
    """Layers that are alike: their weight's shape, and whether SiLU(gate) × up comes behind the product."""

    n: int
    k: int
    gated: bool


@dataclass(frozen=True, slots=True)
class Place:
    """What one measurement is for."""

    rows: range  # of x
    tried_rows: int

    @property
    def is_many(self) -> bool:
        """Bound by arithmetic, not by reading the weights."""
        return self.tried_rows > hopper.MOST_ROWS


def alike(model: nn.Module) -> dict[Kind, list[Linear | GateUp]]:
    """The layers for which there is a choice: none of it adds a bias."""
    found: dict[Kind, list[Linear | GateUp]] = {}
    for layer in model.modules():
        if isinstance(layer, Linear | GateUp) and layer.bias is None:
            kind = Kind(*layer.weight.shape, gated=isinstance(layer, GateUp))
            found.setdefault(kind, []).append(layer)
    return found


def places(step_tokens: int) -> list[Place]:
    """For steps of up to so many tokens."""
    few = [Place(range(a + 1, b + 1), b) for a, b in pairwise((GEMV_ROWS, *FEW_ROWS)) if a < step_tokens]
    many = [Place(rows, min(step_tokens, rows.stop // 2)) for rows in MANY_ROWS if step_tokens >= rows.start]
    return few + many


def tiles_for(
    kind: Kind, place: Place, processors: int, dtype: torch.dtype, *, alone: bool
) -> list[hopper.Tile]:
    """Of hopper.cu, to be compiled."""
    if not hopper.fits(kind.n, kind.k, dtype, gated=kind.gated):
        return []
    if place.is_many:
        return [hopper.MANY] if kind.gated and alone else []
    if 2 * kind.n * kind.k > MOST_WEIGHT_BYTES:
        return []
    return hopper.likeliest(place.tried_rows, kind.n, kind.k, processors, TILES, gated=kind.gated)


def choose(
    model: nn.Module, step_tokens: int, dtype: torch.dtype, device: torch.device, *, alone: bool
) -> Choice:
    """Times what there is for each kind of layer and sets its `ways`, on the stream of the caller.

    `alone`: nothing runs beside a long step's products. Blocks of persistent kernels stay until the end, so one that
    waits for a processor, as beside sums of ranks, would come last and take as long as all others together.
    """
    if torch.cuda.get_device_capability(device)[0] != 9:
        return Choice(CUBLAS, "others were only ever measured on GPUs of compute capability 9.0")
    kinds = alike(model) if dtype in (torch.float16, torch.bfloat16) else {}
    if not kinds:
        return Choice(CUBLAS, f"no layer of {dtype} without bias")
    spots = [
        (kind, place)
        for kind in kinds
        for place in places(step_tokens)
        if 2 * place.tried_rows * kind.n <= MOST_PRODUCT_BYTES
    ]
    try:
        kept = Kept(spots, dtype, device, alone=alone)
        trials = _trials(spots, kinds, kept.decisions, dtype, device, alone=alone)
        decisions = [trial.decide(of_before) for trial, of_before in zip(trials, kept.decisions, strict=True)]
        kept.put(decisions)
        return told(decisions, kept.damaged)
    except (OSError, RuntimeError) as error:  # no NVRTC, a library that lacks a call, a driver that refuses
        for layers in kinds.values():
            for layer in layers:
                layer.ways = ()
        return Choice(CUBLAS, f"others fail: {(str(error).splitlines() or ['?'])[0][:200]}")
    finally:
        torch.cuda.empty_cache()  # the trials' products are larger than what a step leaves


def _trials(
    spots: Sequence[tuple[Kind, Place]],
    kinds: Mapping[Kind, Sequence[Linear | GateUp]],
    kept: Sequence[Decision | None],
    dtype: torch.dtype,
    device: torch.device,
    *,
    alone: bool,
) -> list[Trial]:
    """Where it was decided before, of the tiles only that one is compiled."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = [
        [
            tile
            for tile in tiles_for(kind, place, processors, dtype, alone=alone)
            if of_before is None or of_before.name == _name(tile)
        ]
        for (kind, place), of_before in zip(spots, kept, strict=True)
    ]
    compiled = compile_tiles(list({tile for some in tiles for tile in some}), dtype, device)
    library = cublaslt.Library(device)
    return [
        Trial(
            kind,
            place,
            kinds[kind],
            _offers(kind, place, dtype, library, alone=alone)
            | {_name(tile): compiled[tile] for tile in some},
        )
        for (kind, place), some in zip(spots, tiles, strict=True)
    ]


def compile_tiles(
    tiles: Sequence[hopper.Tile], dtype: torch.dtype, device: torch.device
) -> dict[hopper.Tile, Product]:
    found = hopper.binaries(tiles, dtype)
    return {tile: hopper.Product(tile, binary, device) for tile, binary in found.items()}


def _name(tile: hopper.Tile) -> str:
    return f"hopper.cu {tile}"


def _offers(
    kind: Kind, place: Place, dtype: torch.dtype, library: cublaslt.Library, *, alone: bool
) -> dict[str, Product]:
    most = ALGORITHMS_OF_MANY if place.is_many else ALGORITHMS
    found = library.algorithms(place.tried_rows, kind.n, kind.k, dtype, most)
    offers = {
        f"cuBLASLt's {i}": _joined(product) if kind.gated else product for i, product in enumerate(found)
    }
    if kind.gated and place.is_many and alone and hopper.fits(kind.n, kind.k, dtype, gated=True):
        offers[FUSED] = gated_many
    return offers


def _joined(product: Product) -> Product:
    def both(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        return silu_mul(product(x_MK, weight_NK), pdl=supported(x_MK.device))

    return both


@dataclass(frozen=True, slots=True)
class Decision:
    """Of one kind of layer in one place."""

    name: str
    cublas_s: float
    chosen_s: float


class Kept:
    """What was decided before on such a GPU, with these libraries and kernels: the next start has it at once."""

    def __init__(
        self, spots: Sequence[tuple[Kind, Place]], dtype: torch.dtype, device: torch.device, *, alone: bool
    ) -> None:
        of = torch.cuda.get_device_name(device), torch.__version__, torch.version.cuda, cublaslt.version()
        text = f"{of} {triton.__version__} {dtype} {alone} {hopper.source(hopper.MANY, dtype)} {list(spots)}"
        self._shelf = get_cache_manager(hashlib.sha256(text.encode()).hexdigest())
        path = self._shelf.get_file(_KEPT_FILE)
        found = None if path is None else read_back(Path(path), list[tuple[str, float, float]])
        self.damaged = path is not None and (found is None or len(found) != len(spots))
        self.decisions: list[Decision | None] = [None] * len(spots)
        if found is not None and not self.damaged:
            self.decisions = [Decision(*fields) for fields in found]

    def put(self, decisions: Sequence[Decision]) -> None:
        if list(decisions) != self.decisions:
            self._shelf.put(
                json.dumps([astuple(decision) for decision in decisions]), _KEPT_FILE, binary=False
            )


def fastest(seconds: Mapping[str, float]) -> str:
    """cuBLAS's choice, which another must beat by more than chance, or that other."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < GAIN * seconds[CUBLAS] else CUBLAS


def told(decisions: Sequence[Decision], damaged: bool = False) -> Choice:
    """`damaged`: what was kept of an earlier start could not be read."""
    anew = "; what an earlier start kept was damaged, and is measured anew" if damaged else ""
    others = [decision for decision in decisions if decision.name != CUBLAS]
    if not others:
        return Choice(CUBLAS, f"the fastest in all of {len(decisions)} cases{anew}")
    ours = sum(not decision.name.startswith("cuBLASLt") for decision in others)
    cublas_us = 1e6 * sum(decision.cublas_s for decision in others)
    chosen_us = 1e6 * sum(decision.chosen_s for decision in others)
    which = f"our kernels in {ours} and another algorithm in {len(others) - ours} of {len(decisions)} cases"
    return Choice(OTHERS, f"{which}: one of each takes {chosen_us:.0f} µs, by {CUBLAS} {cublas_us:.0f}{anew}")


@dataclass(frozen=True, slots=True)
class Trial:
    """One kind of layer in one place, over the weights of several layers."""

    kind: Kind
    place: Place
    layers: Sequence[Linear | GateUp]
    offers: Mapping[str, Product]

    @torch.inference_mode()
    def decide(self, of_before: Decision | None) -> Decision:
        """Also adds to the layers' `ways`. What was decided before is taken, if it still gives the product."""
        layers = self._cold_layers()
        weight = layers[0].weight
        x_MK = torch.randn((self.place.tried_rows, self.kind.k), dtype=weight.dtype, device=weight.device)
        if of_before is not None and of_before.name == CUBLAS:
            return of_before
        expected_MN = layers[0].forward(x_MK).float()  # no hooks: no sums with other ranks

        def is_right(product: Product) -> bool:
            got_MN = product(x_MK, weight).float()
            return float((got_MN - expected_MN).norm() / expected_MN.norm()) <= APART  # not where it is nan

        if of_before is not None and of_before.name in self.offers and is_right(self.offers[of_before.name]):
            self._take(of_before.name)
            return of_before
        seconds = {CUBLAS: median_s([_call(layer.forward, x_MK) for layer in layers])}
        for name, product in self.offers.items():
            if is_right(product):
                seconds[name] = median_s([_call(product, x_MK, layer.weight) for layer in layers])
        name = fastest(seconds)
        self._take(name)
        return Decision(name, seconds[CUBLAS], seconds[name])

    def _take(self, name: str) -> None:
        if name != CUBLAS:
            way = Way(self.place.rows, self.offers[name])
            for layer in self.layers:
                layer.ways = (*layer.ways, way)

    def _cold_layers(self) -> list[Linear | GateUp]:
        """One after another, over and over: each weight has left the L2 cache when it comes again."""
        if self.place.is_many:
            return list(self.layers[:1])
        count = max(LEAST_CALLS, min(MOST_CALLS, int(COLD_BYTES / self.layers[0].weight.nbytes) + 1))
        return [self.layers[i % len(self.layers)] for i in range(count)]


def _call(product: Callable[..., Tensor], *arguments: Tensor) -> Callable[[], object]:
    return lambda: product(*arguments)


def median_s(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call, of the GPU alone: it is held up until the host has started all."""
    found: list[float] = []
    calls[0]()
    for _ in range(ROUNDS):
        begin, end = _event(), _event()
        torch.cuda._sleep(HOLD_UP_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(found)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
