"""Fits, the kept profile, and priors replaced by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.discover import Cpu, cpu_topology, discover
from cluster.measure import (
    FORMAT,
    Fit,
    MachineProfile,
    Rates,
    apply,
    fingerprint_of,
    fit,
    group_sizes,
    load,
    measure,
    save,
)
from cluster.topology import LinkKind, Provenance
from tests.fake_nvml import FakeGpu, FakeNvml, dual_h100

CPU = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 34, free_bytes=1 << 33))


def rates(scale: float) -> Rates:
    return Rates({"float32": 10e9 * scale, "bfloat16": 6e9 * scale}, {"float32": 1e11 * scale}, 1e-4 / scale)


def profile_of(**changes: object) -> MachineProfile:
    profile = MachineProfile(
        format=FORMAT,
        machine="Some CPU, 2 cores",
        fingerprint=fingerprint_of(CPU),
        measured_at="2026-01-01T00:00:00+00:00",
        torch_version="2.11",
        rates=(rates(1.0),),
        pool_at_once={2: rates(1.5)},
        all_reduce={2: Fit(2e-4, 2e9, 0.1), 4: Fit(5e-4, 1e9, 0.1)},
        send_recv=Fit(9e-5, 3e9, 0.1),
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


def test_a_profile_is_kept_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    save(profile_of(), path)
    assert load(path, fingerprint_of(CPU)) == profile_of()
    assert list(path.parent.iterdir()) == [path], "no half-written file beside it"


def test_a_profile_of_another_machine_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save(profile_of(), path)
    bigger = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 35, free_bytes=1 << 33))
    assert load(path, fingerprint_of(bigger)) is None
    save(profile_of(format=FORMAT + 1), path)
    assert load(path, fingerprint_of(CPU)) is None
    path.write_text('{"format": 1, "machine":')
    assert load(path, fingerprint_of(CPU)) is None
    assert load(tmp_path / "absent.json", fingerprint_of(CPU)) is None


def test_free_memory_is_not_another_machine() -> None:
    busier = cpu_topology(2, Cpu("Some CPU", cores=2, memory_bytes=1 << 34, free_bytes=1 << 20))
    assert fingerprint_of(busier) == fingerprint_of(CPU)


def test_a_kept_profile_measures_nothing(tmp_path: Path) -> None:
    save(profile_of(), tmp_path / f"profile-{fingerprint_of(CPU)}.json")
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
    assert (link.latency_s, link.bytes_per_s) == (9e-5, 1e9)
    assert link.all_reduce_latency_s == {2: 2e-4, 4: 5e-4}
    assert link.provenance is Provenance.MEASURED
    assert apply(profile_of(), CPU, "bfloat16").devices[0].bandwidth_bytes_per_s == 9e9


def test_apply_leaves_links_of_another_kind_alone() -> None:
    """Two cards on NVLink were timed; a third hangs on PCIe."""
    fake = FakeNvml([*dual_h100().gpus, FakeGpu("NVIDIA L40S", 46068, "00000000:61:00.0")])
    here = discover(binding=fake)
    measured = apply(profile_of(rates=(rates(1), rates(2), rates(3)), pool_at_once={}), here, "float32")
    assert [d.bandwidth_bytes_per_s for d in measured.devices] == [10e9, 20e9, 30e9]
    assert measured.link(0, 1).kind is LinkKind.NVLINK
    assert measured.link(0, 1).provenance is Provenance.MEASURED
    assert measured.link(1, 2) == here.link(1, 2)


def test_scatter_is_the_worst_fit() -> None:
    assert profile_of(all_reduce={2: Fit(1e-4, 1e9, 0.2)}, send_recv=Fit(1e-4, 1e9, 0.7)).scatter == 0.7
    assert profile_of(all_reduce={}, send_recv=None).scatter == 0.0


def test_groups_are_powers_of_two_and_all() -> None:
    assert [group_sizes(n) for n in (1, 2, 3, 4, 6, 8)] == [[], [2], [2, 3], [2, 4], [2, 4, 6], [2, 4, 8]]
