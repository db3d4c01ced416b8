"""Data sheets: names, units, and what they imply of links and prices."""

import pytest

from cluster import catalog
from cluster.errors import BadRecipe
from cluster.topology import LinkKind


def test_the_drivers_name_and_the_key_are_one_device():
    for name in ("rtx-4090", "NVIDIA GeForce RTX 4090", "RTX 4090", "rtx4090"):
        assert catalog.sheet(name).key == "rtx-4090"
    assert catalog.sheet("NVIDIA H100 80GB HBM3").key == "h100"
    assert catalog.sheet("NVIDIA A100-SXM4-80GB").key == "a100-80gb"


def test_no_two_sheets_share_a_name():
    names = [catalog._plain(n) for s in catalog.sheets().values() for n in {s.key, *s.names}]
    named = {(catalog._plain(n), s.key) for s in catalog.sheets().values() for n in (s.key, *s.names)}
    assert len({name for name, _ in named}) == len(named), sorted(names)


def test_memory_is_what_the_driver_reports():
    assert round(catalog.sheet("rtx-4090").memory_bytes / 1e9, 1) == 25.8
    assert round(catalog.sheet("h100").memory_bytes / 1e9, 1) == 85.5
    assert catalog.sheet("h200").memory_bytes == 143771 * 2**20


def test_geforce_rates_are_with_float32_accumulation():
    assert catalog.sheet("rtx-4090").flops_per_s["bfloat16"] == pytest.approx(165.2e12)  # not the sheet's 330
    assert catalog.sheet("h100").flops_per_s["bfloat16"] == pytest.approx(989e12)  # not the sparse 1979


def test_every_sheet_says_where_it_is_from_and_is_plausible():
    for sheet in catalog.sheets().values():
        assert len(sheet.source) > 5
        assert 10e9 < sheet.memory_bytes < 400e9, sheet.key
        assert 50e9 < sheet.bandwidth_bytes_per_s < 10e12, sheet.key
        half = sheet.flops_per_s.get("float16", sheet.flops_per_s["float32"])
        assert half >= sheet.flops_per_s["float32"], sheet.key
        # Every GPU does far more FLOP than it reads bytes: a slipped unit would show here.
        assert sheet.kind == "cpu" or 30 < half / sheet.bandwidth_bytes_per_s < 800, sheet.key


def test_unknown_device_names_the_nearest():
    with pytest.raises(BadRecipe, match=r"unknown device 'rtx-4091'.*nearest known is rtx-4090"):
        catalog.sheet("rtx-4091")
    assert catalog.find("no such card") is None


def test_links_follow_the_sheets():
    def kind(a: str, b: str) -> LinkKind:
        return catalog.link_kind(catalog.sheet(a), catalog.sheet(b))

    assert kind("h100", "h100") is LinkKind.NVLINK
    assert kind("l40s", "l40s") is LinkKind.PCIE
    assert kind("rtx-4090", "rtx-4090") is LinkKind.HOST
    assert kind("rtx-4090", "h100") is LinkKind.HOST
    assert kind("rtx-3090", "rtx-3090") is LinkKind.HOST  # a bridge is not assumed
    assert kind("cpu", "cpu") is LinkKind.LOOPBACK


def test_a_link_is_a_share_of_the_narrower_slot():
    wide, narrow = catalog.sheet("rtx-5090"), catalog.sheet("rtx-4090")
    mixed = catalog.prior_link(LinkKind.HOST, wide, narrow)
    assert mixed.bytes_per_s == catalog.prior_link(LinkKind.HOST, narrow, narrow).bytes_per_s
    assert mixed.bytes_per_s == pytest.approx(12e9, rel=0.01)  # 0.38 of PCIe 4.0 x16
    assert mixed.latency_s == pytest.approx(15e-6)


def test_devices_of_two_nodes_talk_over_the_network():
    h100 = catalog.sheet("h100")
    links = catalog.prior_links([(h100, "a"), (h100, "a"), (h100, "b")])
    assert [links[pair].kind for pair in ((0, 1), (0, 2), (1, 2))] == ["nvlink", "network", "network"]


def test_nvlink_on_a_card_without_it_is_refused():
    card = catalog.sheet("rtx-4090")
    with pytest.raises(BadRecipe, match="rtx-4090 has no NVLink"):
        catalog.prior_link(LinkKind.NVLINK, card, card)


def test_an_hour_costs_its_rent_or_the_card_over_three_years():
    assert catalog.sheet("rtx-4090").usd_per_hour == 0.60
    a6000 = catalog.sheet("rtx-a6000")
    assert a6000.usd_per_hour == pytest.approx(4650 / 26280 + 0.3 * 0.15)
    assert catalog.sheet("v100-16gb").usd_per_hour is None
