"""The cost model's laws, of formats, mixtures of experts, offload and a load that never ends."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.topology import LinkKind, Provenance
from strategies import cost_links
from strategies.cost import estimate
from strategies.cost_memory import memories
from strategies.cost_ops import Pass
from strategies.cost_steps import HALVES, busy_s, eager_layer_s, stage_s
from strategies.engines import OURS, engine
from strategies.place import place
from strategies.plan import Layout
from strategies.spec import Experts, Latent, Workload
from tests.unit.machines import LLAMA_8B, LLAMA_70B, SMOL, box, with_devices, with_links
from tests.unit.test_cost import no_slower, predict, put

MIXTURE = replace(
    SMOL, name="mixture", experts=Experts(count=16, per_token=2, intermediate=512, shared=1, dense_layers=1)
)
LATENT = replace(MIXTURE, name="latent", kv_heads=9, latent=Latent(64, 128, 32, 16, 32))
kinds = given(
    spec=st.sampled_from([SMOL, MIXTURE, LATENT]),
    key=st.sampled_from(["rtx-4090", "h100", "b200", "l40s"]),
    layout=st.sampled_from(["tp1", "tp2", "dp2", "pp2", "tp3", "tp2dp2", "dp4"]),
    suffix=st.sampled_from(["", "+fp8", "+int8", "+int4", "+fp8+kvfp8"]),
    by=st.sampled_from(["shardwise", "vllm", "trtllm", "sglang", "unheard-of"]),
    workload=st.builds(
        Workload,
        prompt_tokens=st.integers(1, 9000),
        output_tokens=st.integers(1, 2000),
        concurrency=st.integers(1, 3000),
        steady=st.booleans(),
        ragged=st.booleans(),
    ),
    factor=st.floats(1.0, 20.0),
)


@settings(max_examples=80, deadline=None)
@kinds
def test_nothing_passes_the_limit_and_all_times_are_times(spec, key, layout, suffix, by, workload, factor):
    machine = with_links(box(key, 4), bytes_per_s=1e11 * factor)
    made = estimate(place(spec, Layout.parse(layout + suffix), "bfloat16", machine, engine(by)), workload)
    assert 0 < made.share_of_limit <= 1
    assert made.ttft_s > 0 and made.tpot_s > 0 and made.output_tokens_per_s > 0
    assert min(made.breakdown.values()) >= 0


@settings(max_examples=60, deadline=None)
@kinds
def test_faster_links_memory_and_cores_never_slow_a_step(spec, key, layout, suffix, by, workload, factor):
    machine = box(key, 4)
    put_so = place(spec, Layout.parse(layout + suffix), "bfloat16", machine, engine(by))
    before = estimate(put_so, replace(workload, steady=False))
    device = machine.devices[0]
    wider = with_links(machine, bytes_per_s=next(iter(machine.links.values())).bytes_per_s * factor)
    faster = with_devices(machine, bandwidth_bytes_per_s=device.bandwidth_bytes_per_s * factor)
    stronger = with_devices(machine, flops_per_s={d: f * factor for d, f in device.flops_per_s.items()})
    for better in (wider, faster, stronger):
        assert no_slower(estimate(replace(put_so, topology=better), replace(workload, steady=False)), before)


def test_fewer_bits_take_less_memory_and_no_longer_to_decode():
    machine = box("h100", 1)
    plain, eight, four = (predict(LLAMA_8B, name, machine) for name in ("tp1", "tp1+fp8", "tp1+int4"))
    assert plain.tpot_s > eight.tpot_s > four.tpot_s
    assert plain.memory_bytes_per_device > eight.memory_bytes_per_device > four.memory_bytes_per_device
    small, whole = (
        predict(LLAMA_8B, name, machine, concurrency=64).breakdown["kv"] for name in ("tp1+kvfp8", "tp1")
    )
    by = engine(OURS).kernels  # half of the bytes, which are widened on the way
    assert small == pytest.approx(whole / 2 * by.kv / by.kv_float8)


def test_a_load_that_never_ends_obeys_littles_law():
    machine = box("h100", 1)
    for at_once in (1, 16, 128):
        made = predict(LLAMA_8B, "tp1", machine, engine("vllm"), concurrency=at_once, steady=True)
        life_s = made.ttft_s - engine("vllm").first_s + 255 * made.tpot_s
        assert made.output_tokens_per_s * life_s == pytest.approx(at_once * 256, rel=0.03)


def test_a_server_in_front_bounds_the_rate_and_makes_requests_wait():
    by = replace(engine("vllm"), token_out_s=500e-6)
    machine = box("h100", 8)
    made = predict(LLAMA_8B, "tp8", machine, by, concurrency=256, steady=True)
    free = predict(LLAMA_8B, "tp8", machine, replace(by, token_out_s=0.0), concurrency=256, steady=True)
    assert made.output_tokens_per_s == pytest.approx(2000, rel=0.1)
    assert made.ttft_s > 5 * free.ttft_s
    assert made.tpot_s < free.tpot_s


def test_answers_of_many_lengths_leave_the_batch_thin_at_its_end():
    machine = box("h100", 1)
    even, ragged = (
        predict(LLAMA_8B, "tp1", machine, engine("vllm"), concurrency=150, ragged=r) for r in (False, True)
    )
    assert 0.3 < ragged.output_tokens_per_s / even.output_tokens_per_s < 0.8


def test_offloading_costs_the_way_over_the_slot():
    machine = box("rtx-4090", 1)
    made = predict(LLAMA_70B, "tp1+int8+offload", machine)
    placed = put(LLAMA_70B, "tp1+int8+offload", machine)
    streamed = memories(placed, Workload())[0].streamed
    assert made.tpot_s == pytest.approx(streamed / machine.devices[0].host_bytes_per_s, rel=0.02)
    four = predict(LLAMA_70B, "dp4+int8+offload", box("rtx-4090", 4), concurrency=4)
    assert four.tpot_s > 1.5 * made.tpot_s  # one host's memory serves them all


def test_small_sums_take_one_kernel_where_there_is_a_path():
    nvlink = box("h100", 8).link(0, 1)
    small = cost_links.all_reduce_s(nvlink, 8, 8192)
    assert small < cost_links.all_reduce_latency_s(nvlink, 8) / 2
    host = box("rtx-4090", 2).link(0, 1)
    assert cost_links.all_reduce_s(host, 2, 8192, mapped=True) < cost_links.all_reduce_s(host, 2, 8192) / 2
    # aiconfigurator's tables, H100, 16 MB over 2, 4 and 8 ranks by NCCL: 82, 99 and 122 µs.
    for ranks, microseconds in ((2, 82), (4, 99), (8, 122)):
        assert cost_links.all_reduce_s(nvlink, ranks, 2**24) * 1e6 == pytest.approx(microseconds, rel=0.25)


# --- steps that the host launches, sums beside products -----------------------------------------------------


def pass_of(
    layout: str, tokens: int, kind: LinkKind | None = None, **changes: Any
) -> tuple[float, dict[str, float]]:
    """Seconds of the first stage of our engine on two H100s, and what they would be one after another."""
    placement = place(LLAMA_8B, Layout.parse(layout), "bfloat16", box("h100", 2, kind))
    placement = replace(placement, engine=replace(placement.engine, **changes))
    work = Pass(0, 0, prompt_tokens=tokens, seen=tokens / 2, prompt_rows=1)
    parts = dict(stage_s(placement, 0, 0, work, 1.0))
    return busy_s(placement, 0, 0, parts, work), parts


def test_a_replayed_step_waits_for_no_launch() -> None:
    seconds, parts = pass_of("tp1", 512)
    assert seconds == sum(parts.values())


def test_a_launched_step_takes_what_the_host_takes_where_that_is_more() -> None:
    short, parts = pass_of("tp1", 513, eager_layer_s=1e-3)
    assert short == pytest.approx(LLAMA_8B.layers * 1e-3) and short > sum(parts.values())
    with_sums, parts = pass_of("tp2", 513, eager_layer_s=1e-3, eager_sum=0.25)
    assert with_sums == pytest.approx(1.5 * short) and with_sums > sum(parts.values())
    long, parts = pass_of("tp1", 8192, eager_layer_s=1e-3)
    assert long == sum(parts.values()) > LLAMA_8B.layers * 1e-3


def test_a_host_that_was_timed_counts_by_the_least_of_its_gpus() -> None:
    machine = box("h100", 2)
    timed = [replace(d, layer_overhead_s=s) for d, s in zip(machine.devices, (4e-4, 6e-4), strict=True)]
    placement = place(LLAMA_8B, Layout.parse("tp1"), "bfloat16", replace(machine, devices=tuple(timed)))
    by = placement.engine
    assert eager_layer_s(placement, timed[0]) == pytest.approx(4e-4 * by.eager_layers)
    untimed = place(LLAMA_8B, Layout.parse("tp1"), "bfloat16", machine)
    assert eager_layer_s(untimed, machine.devices[0]) == by.eager_layer_s


@given(tokens=st.integers(8192, 32768), kind=st.sampled_from([None, LinkKind.HOST]))
def test_sums_beside_products_save_most_of_the_shorter(tokens: int, kind: LinkKind | None) -> None:
    apart, parts = pass_of("tp2", tokens, kind, overlap_tokens=0, eager_layer_s=0.0)
    beside, _ = pass_of("tp2", tokens, kind, overlap_tokens=8192, eager_layer_s=0.0)
    sums = parts["all_reduce"]
    shorter = min(sums, apart - sums)
    assert apart == pytest.approx(sum(parts.values()))
    assert beside == pytest.approx(apart - 0.75 * shorter)
    assert beside >= max(sums, apart - sums)


def test_two_halves_are_launched_by_threads_that_wait_for_each_other() -> None:
    once, _ = pass_of("tp2", 8192, overlap_tokens=0, eager_layer_s=0.1)
    twice, _ = pass_of("tp2", 8192, overlap_tokens=8192, eager_layer_s=0.1)
    assert twice == pytest.approx(HALVES * once)


@settings(max_examples=60, deadline=None)
@given(
    concurrency=st.integers(1, 512),
    prompt=st.integers(1, 4096),
    output=st.integers(1, 512),
    layout=st.sampled_from(["tp1", "tp2", "pp2", "dp2"]),
)
def test_measured_rates_pass_no_limit_either(concurrency: int, prompt: int, output: int, layout: str) -> None:
    machine = with_devices(box("h100", 2), provenance=Provenance.MEASURED, bandwidth_bytes_per_s=3.05e12)
    load = Workload(prompt, output, concurrency)
    assert 0 < estimate(place(LLAMA_8B, Layout.parse(layout), "bfloat16", machine), load).share_of_limit <= 1


def test_tokens_that_come_while_others_prompts_are_read_count() -> None:
    """Of n steps of prompts a request has seen half on average, a token in each: so many steps less are to come."""
    placement = place(LLAMA_8B, Layout.parse("tp1"), "bfloat16", box("h100", 1))
    load = Workload(prompt_tokens=2048, output_tokens=101, concurrency=21)  # a prompt a step
    made = estimate(placement, load)
    step_s = sum(made.breakdown.values())
    last_s = 2 * (made.ttft_s - placement.engine.first_s) - (made.ttft_s - placement.engine.first_s) * 2 / 22
    waits_s = last_s - (made.ttft_s - placement.engine.first_s)
    assert made.tpot_s == pytest.approx((waits_s + (100 - 10) * step_s) / 100, rel=0.02)


def test_gaps_between_kernels_are_as_long_as_a_generation_of_gpus_makes_them() -> None:
    made = engine("vllm")
    own = replace(made, kernels=replace(made.kernels, gaps_on={"NVIDIA H100 80GB HBM3": 0.5}))

    def host_s(by: Any) -> float:
        return float(
            stage_s(
                place(LLAMA_8B, Layout.parse("tp1"), "bfloat16", box("h100", 1), by), 0, 0, Pass(1, 1024), 1.0
            )["host"]
        )

    bare = replace(made, kernels=replace(made.kernels, gaps_on={}, product_gap_s=0.0, attention_gap_s=0.0))
    assert host_s(own) - host_s(bare) == pytest.approx((host_s(made) - host_s(bare)) / 2)


def test_a_prompt_that_joins_waits_for_launches_under_any_engine() -> None:
    """What tensor parallelism saves of a short prompt's products is lost where the host launches layer by layer."""
    load = Workload(1024, 128, 128, steady=True)
    tpot = {
        launch_s: estimate(
            place(
                LLAMA_8B,
                Layout.parse("tp8"),
                "bfloat16",
                box("h100", 8),
                replace(engine("vllm"), eager_layer_s=launch_s),
            ),
            load,
        ).tpot_s
        for launch_s in (0.0, 7e-4)
    }
    assert tpot[7e-4] > 1.2 * tpot[0.0]
