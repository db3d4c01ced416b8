"""Offload as the planner weighs it: which layers, over whose links, in whose memory, and when it is chosen."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.topology import LinkKind, Topology
from launch.configured import kv_reserve
from launch.memory import capped
from launch.options import EngineOptions
from launch.predict import predict
from orchestrator.engine.residence import resident_of
from orchestrator.engine_config import EngineConfig
from strategies.cost import estimate
from strategies.cost_memory import CAP_SLACK, CONTEXT_BYTES, NCCL_BYTES, memories
from strategies.cost_offload import Pulled, host_rate
from strategies.engines import OURS, engine
from strategies.offload import BUFFERS, Room, Streaming
from strategies.place import place
from strategies.plan import Layout, Plan
from strategies.planner import plan
from strategies.read_spec import builtin
from strategies.source import ModelSource, SourceKind
from strategies.spec import Objective, Workload
from tests.unit.machines import LLAMA_8B, LLAMA_70B, box, with_devices

QWEN_32B = builtin("qwen2.5-32b")


def with_host(topology: Topology, gb: float) -> Topology:
    return capped(topology, None, gb)


def asked(name: str, **changes: object) -> EngineOptions:
    source = ModelSource(name, None, SourceKind.BUILTIN)
    made = EngineOptions(
        source, builtin(name), "cuda", "bfloat16", True, 256, 256, 2048, 16, None, True, 0, None, True
    )
    return replace(made, **changes)


def told(options: EngineOptions) -> EngineConfig:
    """To every rank, as launch/configured.py does, which looks for a GPU."""
    return EngineConfig(
        options.source,
        options.spec,
        options.dtype,
        options.device,
        options.format,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        offload=True,
        offload_kv_tokens=kv_reserve(options),
        least_kv_tokens=options.least_context,
        host_memory_bytes=10**15,
    )


# --- a step -------------------------------------------------------------------------------------------------


@given(st.integers(1, 100), st.data(), st.floats(0, 10), st.floats(0.01, 10))
def test_a_step_takes_its_work_and_its_copies_at_least_and_never_more_than_both(
    layers: int, data: st.DataObject, copy_s: float, layer_s: float
) -> None:
    streaming = Streaming(layers, data.draw(st.integers(0, layers)))
    assert streaming.moved == len(streaming.order)
    work, copies = layers * layer_s, streaming.moved * copy_s
    step = streaming.step_s(layer_s, copy_s)
    assert max(work, copies) <= step * (1 + 1e-9)
    assert step <= (work + copies) * (1 + 1e-9)


def test_a_step_by_hand() -> None:
    """Four layers, all streamed, the first two there: copies of 3 s begin behind the first layer of 1 s and follow one
    another; of copies of half a second all but the last are hidden."""
    assert Streaming(4, 0).step_s(1.0, 3.0) == 1 + 4 * 3
    assert Streaming(4, 0).step_s(1.0, 0.5) == 4.5
    assert Streaming(4, 2).step_s(1.0, 3.0) == 4  # two buffers hold them for good


def test_sums_through_the_host_hold_up_the_layers_that_come_thence() -> None:
    pulled = Pulled(Streaming(4, 0), copy_s=3.0, beside=True)
    assert pulled.behind(0.0) == pulled
    assert pulled.behind(2.0).step_s(4.0) == pytest.approx(pulled.step_s(4.0) + 2.0)
    layout, load = Layout.parse("tp2+int8+offload"), Workload(128, 128, 32)
    first = {}
    for kind in (LinkKind.HOST, LinkKind.NVLINK):
        machine = capped(box("h100", 2, kind), 25.3)
        (found,) = plan(LLAMA_70B, machine, load, "bfloat16", layouts=[layout]).candidates
        assert found.estimate is not None
        first[kind] = found.estimate.ttft_s
    assert first[LinkKind.HOST] > 1.2 * first[LinkKind.NVLINK]


# --- which layers stay --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tp1+offload", "tp2+offload", "pp2+offload", "tp2+int8+offload"])
@pytest.mark.parametrize("cap_gb", [20.0, 25.3])
def test_a_plan_keeps_as_many_layers_as_the_engine_will(name: str, cap_gb: float) -> None:
    layout, load = Layout.parse(name), Workload(128, 128, 32)
    machine = capped(box("h100", 2), cap_gb)
    options = asked("qwen2.5-32b", device_memory_gb=cap_gb, format=layout.format.name, offload=True)
    (candidate,) = predict(options, machine, load, [layout], cut_for=load).candidates
    config = told(replace(options, offload_kv_tokens=32 * 256))
    assert config.offload_kv_tokens == 8192
    several = layout.dims.replica_size > 1
    joined = engine(OURS).joined_bytes - NCCL_BYTES  # which the rank reckons with itself
    free = int(cap_gb * 1e9 * (1 - CAP_SLACK)) - CONTEXT_BYTES - several * joined
    (note,) = [found for found in candidate.marked if "resident" in found]
    counts = [resident_of(config, shard, torch.device("cuda"), free) for shard in candidate.shards]
    kept = min(counts)
    assert note.startswith(
        f"{kept} of a rank's " if kept < len(candidate.shards[0].layers) else "all of a rank's "
    )


def test_a_cache_too_large_shrinks_before_offloading_is_refused() -> None:
    placed = place(
        QWEN_32B, Layout.parse("tp1+offload"), "bfloat16", box("rtx-4090", 1), room=Room(1024, 10**6)
    )
    (need,) = memories(placed, Workload())
    assert need.streaming is not None and need.streaming.resident == 0
    assert 1024 <= need.kv_tokens < 10**6
    config = replace(told(asked("qwen2.5-32b")), offload_kv_tokens=10**6, least_kv_tokens=1024)
    assert resident_of(config, placed.shards[0], torch.device("cuda"), 20 * 10**9) == 0
    assert kv_reserve(asked("qwen2.5-32b", max_model_len=16384)) == 16384  # a context must fit


def test_more_at_once_leave_fewer_layers_and_share_a_step() -> None:
    machine, layout = box("rtx-4090", 2), [Layout.parse("tp2+offload")]
    one, many = (
        plan(
            QWEN_32B, machine, Workload(128, 128, n, Objective.THROUGHPUT), "bfloat16", layouts=layout
        ).candidates[0]
        for n in (1, 32)
    )
    resident = [
        int(re.match(r"(\d+) of", note)[1]) for c in (one, many) for note in c.marked if "resident" in note
    ]
    assert resident[0] > resident[1]
    assert one.estimate is not None and many.estimate is not None
    assert 20 * one.estimate.output_tokens_per_s < many.estimate.output_tokens_per_s
    assert many.estimate.kv_tokens >= 32 * 256


def test_layers_that_somebody_said_stay_are_the_plans_too() -> None:
    room = Room(resident=3)
    (found,) = plan(
        LLAMA_8B, box("rtx-4090", 1), Workload(), "bfloat16", layouts=[Layout.parse("tp1+offload")], room=room
    ).candidates
    assert any(note.startswith("3 of a rank's 32 layers resident") for note in found.marked)
    whole = box("cpu", 1, pool="host")
    roomy = with_devices(whole, free_bytes=64 * 10**9)
    none, three = (
        plan(
            LLAMA_8B, roomy, Workload(64, 8), "float32", layouts=[Layout.parse("tp1+offload")], room=said
        ).candidates[0]
        for said in (Room(), room)
    )
    assert none.estimate is not None and three.estimate is not None
    assert "all of a rank's layers resident: nothing is streamed" in none.marked
    assert three.estimate.tpot_s > 1.3 * none.estimate.tpot_s


# --- over whose links ---------------------------------------------------------------------------------------


def test_a_card_alone_pulls_at_its_own_rate_and_all_at_what_they_did_together() -> None:
    sheet = capped(box("h100", 2), 25.3)
    machine = with_devices(sheet, host_bytes_per_s=55e9, host_together_bytes_per_s=40e9)
    one, two = (
        estimate(place(LLAMA_70B, Layout.parse(name), "bfloat16", machine), Workload())
        for name in ("tp1+offload", "tp2+offload")
    )
    streamed = [
        memories(place(LLAMA_70B, Layout.parse(name), "bfloat16", machine), Workload())[0].streamed
        for name in ("tp1+offload", "tp2+offload")
    ]
    assert one.tpot_s == pytest.approx(streamed[0] / 55e9, rel=0.05)
    assert two.tpot_s == pytest.approx(streamed[1] / 40e9, rel=0.05)
    unknown = box("h100", 2).devices[0]
    assert host_rate(unknown, 2) == 25e9 < host_rate(unknown, 1)  # two channels' worth for both


def test_a_disk_gives_all_ranks_together_what_it_reads() -> None:
    machine, layout = box("rtx-4090", 2), Layout.parse("tp2+offload")
    slow, fast, unknown = (
        place(QWEN_32B, layout, "bfloat16", machine, room=Room(on_disk=True, disk_bytes_per_s=rate))
        for rate in (3e9, 1e12, None)
    )
    streamed = sum(need.streamed for need in memories(slow, Workload()))
    assert estimate(slow, Workload()).tpot_s == pytest.approx(streamed / 3e9, rel=0.02)
    assert estimate(fast, Workload()).tpot_s == estimate(unknown, Workload()).tpot_s


def test_one_request_in_a_pipeline_has_one_link_at_a_time() -> None:
    machine = with_devices(box("rtx-4090", 2), host_bytes_per_s=25e9, host_together_bytes_per_s=25e9)
    split, piped = (
        estimate(place(LLAMA_70B, Layout.parse(name), "bfloat16", machine), Workload())
        for name in ("tp2+offload", "pp2+offload")
    )
    assert 1.8 < piped.tpot_s / split.tpot_s < 2.3


# --- in whose memory ----------------------------------------------------------------------------------------


def test_a_host_too_small_is_told_with_the_nearest_way_out() -> None:
    def reason(name: str, host_gb: float, room: Room | None = None) -> str | None:
        machine = with_host(box("rtx-4090", 2), host_gb)
        made = plan(LLAMA_70B, machine, Workload(), "bfloat16", layouts=[Layout.parse(name)], room=room)
        return made.candidates[0].reason

    assert reason("tp2+offload", 200) is None
    told = reason("tp2+offload", 64)
    assert told is not None
    need = float(
        re.match(r"([\d.]+) GB of bfloat16 weights in host memory, which has 64\.0 GB free; ", told)[1]
    )
    assert 95 < need < 115
    way = re.search(r"; (tp2\+int8\+offload) keeps ([\d.]+) GB there$", told)
    assert way is not None and float(way[2]) < 64
    assert reason(way[1], 64) is None, "the way out holds"
    assert reason("tp2+offload", 16).endswith("; tp2+int4 needs none")
    assert reason("tp1+int4+offload", 4).endswith(
        "; generate, serve and compare keep them on a disk by --offload-dir FOLDER"
    )
    assert reason("tp2+offload", 4, Room(on_disk=True)) is None
    beside_kv = reason("tp2+offload", 200, Room(host_kv_bytes=60 * 10**9))
    assert beside_kv is not None and "which has 80.0 GB free; tp2+int8+offload keeps" in beside_kv
    two = reason("dp2+int4+offload", 30)
    assert two is not None and "int4 weights in host memory" in two, "both replicas lock their own"


def test_a_limit_that_is_too_low_is_told_with_one_that_is_not() -> None:
    def planned(cap_gb: float | None, cards: int = 1) -> Plan:
        return plan(LLAMA_8B, capped(box("rtx-4090", cards), cap_gb), Workload(), "bfloat16")

    told = next(way for way in planned(8).explanation if way.startswith("Higher limit"))
    way = re.match(
        r"Higher limit: --device-memory-gb ([\d.]+) would hold it as tp1; 25.4 GB are free on", told
    )
    assert way is not None
    assert planned(float(way[1])).chosen is not None, "the way out holds"
    assert planned(float(way[1]) - 0.7).chosen is None, "and is not far above"
    assert "as tp2; 25.4 GB are free" in " ".join(planned(8, cards=2).explanation)
    llama_70b = plan(LLAMA_70B, capped(box("rtx-4090", 1), 8), Workload(), "bfloat16").explanation
    assert "Higher limit" not in " ".join(llama_70b), "no limit would do"
    assert "Higher limit" not in " ".join(
        plan(LLAMA_70B, box("rtx-4090", 1), Workload(), "bfloat16").explanation
    )


def test_what_a_host_must_have_is_told_where_nothing_is_known_of_it() -> None:
    machine, layouts = box("rtx-4090", 2), [Layout.parse("tp2+offload")]
    known, unknown = (
        plan(LLAMA_70B, m, Workload(), "bfloat16", layouts=layouts).candidates[0].marked
        for m in (with_host(machine, 200), machine)
    )
    assert not any("--host-memory-gb" in note for note in known)
    assert any(
        re.search(r"; it takes 1\d\d\.\d GB of host memory, .*--host-memory-gb tells", n) for n in unknown
    )


# --- when it is chosen --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host_gb", "objective", "chosen"),
    [
        (256, Objective.LATENCY, "tp2+offload"),
        (256, Objective.THROUGHPUT, "tp2+offload"),
        (64, Objective.LATENCY, "tp2+int4"),  # no bfloat16 there
    ],
)
def test_answers_stay_the_models_own_where_memory_allows(
    host_gb: float, objective: Objective, chosen: str
) -> None:
    machine = with_host(box("rtx-4090", 2), host_gb)
    made = plan(LLAMA_70B, machine, Workload(128, 128, 8, objective), "bfloat16", wide=True)
    assert made.chosen is not None and made.chosen.layout.name == chosen
    assert made.chosen.not_runnable is None
    same = host_gb == 256
    assert ("leaves its answers as they are" in made.explanation[0]) == same
    assert ("changes its answers" in made.explanation[0]) != same
    if same:
        assert any(
            s.startswith("Not chosen, since it changes the model's answers: tp2+int4")
            for s in made.explanation
        )
    assert any("such cards would hold it" in s for s in made.explanation)


def test_what_fits_is_not_streamed() -> None:
    for spec, machine in ((LLAMA_8B, box("rtx-4090", 2)), (LLAMA_70B, box("h100", 4))):
        made = plan(spec, machine, Workload(), "bfloat16", wide=True)
        assert made.chosen is not None and not made.chosen.offload
        assert not any(c.offload for c in made.candidates)


def test_two_layers_in_the_buffers_come_from_nowhere() -> None:
    placed = place(LLAMA_8B, Layout.parse("tp1+offload"), "bfloat16", box("h100", 1), room=Room(resident=30))
    (need,) = memories(placed, Workload())
    assert need.streaming is not None
    assert (need.streamed, need.streaming.buffers) == (0, BUFFERS)
    assert need.pinned > 0
    assert "offload" not in estimate(placed, Workload()).breakdown


def test_what_one_card_streams_is_no_surer_than_its_slot():
    made = plan(LLAMA_70B, box("h100", 1), Workload(), "bfloat16", layouts=[Layout.parse("tp1+offload")])
    assert made.candidates[0].estimate is not None
    assert 0.3 < made.candidates[0].estimate.spread < 0.4


def test_what_is_far_behind_is_told_in_times_not_in_thousands_of_per_cent():
    names = [Layout.parse(name) for name in ("tp2+int4", "tp2+offload")]
    said = " ".join(plan(LLAMA_70B, box("rtx-4090", 2), Workload(), "bfloat16", layouts=names).explanation)
    assert re.search(r"tp2\+offload comes next and takes \d\d\.\d times as long for a request", said)


def test_what_would_be_streamed_in_fewer_bits_is_told_with_the_memory_that_it_takes():
    said = plan(LLAMA_70B, box("rtx-4090", 1), Workload(), "bfloat16", wide=True).explanation
    assert re.search(r"tp1\+int4(\+kvfp8)?\+offload: .* it takes \d+\.\d GB of host memory", said[-1])


def test_a_cpus_own_memory_is_known():
    machine = with_devices(box("h100", 1), kind="cpu", host_bytes_per_s=None)
    room = Room(resident=5)
    noted = plan(LLAMA_8B, machine, Workload(), "bfloat16", layouts=[Layout.parse("tp1+offload")], room=room)
    assert noted.candidates[0].marked[-1].startswith("5 of a rank's 32 layers resident")
    assert "of which nothing is known" not in noted.candidates[0].marked[-1]
