"""A CPU's products and layers, priced by what its profile timed."""

from dataclasses import replace

import pytest

from cluster import busy
from cluster.discover import Cpu, cpu_topology
from cluster.topology import Provenance, Topology
from strategies.cost_ops import weight_s
from strategies.cost_steps import decode_step_s
from strategies.engines import CPU, engine
from strategies.place import place
from strategies.plan import Layout, Placement
from tests.unit.machines import SMOL, box

RATES = {1: 5e9, 2: 10e9, 4: 10e9, 16: 30e9, 256: 1e11}  # four rows take twice as long as two


def machine(layer_overhead_s: float = 0.0) -> Topology:
    found = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 34, free_bytes=1 << 33))
    devices = tuple(
        replace(
            device,
            bandwidth_bytes_per_s=30e9,
            flops_per_s={"float32": 1.5e11},
            layer_overhead_s=layer_overhead_s,
            step_overhead_s=0.0,
            products={"float32": RATES},
            provenance=Provenance.MEASURED,
        )
        for device in found.devices
    )
    return replace(found, devices=devices)


def put(layout: str, on: Topology) -> Placement:
    return place(SMOL, Layout.parse(layout), "float32", on)


def products_s(placement: Placement, sequences: int) -> float:
    step = decode_step_s(placement, 0, sequences, context=1, busy=1.0)
    return step["weights"] + step["compute"]


def test_a_weights_time_lies_between_those_timed_and_grows_beyond_them():
    assert weight_s(RATES, 1) == weight_s(RATES, 0.5) == 2 / 5e9
    assert weight_s(RATES, 4) == 8 / 10e9
    assert weight_s(RATES, 3) == pytest.approx((weight_s(RATES, 2) + weight_s(RATES, 4)) / 2)
    assert weight_s(RATES, 512) == 2 * weight_s(RATES, 256)


def test_products_take_what_so_many_rows_took():
    alone = put("tp1", machine())
    assert products_s(alone, 4) == pytest.approx(2 * products_s(alone, 1), rel=0.05)
    assert products_s(alone, 2) == pytest.approx(products_s(alone, 1), rel=0.05)


def test_ranks_share_what_the_pool_does():
    shared = products_s(put("dp2", machine()), 4)
    assert shared == pytest.approx(2 * products_s(put("tp1", machine()), 4), rel=0.05)


def test_a_layer_takes_as_many_of_the_timed_calls_as_the_engine_makes():
    with_calls, without = (
        sum(decode_step_s(put("tp1", machine(s)), 0, 1, context=1, busy=1.0).values()) for s in (1e-3, 0.0)
    )
    assert with_calls - without == pytest.approx(SMOL.layers * engine(CPU).eager_layers * 1e-3)


def test_half_of_the_cores_take_twice_as_long():
    found = machine(1e-3)
    loaded = replace(found, devices=tuple(replace(d, free_share=0.5) for d in found.devices))
    idle_s, busy_s = (
        sum(decode_step_s(put("tp1", on), 0, 4, context=64, busy=1.0).values()) for on in (found, loaded)
    )
    assert busy_s == pytest.approx(2 * idle_s)


def test_what_other_programs_leave_of_a_cpu_is_seen(monkeypatch):
    monkeypatch.setattr(busy, "share_left", lambda cores, seconds: 0.4)
    assert {d.free_share for d in busy.with_what_is_left(machine()).devices} == {0.4}
    monkeypatch.setattr(busy, "share_left", lambda cores, seconds: 0.97)
    assert busy.with_what_is_left(machine()) == machine()
    monkeypatch.setattr(busy, "share_left", lambda cores, seconds: pytest.fail("a GPU's host is not asked"))
    assert busy.with_what_is_left(box("h100", 1)) == box("h100", 1)


def test_a_share_of_time_is_one():
    assert 0 < busy.share_left(1, 0.02) <= 1
