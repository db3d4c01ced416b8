"""Fits, the kept profile, and priors replaced by it."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path as File

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import profile as profiles
from cluster.discover import Cpu, cpu_topology, discover
from cluster.measure import group_sizes, measure
from cluster.paths import Curve, Op, Path, curve_of, fit
from cluster.profile import (
    FORMAT,
    MachineProfile,
    PairCopy,
    Rates,
    apply,
    changes,
    fingerprint_of,
    kept,
    profile_path,
    read,
    save,
)
from cluster.topology import LinkKind, Provenance
from tests.fake_nvml import FakeGpu, FakeNvml, dual_4090, dual_h100

CPU = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 34, free_bytes=1 << 33))


def rates(scale: float) -> Rates:
    return Rates(
        {"float32": 10e9 * scale, "bfloat16": 6e9 * scale},
        {"float32": 1e11 * scale},
        1e-4 / scale,
        {"float32": {1: 5e9 * scale, 4: 1e10 * scale, 256: 1e11 * scale}},
    )


def line(
    op: Op, path: Path, ranks: int, latency_s: float, bytes_per_s: float, in_graph: bool = False
) -> Curve:
    """A curve on the line that `fit` must find again: an all-reduce of n moves 2(n-1)/n of its bytes."""
    share = 2 * (ranks - 1) / ranks if op is Op.ALL_REDUCE else 1.0
    sizes = (4096, 65536, 1 << 20)
    return curve_of(op, path, ranks, in_graph, [(n, latency_s + share * n / bytes_per_s) for n in sizes])


CURVES = (
    line(Op.ALL_REDUCE, Path.GLOO, 2, 2e-4, 2e9),
    line(Op.ALL_REDUCE, Path.GLOO, 4, 5e-4, 1e9),
    line(Op.SEND_RECV, Path.GLOO, 2, 9e-5, 3e9),
)


def profile_of(**changes: object) -> MachineProfile:
    profile = MachineProfile(
        format=FORMAT,
        machine="Some CPU, 2 cores",
        fingerprint=fingerprint_of(CPU),
        measured_at="2026-01-01T00:00:00+00:00",
        torch_version="2.11",
        driver="",
        nccl_version="",
        devices=CPU.devices,
        links=tuple((a, b, link) for (a, b), link in CPU.links.items()),
        rates=(rates(1.0),),
        pool_at_once={2: rates(1.5)},
        curves=CURVES,
    )
    return replace(profile, **changes)  # type: ignore[arg-type]


@given(
    latency_s=st.floats(1e-6, 1e-3),
    bytes_per_s=st.floats(1e8, 1e12),
    sizes=st.lists(st.integers(10**3, 10**9), min_size=2, max_size=6, unique=True),
)
def test_points_on_a_line_give_the_line(latency_s: float, bytes_per_s: float, sizes: list[int]) -> None:
    found = fit([(size, latency_s + size / bytes_per_s) for size in sizes])
    assert found.residual < 1e-3
    for size in (min(sizes), max(sizes)):
        assert found.latency_s + size / found.bytes_per_s == pytest.approx(
            latency_s + size / bytes_per_s, rel=1e-3
        )


def test_a_fit_has_no_negative_latency_and_says_how_far_off_it_is() -> None:
    found = fit([(1000, 1e-6), (2000, 4e-6), (4000, 16e-6)])
    assert found.latency_s == 0.0
    assert found.residual == pytest.approx(
        max(abs(s / found.bytes_per_s / t - 1) for s, t in [(1000, 1e-6), (4000, 16e-6)])
    )


def test_times_that_do_not_grow_are_all_latency() -> None:
    found = fit([(1000, 1e-4), (2000, 1e-4), (4000, 0.9e-4)])
    assert found.latency_s == pytest.approx(1e-4, rel=0.1)
    assert found.bytes_per_s > 0


def test_a_profile_is_kept_and_read_back(tmp_path: File) -> None:
    path = profile_path(tmp_path / "deep", CPU)
    save(profile_of(), path)
    assert kept(tmp_path / "deep", CPU) == profile_of()
    assert list(path.parent.iterdir()) == [path], "no half-written file beside it"


def test_a_profile_of_another_machine_is_refused_with_what_changed(tmp_path: File) -> None:
    path = profile_path(tmp_path, CPU)
    save(profile_of(fingerprint="of another day", driver="550.54"), path)
    assert kept(tmp_path, CPU) is None
    found = read(path)
    assert found is not None
    assert "driver was 550.54, is absent" in changes(found, CPU)
    bigger = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 35, free_bytes=1 << 33))
    assert changes(profile_of(torch_version=version("torch")), bigger) == [
        "its devices or links are others now, or its products are made in another way"
    ]


@pytest.mark.parametrize("content", ['{"format": 1, "machine":', "[]", '{"format": 1}'])
def test_a_file_that_is_no_profile_is_measured_again(tmp_path: File, content: str) -> None:
    path = profile_path(tmp_path, CPU)
    path.write_text(content)
    assert kept(tmp_path, CPU) is None
    assert kept(tmp_path / "absent", CPU) is None
    save(profile_of(format=FORMAT + 1), path)
    assert kept(tmp_path, CPU) is None


def test_a_profile_is_found_by_the_cards_and_the_links_they_may_use() -> None:
    names = {
        profile_path(File("."), topology).name
        for topology in (
            discover(binding=dual_h100()),
            discover(binding=dual_h100(), peer_access=False),
            discover(1, binding=dual_h100()),
            discover(binding=dual_4090()),
            CPU,
        )
    }
    assert len(names) == 5
    assert fingerprint_of(discover(binding=dual_h100())) != fingerprint_of(
        replace(discover(binding=dual_h100()), driver="580.65")
    )


def test_free_memory_is_not_another_machine() -> None:
    busier = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 34, free_bytes=1 << 20))
    assert fingerprint_of(busier) == fingerprint_of(CPU)


def test_a_kept_profile_measures_nothing(tmp_path: File) -> None:
    save(profile_of(), profile_path(tmp_path, CPU))
    said: list[str] = []
    assert measure(CPU, tmp_path, said.append) == profile_of()
    assert said[0].startswith("using the profile of 2026-01-01")


def test_apply_prices_a_pool_at_the_most_its_ranks_did() -> None:
    topology = apply(profile_of(), CPU, "float32")
    first, second = topology.devices
    assert first.bandwidth_bytes_per_s == second.bandwidth_bytes_per_s == 15e9
    assert first.flops_per_s["float32"] == 1.5e11
    assert first.layer_overhead_s == pytest.approx(1e-4 / 1.5)
    assert first.provenance is Provenance.MEASURED
    link = topology.link(0, 1)
    assert (link.latency_s, link.bytes_per_s) == (pytest.approx(9e-5), pytest.approx(1e9))
    assert link.all_reduce_latency_s == pytest.approx({2: 2e-4, 4: 5e-4})
    assert link.curves == CURVES
    assert link.provenance is Provenance.MEASURED
    assert apply(profile_of(), CPU, "bfloat16").devices[0].bandwidth_bytes_per_s == 9e9


def test_apply_prices_a_pools_products_by_rows() -> None:
    assert apply(profile_of(), CPU, "float32").devices[0].products == rates(1.5).products


def test_a_cpus_profile_of_other_products_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = discover(binding=dual_h100())
    of_cpu, of_gpus = profile_of(), fingerprint_of(gpus)
    assert changes(of_cpu, CPU) == []
    monkeypatch.setattr(profiles, "CPU_PRODUCTS", "torch's")
    assert changes(of_cpu, CPU)
    assert fingerprint_of(gpus) == of_gpus


def test_apply_leaves_links_of_another_kind_alone() -> None:
    """Two cards on NVLink were timed; a third hangs on PCIe."""
    fake = FakeNvml([*dual_h100().gpus, FakeGpu("NVIDIA L40S", 46068, "00000000:61:00.0")])
    here = discover(binding=fake)
    measured = apply(profile_of(rates=(rates(1), rates(2), rates(3)), pool_at_once={}), here, "float32")
    assert [d.bandwidth_bytes_per_s for d in measured.devices] == [10e9, 20e9, 30e9]
    assert measured.link(0, 1).kind is LinkKind.NVLINK
    assert measured.link(0, 1).provenance is Provenance.MEASURED
    assert measured.link(1, 2) == here.link(1, 2)


def test_a_pair_across_sockets_is_as_slow_as_its_copies_were() -> None:
    """Three cards on PCIe, the third on the other processor."""
    cards = [FakeGpu("NVIDIA L40S", 46068, f"00000000:{bus}:00.0") for bus in ("01", "02", "81")]
    here = discover(binding=FakeNvml(cards))
    rate = {(0, 1): 20e9, (1, 0): 24e9, (0, 2): 6e9, (2, 0): 5e9, (1, 2): 22e9, (2, 1): 19e9}
    copies = tuple(PairCopy(a, b, bytes_per_s) for (a, b), bytes_per_s in rate.items())
    changed = profile_of(rates=(rates(1),) * 3, pool_at_once={}, pair_copies=copies)
    measured = apply(changed, here, "float32")
    assert [measured.links[pair].bytes_per_s for pair in ((0, 1), (0, 2), (1, 2))] == pytest.approx(
        [1e9, 0.25e9, 0.95e9]
    )
    assert [bool(measured.links[pair].curves) for pair in ((0, 1), (0, 2), (1, 2))] == [True, False, True]


def test_scatter_is_gloos_distance_from_a_line() -> None:
    assert profile_of().scatter < 1e-3
    noisy = curve_of(Op.SEND_RECV, Path.GLOO, 2, False, [(4096, 1e-4), (8192, 3e-4), (16384, 1e-4)])
    assert profile_of(curves=(*CURVES, noisy)).scatter == noisy.fit.residual > 0.3
    assert profile_of(curves=()).scatter == 0.0


def test_groups_are_powers_of_two_and_all() -> None:
    assert [group_sizes(n) for n in (1, 2, 3, 4, 6, 8)] == [[], [2], [2, 3], [2, 4], [2, 4, 6], [2, 4, 8]]
