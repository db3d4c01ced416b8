"""The probes for real, on this machine's CPU, two ranks over gloo."""

from __future__ import annotations

from pathlib import Path

from cluster.discover import discover
from cluster.measure import measure
from cluster.profile import apply, fingerprint_of
from cluster.topology import Provenance


def test_two_cpu_ranks_are_measured_kept_and_applied(tmp_path: Path) -> None:
    here = discover(2, "cpu")
    said: list[str] = []
    profile = measure(here, tmp_path, said.append, probe_s=0.02)

    assert profile.fingerprint == fingerprint_of(here)
    assert len(profile.rates) == 1, "one pool"
    assert set(profile.all_reduce) == set(profile.pool_at_once) == {2}
    for rates in (*profile.rates, *profile.pool_at_once.values()):
        # Any machine that runs this reads between 0.1 GB/s and 10 TB/s: a wrong unit or a cached read falls
        # outside.
        assert 1e8 < rates.bandwidth_bytes_per_s["float32"] < 1e13
        assert 1e8 < rates.flops_per_s["float32"] < 1e15
        assert 1e-6 < rates.layer_overhead_s < 1.0
    assert profile.send_recv is not None
    assert profile.send_recv.latency_s < 1.0

    again = measure(here, tmp_path, said.append)
    assert again == profile, "the second time it is read from the disk"
    measured = apply(profile, here, "float32")
    assert measured.devices[1].provenance is Provenance.MEASURED
    assert measured.link(0, 1).all_reduce_latency_s == {2: profile.all_reduce[2].latency_s}
