"""`shardwise claims` and `shardwise advise`: what they answer, and that money adds up."""

import json
import re
from pathlib import Path

import pytest

from cluster import catalog
from launch import __main__
from launch.claim_checks import CLAIMS
from launch.claim_model import off_by
from launch.claims import MEASURED_TITLE
from strategies.money import Cost, Prices, break_even_days, owned, rented

ROOT = Path(__file__).parents[2]


def shardwise(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = __main__.main([*argv])
    out, err = capsys.readouterr()
    return code, out, err


def claims(capsys: pytest.CaptureFixture[str], *ids: str) -> dict[str, dict[str, str]]:
    code, out, _ = shardwise(capsys, "claims", *ids, "--json")
    assert code == 0
    return {row["id"]: row for row in json.loads(out)["claims"]}


def test_every_claim_of_the_guides_is_answered(capsys):
    found = claims(capsys)
    letters = {"A": 8, "B": 5, "C": 6, "D": 2, "E": 7}
    assert list(found) == [f"{letter}{n}" for letter, most in letters.items() for n in range(1, most + 1)]
    verdicts = re.compile(r"holds|depends|impossible|wrong|off by [\d,.]+(×|%)")
    assert all(verdicts.fullmatch(row["verdict"]) for row in found.values())
    assert all(
        (len(row["gives"]) > 8 and re.search(r"\d", row["gives"])) or row["id"] == "E7"
        for row in found.values()
    )


def test_verdicts_that_arithmetic_gives(capsys):
    found = claims(capsys, "a1", "B1", "B3", "B4", "C1", "D2", "E3", "e5")
    assert found["A1"]["verdict"] == "off by 2.1×"  # 35 GB said of INT8
    assert found["B1"]["verdict"] == "off by 4.0×" and "INT4 336 GB" in found["B1"]["gives"]
    assert {found[i]["verdict"] for i in ("B3", "B4", "E3")} == {"impossible"}
    assert found["C1"]["verdict"] == "holds"
    assert "15,768" in found["E5"]["gives"]
    assert next(iter(found)) == "A1"


def test_off_by():
    assert (off_by(10, 9), off_by(10, 5), off_by(1, 1000)) == ("holds", "off by 2.0×", "off by 1,000×")


def test_an_unknown_claim_is_one_line_and_exit_2(capsys):
    code, out, err = shardwise(capsys, "claims", "Z9")
    assert (code, out) == (2, "") and "no claim 'Z9'; they are A1, A2" in err


def test_the_page_is_what_the_command_makes(capsys, tmp_path: Path):
    page = tmp_path / "claims.md"
    assert shardwise(capsys, "claims", "--report", str(page))[0] == 0
    made = page.read_text().replace(str(page), "docs/claims.md")
    assert sum(line.startswith("| ") for line in made.splitlines()) == len(CLAIMS) + 1
    kept = (ROOT / "docs/claims.md").read_text().partition(f"\n{MEASURED_TITLE}")[0]
    assert kept == made, "figures moved: run shardwise claims --report docs/claims.md and read what changed"


def test_a_machine_of_ones_own_costs_depreciation_power_and_maintenance():
    sheet, prices = catalog.sheet("rtx-4090"), Prices(host_usd=1000, host_usd_per_card=0, host_watts=100)
    cost = owned(sheet, 2, 1.0, prices)
    assert cost.purchase_usd == 2 * 1599 + 1000
    power = (2 * 450 + 100) / 1000 * 1.3 * 0.15
    upkeep = cost.purchase_usd * 0.08 / 8760
    assert cost.running_usd_per_hour == pytest.approx(power + upkeep)
    assert cost.usd_per_hour == pytest.approx(power + upkeep + cost.purchase_usd / (3 * 8760))
    assert owned(sheet, 2, 0.0, prices).usd_per_hour < cost.usd_per_hour
    assert rented(sheet, 2).usd_per_hour == pytest.approx(1.2)
    assert owned(catalog.sheet("v100s-pcie"), 1, 1.0, prices) is None


def test_a_purchase_pays_for_itself_when_the_api_would_have_cost_it():
    cost = Cost(purchase_usd=2400, usd_per_hour=0.2, running_usd_per_hour=0.1)
    assert break_even_days(cost, 1, 1.1) == pytest.approx(100)
    assert break_even_days(cost, 1, 0.1) is None


def test_offers_are_ranked_by_the_token_and_carry_the_load(capsys):
    argv = ("advise", "llama-3.1-8b", "--requests-per-day", "200000", "--api-usd-per-mtok", "0.3", "--json")
    code, out, _ = shardwise(capsys, *argv)
    offers = json.loads(out)["offers"]
    assert code == 0
    prices = [offer["usd_per_million_tokens"] for offer in offers]
    assert prices == sorted(prices)
    tokens_per_s = 200_000 / 86400 * 256
    for offer in offers:
        assert offer["machines"] * offer["output_tokens_per_s"] > 3 * tokens_per_s
        assert offer["usd_per_million_tokens_saturated"] <= offer["usd_per_million_tokens"] * 1.001
        assert offer["ttft_ms"] > 0 and offer["tpot_ms"] > 0
        month = offer["usd_per_million_tokens"] * tokens_per_s * 730 * 3600 / 1e6
        assert offer["usd_per_month"] == pytest.approx(month, rel=1e-3)
        assert (offer["break_even"] is None) or (offer["how"] == "own")


def test_a_budget_leaves_out_what_costs_more(capsys):
    argv = ("advise", "llama-3.3-70b", "--requests-per-day", "1000", "--budget", "20000", "--json")
    _, out, _ = shardwise(capsys, *argv)
    offers = json.loads(out)["offers"]
    assert offers and all(offer["usd_per_month"] * 36 <= 20_000 * 1.001 for offer in offers)
    small = [offer for offer in offers if offer["layout"].endswith(("+int8", "+int4", "+fp8"))]
    assert small and all(offer["planned_only"] is None for offer in small)
    code, out, err = shardwise(
        capsys, "advise", "llama-3.3-70b", "--requests-per-day", "1000", "--budget", "10"
    )
    assert (code, out) == (3, "") and "within $10" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--requests-per-day 0", "--requests-per-day is 0; it must be above 0"),
        ("--requests-per-day 1 --peak 0.5", "--peak is 0.5; the busiest hour is at least the mean"),
        ("--requests-per-day 1 --budget -1", "--budget is -1; it must be at least 0"),
        ("--requests-per-day nan", "--requests-per-day is nan; it must be above 0"),
        ("--requests-per-day 1e99", "--requests-per-day is 1e+99; it must be at most 1e+12"),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_2(capsys, flags: str, said: str):
    code, out, err = shardwise(capsys, "advise", "llama-3.1-8b", *flags.split())
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
