"""`shardwise advise`: machines of the catalogue, bought or rented, by what a million tokens cost at a load."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from cluster import catalog
from cluster.catalog import Sheet
from cluster.errors import BadRequest, NoFeasiblePlan
from cluster.topology import Topology
from launch.models import spec_of
from launch.plan import choose_dtype
from launch.progress import Progress
from strategies.cost import estimate
from strategies.formats import FORMATS, PLAIN
from strategies.money import Cost, Prices, break_even_days, owned, rented
from strategies.place import place, rejection
from strategies.plan import Estimate, Layout, Placement
from strategies.planner import enumerate_layouts
from strategies.runnable import lacking, why_not
from strategies.spec import ModelSpec, Workload

_CARDS = (1, 2, 4, 8)
_FULL = 0.8  # of its saturated rate that a machine is loaded to, for requests to wait little
_SATURATED = 256  # requests in flight for each replica
_ROWS = 14
_FORMATS = (
    "",
    "fp8",
    "int8",
    "int4",
)  # the first that fits and is the cheapest; later ones where the earlier do not fit


@dataclass(frozen=True, slots=True)
class Offer:
    """One kind of machine, carrying the load."""

    device: str
    cards: int
    machines: int
    layout: str
    how: str  # own or rent
    usd_per_million_tokens: float  # of output, at the load asked for
    usd_per_million_tokens_saturated: float
    usd_per_month: float
    purchase_usd: float
    output_tokens_per_s: float  # one machine, saturated
    ttft_ms: float  # at the load asked for
    tpot_ms: float
    break_even: str | None  # date, for a purchase beside an API's price
    planned_only: str | None


_MOST_REQUESTS = 1e12  # a day: a hundred for everybody alive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a directory, a .gguf file, a built-in name, or smollm2"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--requests-per-day", type=float, required=True, metavar="N")
    load.add_argument("--prompt-tokens", type=int, default=1024, metavar="N", help="of each request (1024)")
    load.add_argument("--output-tokens", type=int, default=256, metavar="N", help="of each request (256)")
    load.add_argument(
        "--peak", type=float, default=3.0, metavar="X", help="the busiest hour over the mean (3)"
    )
    default = Prices()
    money = parser.add_argument_group("prices, US dollars; defaults of November 2026 or from the catalogue")
    money.add_argument("--budget", type=float, metavar="USD", help="the most to spend in --years, all in")
    money.add_argument(
        "--years", type=float, default=default.years, help=f"of depreciation ({default.years:g})"
    )
    money.add_argument(
        "--usd-per-kwh", type=float, default=default.usd_per_kwh, help=f"({default.usd_per_kwh})"
    )
    money.add_argument(
        "--pue", type=float, default=default.pue, help=f"room's power over machine's ({default.pue})"
    )
    money.add_argument(
        "--maintenance",
        type=float,
        default=default.maintenance,
        help=f"of the purchase, a year ({default.maintenance})",
    )
    money.add_argument(
        "--host-usd",
        type=float,
        default=default.host_usd,
        help=f"machine without its cards ({default.host_usd:g})",
    )
    money.add_argument(
        "--api-usd-per-mtok", type=float, metavar="USD", help="an API's price of a million output tokens"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    prices = _prices(args)
    spec = spec_of(args.model)
    workload = Workload(args.prompt_tokens, args.output_tokens, steady=True)
    per_s = args.requests_per_day / 86400
    Progress().say(f"pricing {spec.name} on the catalogue's cards, up to {max(_CARDS)} of each")
    made = offers(spec, workload, per_s, args.peak, prices, args.budget)
    if not made:
        raise NoFeasiblePlan(_nothing(spec, args.budget))
    if args.json:
        asked = {"model": spec.name, "requests_per_day": args.requests_per_day, "prices": asdict(prices)}
        print(json.dumps({**asked, "offers": [asdict(offer) for offer in made]}, indent=2))
    else:
        show(spec, made, per_s, workload, prices)
    return 0


def _prices(args: argparse.Namespace) -> Prices:
    """Raises BadRequest."""
    for flag in ("requests_per_day", "prompt_tokens", "output_tokens", "peak", "years", "pue"):
        if not (math.isfinite(getattr(args, flag)) and getattr(args, flag) > 0):
            raise BadRequest(f"--{flag.replace('_', '-')} is {getattr(args, flag):g}; it must be above 0")
    for flag in ("usd_per_kwh", "maintenance", "host_usd", "budget", "api_usd_per_mtok"):
        value = getattr(args, flag)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BadRequest(f"--{flag.replace('_', '-')} is {value:g}; it must be at least 0")
    if args.requests_per_day > _MOST_REQUESTS:
        raise BadRequest(
            f"--requests-per-day is {args.requests_per_day:g}; it must be at most {_MOST_REQUESTS:g}"
        )
    if args.peak < 1:
        raise BadRequest(f"--peak is {args.peak:g}; the busiest hour is at least the mean, 1")
    return Prices(
        usd_per_kwh=args.usd_per_kwh,
        pue=args.pue,
        maintenance=args.maintenance,
        years=args.years,
        host_usd=args.host_usd,
        api_usd_per_million=args.api_usd_per_mtok,
    )


def _nothing(spec: ModelSpec, budget: float | None) -> str:
    within = "" if budget is None else f" within ${budget:,.0f}"
    return (
        f"no machine of the catalogue, up to {max(_CARDS)} cards, serves {spec.name}{within}; raise --budget, "
        "or ask for less"
    )


def offers(
    spec: ModelSpec,
    workload: Workload,
    requests_per_s: float,
    peak: float,
    prices: Prices,
    budget: float | None,
) -> list[Offer]:
    """Cheapest first, by the token at the load asked for."""
    found = []
    for sheet in catalog.sheets().values():
        if sheet.kind != "cuda" or (sheet.price_usd is None and sheet.rent_usd_per_hour is None):
            continue
        for cards in _CARDS:
            best = _best(spec, sheet, cards, workload)
            if best is not None:
                found += list(_priced(sheet, cards, *best, workload, requests_per_s, peak, prices))
    hours = prices.years * 24 * 365
    afford = [o for o in found if budget is None or o.usd_per_month * 12 / 8760 * hours <= budget]
    return sorted(afford, key=lambda o: (o.usd_per_million_tokens, o.device, o.cards))


def _best(spec: ModelSpec, sheet: Sheet, cards: int, workload: Workload) -> tuple[Placement, Estimate] | None:
    """The layout over all cards with most tokens a second, in the first format that fits at all."""
    machine = Topology(
        sheet.key,
        tuple(sheet.device(i) for i in range(cards)),
        catalog.prior_links([(sheet, "node0")] * cards),
    )
    dtype = choose_dtype("auto", spec, machine)
    for name in _FORMATS:
        kept = FORMATS[name] if name else PLAIN
        if kept.compute is not None and kept.compute not in sheet.flops_per_s:
            continue
        put = [
            place(spec, Layout(dims, kept), dtype, machine)
            for dims in enumerate_layouts(cards)
            if dims.world_size == cards and dims.tp <= spec.heads and dims.pp <= spec.layers
        ]
        fit = [p for p in put if rejection(p, workload, None) is None]
        if fit:
            loaded = [(p, estimate(p, _at(workload, _SATURATED * p.dims.dp))) for p in fit]
            return max(loaded, key=lambda pair: pair[1].output_tokens_per_s)
    return None


def _at(workload: Workload, concurrency: int) -> Workload:
    return Workload(workload.prompt_tokens, workload.output_tokens, concurrency, steady=True)


def _priced(
    sheet: Sheet,
    cards: int,
    put: Placement,
    full: Estimate,
    workload: Workload,
    requests_per_s: float,
    peak: float,
    prices: Prices,
) -> Iterator[Offer]:
    """The machine bought and rented, as many of it as the busiest hour needs."""
    tokens_per_s = requests_per_s * workload.output_tokens
    machines = max(1, math.ceil(peak * tokens_per_s / (_FULL * full.output_tokens_per_s)))
    busy = min(1.0, tokens_per_s / (machines * full.output_tokens_per_s))
    served = _at_rate(put, workload, requests_per_s / machines, full)
    layout = Layout(put.dims, put.format)
    for how, cost in (("own", owned(sheet, cards, busy, prices)), ("rent", rented(sheet, cards))):
        if cost is None:
            continue
        at_full = owned(sheet, cards, 1.0, prices) if how == "own" else cost
        assert at_full is not None
        yield Offer(
            device=sheet.key,
            cards=cards,
            machines=machines,
            layout=layout.name,
            how=how,
            usd_per_million_tokens=round(machines * cost.usd_per_hour / 3600 / tokens_per_s * 1e6, 4),
            usd_per_million_tokens_saturated=round(
                at_full.usd_per_hour / 3600 / full.output_tokens_per_s * 1e6, 4
            ),
            usd_per_month=round(machines * cost.usd_per_hour * 730, 2),
            purchase_usd=round(machines * cost.purchase_usd, 2),
            output_tokens_per_s=round(full.output_tokens_per_s, 1),
            ttft_ms=round(served.ttft_s * 1e3, 2),
            tpot_ms=round(served.tpot_s * 1e3, 3),
            break_even=_break_even(cost, machines, tokens_per_s, prices),
            planned_only=why_not(put.spec, layout) or lacking(layout.format, put.topology.devices),
        )


def _at_rate(put: Placement, workload: Workload, requests_per_s: float, full: Estimate) -> Estimate:
    """With so many in flight as the rate keeps there, by Little's law."""
    served = estimate(put, _at(workload, 1))
    for _ in range(4):
        life_s = served.ttft_s + (workload.output_tokens - 1) * served.tpot_s
        in_flight = min(_SATURATED * put.dims.dp, max(1, round(requests_per_s * life_s)))
        served = estimate(put, _at(workload, in_flight))
    return served if served.output_tokens_per_s <= full.output_tokens_per_s * 1.5 else full


def _break_even(cost: Cost, machines: int, tokens_per_s: float, prices: Prices) -> str | None:
    if prices.api_usd_per_million is None or not cost.purchase_usd:
        return None
    days = break_even_days(cost, machines, prices.api_usd_per_million * tokens_per_s * 3600 / 1e6)
    if days is None or days > 365 * 30:
        return None
    return (datetime.now(UTC) + timedelta(days=days)).strftime("%Y-%m-%d")


def show(spec: ModelSpec, made: list[Offer], per_s: float, workload: Workload, prices: Prices) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 128
    million = per_s * workload.output_tokens * 86400 / 1e6
    console.print(
        f"{spec.name}: {per_s * 86400:,.0f} requests a day of {workload.prompt_tokens:,} + {workload.output_tokens:,} "
        f"tokens, {million:,.1f} million output tokens a day"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = (
        "machine",
        "layout",
        "",
        "$ per Mtok",
        "saturated",
        "$ a month",
        "purchase $",
        "TTFT ms",
        "TPOT ms",
        "even by",
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < 3 else "right", no_wrap=True)
    for o in made[:_ROWS]:
        count = f"{o.machines} × " if o.machines > 1 else ""
        table.add_row(
            f"{count}{o.cards} × {o.device}",
            f"{o.layout}{' *' if o.planned_only else ''}",
            o.how,
            f"{o.usd_per_million_tokens:,.2f}",
            f"{o.usd_per_million_tokens_saturated:,.2f}",
            f"{o.usd_per_month:,.0f}",
            f"{o.purchase_usd:,.0f}" if o.purchase_usd else "",
            f"{o.ttft_ms:,.0f}",
            f"{o.tpot_ms:,.1f}",
            o.break_even or "",
        )
    console.print(table)
    if any(o.planned_only for o in made[:_ROWS]):
        console.print("* planned only: this version does not run it")
    if prices.api_usd_per_million is not None:
        console.print(
            f"An API at ${prices.api_usd_per_million:g} a million costs "
            f"${prices.api_usd_per_million * million * 30.4:,.0f} a month."
        )
    best = made[0]
    console.print(
        f"Cheapest: {best.how} {best.machines} × ({best.cards} × {best.device}), "
        f"${best.usd_per_million_tokens:,.2f} a million tokens at this load, "
        f"${best.usd_per_million_tokens_saturated:,.2f} if it never idled."
    )
