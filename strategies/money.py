"""What a machine costs an hour, owned or rented, and when a bought one has paid for itself. Pure; US dollars."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.catalog import Sheet

HOURS_PER_YEAR = 24 * 365
IDLE_SHARE = 0.2  # of a card's watts while it waits (an RTX 4090 some 20 of 450 W, an H100 some 100 of 700)


@dataclass(frozen=True, slots=True)
class Prices:
    """Inputs, each with a default that says its date in `advise --help`."""

    usd_per_kwh: float = 0.15
    pue: float = 1.3  # power of the room over power of the machine
    maintenance: float = 0.08  # of the purchase, a year
    years: float = 3.0  # of depreciation
    host_usd: float = 2500.0  # board, CPU, memory, disk, power supply and case
    host_usd_per_card: float = 500.0  # slots, power and cooling for each
    host_watts: float = 200.0
    api_usd_per_million: float | None = None  # output tokens


@dataclass(frozen=True, slots=True)
class Cost:
    purchase_usd: float  # 0 if rented
    usd_per_hour: float  # all in
    running_usd_per_hour: float  # without depreciation


def owned(sheet: Sheet, cards: int, busy: float, prices: Prices) -> Cost | None:
    """Of a machine of so many cards that works a share `busy` of the time; None where the card's price is unknown."""
    if sheet.price_usd is None:
        return None
    purchase = cards * (sheet.price_usd + prices.host_usd_per_card) + prices.host_usd
    watts = cards * sheet.watts * (IDLE_SHARE + (1 - IDLE_SHARE) * busy) + prices.host_watts
    running = watts / 1000 * prices.pue * prices.usd_per_kwh + purchase * prices.maintenance / HOURS_PER_YEAR
    return Cost(purchase, purchase / (prices.years * HOURS_PER_YEAR) + running, running)


def rented(sheet: Sheet, cards: int) -> Cost | None:
    if sheet.rent_usd_per_hour is None:
        return None
    rent = cards * sheet.rent_usd_per_hour
    return Cost(0.0, rent, rent)


def break_even_days(cost: Cost, machines: int, api_usd_per_hour: float) -> float | None:
    """Days until the purchase is what the API would have cost more than running the machines; None: never."""
    saved = api_usd_per_hour - machines * cost.running_usd_per_hour
    return machines * cost.purchase_usd / saved / 24 if saved > 0 else None
