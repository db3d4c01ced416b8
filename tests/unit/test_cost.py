"""The cost model against figures worked by hand, against vLLM measured on two H100s, and for its laws."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.topology import LinkKind, Provenance, Topology
from orchestrator.scheduler import SchedulerConfig
from strategies import cost_links, cost_memory
from strategies.cost import estimate
from strategies.cost_memory import memories
from strategies.cost_steps import decode_step_s, prefill_s
from strategies.engines import Engine, Kernels, engine, with_limits
from strategies.place import place, rejection
from strategies.plan import Estimate, Layout, Placement
from strategies.spec import ModelSpec, Objective, Workload
from tests.unit.machines import LLAMA_8B, LLAMA_70B, SMOL, box, link, with_devices, with_links


def put(
    spec: ModelSpec, layout: str, machine: Topology, dtype: str = "bfloat16", by: Engine | None = None
) -> Placement:
    return place(spec, Layout.parse(layout), dtype, machine, by)


def predict(
    spec: ModelSpec, layout: str, machine: Topology, by: Engine | None = None, **workload: object
) -> Estimate:
    return estimate(put(spec, layout, machine, by=by), Workload(**workload))


# --- against figures worked out elsewhere -------------------------------------------------------------------

# Two RTX 4090s, Llama 8B in bfloat16 at a context of 1,152, tokens a second: 15 µs a layer, prefill at 0.60
# of the FLOP/s; hs12 is a host-staged all-reduce of 13 µs and 12 GB/s, hs6 of 25 µs and 6 GB/s.
DECODE = {
    ("tp1", 1): 52,
    ("tp1", 8): 385,
    ("tp1", 32): 1234,
    ("dp2", 8): 401,
    ("dp2", 32): 1421,
    ("pp2", 1): 52,
    ("pp2", 8): 400,
    ("pp2", 32): 1418,
    ("tp2-hs12", 1): 93,
    ("tp2-hs12", 8): 677,
    ("tp2-hs12", 32): 2072,
    ("tp2-hs6", 1): 86,
    ("tp2-hs6", 8): 618,
    ("tp2-hs6", 32): 1817,
}
PREFILL_MS = {
    ("tp1", 1024): 155,
    ("tp2-hs12", 1024): 123,
    ("tp2-hs6", 1024): 169,
    ("pp2", 1024): 156,
    ("tp1", 4096): 620,
    ("tp2-hs12", 4096): 490,
    ("tp2-hs6", 4096): 669,
    ("pp2", 4096): 469,  # two chunks of the token budget
}


BY_HAND = replace(
    engine("shardwise"),
    kernels=Kernels(
        weights={16: 0.80},
        few_rows={},
        gaps_on={},
        compute={16: 0.60},
        expert_weights={},
        expert_compute={},
        kv=0.70,
        latent=1.0,
        prompt_attention=0.25,
        expert_tile=1.0,
        residual_passes=0.0,
        sampling_passes=0.0,
        product_gap_s=0.0,
        attention_gap_s=15e-6,
        latent_gap_s=0.0,
        experts_gap_s=0.0,
        all_reduce=1.0,
        exchange=1.0,
    ),
    reads=1.0,
    launches=1.0,
    prompts=1.0,
    step_s=0.0,
    sequence_s=0.0,
    prompt_s=0.0,
    eager_layer_s=0.0,
    eager_layers=0.0,
    eager_sum=0.0,
    overlap_tokens=0,
)


def worked(name: str) -> Placement:
    layout, _, path = name.partition("-")
    between = link(25, 6) if path == "hs6" else link(13, 12)
    return put(LLAMA_8B, layout, replace(box("rtx-4090", 2), links={(0, 1): between}), by=BY_HAND)


@pytest.mark.parametrize(("name", "batch"), DECODE)
def test_decode_agrees_with_the_worked_table(name, batch):
    placement = worked(name)
    each = -(-batch // placement.dims.dp)
    step_s = sum(decode_step_s(placement, 0, each, 1152, busy=1.0).values())
    assert batch / step_s == pytest.approx(DECODE[name, batch], rel=0.05)


@pytest.mark.parametrize(("name", "tokens"), PREFILL_MS)
def test_prefill_agrees_with_the_worked_table(name, tokens):
    last_s, _ = prefill_s(worked(name), 0, 1, tokens, busy=1.0)
    # The table leaves out attention (4 % of 1,024 tokens, 17 % of 4,096); it charges the head every time.
    assert last_s * 1e3 == pytest.approx(PREFILL_MS[name, tokens], rel=0.14)


# vLLM 0.26.0 on 2 × H100 SXM, Llama-3.1-8B shape in bfloat16, 2026-11-21: one request of 512 prompt tokens
# (TPOT in ms), and 256 requests at once of 1,024 + 256 (output tokens a second). HOST: NCCL_P2P_DISABLE=1.
VLLM = [
    ("tp1", None, 6.53, None),
    ("dp2", None, 6.53, 9954),
    ("tp2", None, 4.22, 9418),
    ("pp2", None, 6.57, 9241),
    ("tp2", LinkKind.HOST, 4.75, 5083),
    ("pp2", LinkKind.HOST, 6.57, 9018),
]


@pytest.mark.parametrize(("layout", "kind", "tpot_ms", "tokens_per_s"), VLLM)
def test_data_sheets_alone_predict_vllm_on_two_h100s(layout, kind, tpot_ms, tokens_per_s):
    machine = box("h100", 2, kind)
    single = predict(LLAMA_8B, layout, machine, engine("vllm"), prompt_tokens=512, output_tokens=128)
    assert single.tpot_s * 1e3 == pytest.approx(tpot_ms, rel=0.20)
    if tokens_per_s is not None:
        batch = predict(LLAMA_8B, layout, machine, engine("vllm"), concurrency=256)
        assert batch.output_tokens_per_s == pytest.approx(tokens_per_s, rel=0.25)


@pytest.mark.parametrize("name", ["shardwise", "cpu"])
def test_our_engine_is_priced_as_its_scheduler_comes(name):
    ours, config = engine(name), SchedulerConfig(num_blocks=1)
    assert (ours.chunk_tokens, ours.max_sequences) == (config.max_num_batched_tokens, config.max_num_seqs)


# Ours on the same machine, 2026-11-22 (docs/performance.md): ms from token to token of one sequence at a context of
# 600, and of 256 at 1,152; 256 requests at once of 1,024 + 256, 8,192 tokens a step.
OURS = [("tp1", 1, 600, 5.11), ("tp1", 256, 1152, 20.7), ("tp2", 1, 600, 2.94)]
OURS_BATCH = {"tp1": 5741, "dp2": 10172, "tp2": 9897}


@pytest.mark.parametrize(("layout", "sequences", "context", "step_ms"), OURS)
def test_data_sheets_alone_predict_our_steps_on_two_h100s(layout, sequences, context, step_ms):
    step = decode_step_s(put(LLAMA_8B, layout, box("h100", 2)), 0, sequences, context, 1.0)
    assert sum(step.values()) * 1e3 == pytest.approx(step_ms, rel=0.05)


@pytest.mark.parametrize("layout", OURS_BATCH)
def test_data_sheets_alone_predict_our_batches_on_two_h100s(layout):
    by = with_limits(engine("shardwise"), chunk_tokens=8192, max_sequences=256)
    made = predict(LLAMA_8B, layout, box("h100", 2), by, concurrency=256)
    assert made.output_tokens_per_s == pytest.approx(OURS_BATCH[layout], rel=0.08)


# Formats of ours on one H100, 2026-11-22, python -m tests.bench.formats_bench (docs/accuracy.md): ms from token to
# token of one sequence at a context of 576, of 128 at 96; prompt tokens a second in steps of 8,192. int4's are
# of the day after, with four_bits_few.cu.
FORMATS_MEASURED = {
    "tp1": (5.12, 7.55, 44239),
    "tp1+int8": (3.29, 8.23, 42433),
    "tp1+int4": (2.33, 6.60, 42719),
    "tp1+fp8": (3.18, 5.79, 68290),
}


@pytest.mark.parametrize("is_measured", [False, True])
@pytest.mark.parametrize("layout", FORMATS_MEASURED)
def test_formats_are_priced_as_their_kernels_do(layout, is_measured):
    machine = box("h100", 1)
    if is_measured:  # as the profile of that day has it
        (sheet,) = machine.devices
        probed = {
            **{d: 0.74 * rate for d, rate in sheet.flops_per_s.items()},
            "float32": 50.4e12,
            "bfloat16": 736e12,
        }
        machine = with_devices(
            machine, bandwidth_bytes_per_s=3.06e12, flops_per_s=probed, provenance=Provenance.MEASURED
        )
    by = with_limits(engine("shardwise"), chunk_tokens=8192, max_sequences=256)
    placed = put(LLAMA_8B, layout, machine, by=by)
    single, many, prompts = FORMATS_MEASURED[layout]
    assert sum(decode_step_s(placed, 0, 1, 576, 1.0).values()) * 1e3 == pytest.approx(single, rel=0.05)
    assert sum(decode_step_s(placed, 0, 128, 96, 1.0).values()) * 1e3 == pytest.approx(many, rel=0.10)
    assert 65_536 / prefill_s(placed, 0, 64, 1024, 1.0)[0] == pytest.approx(prompts, rel=0.06)


def test_all_reduce_of_two_ranks_is_latency_and_every_byte_once():
    host = link(15, 29)
    assert cost_links.all_reduce_s(host, 2, 16384) == pytest.approx(15e-6 + 16384 / 29e9)
    # Measured, two H100s through host memory in a CUDA graph: 15.5 µs at 16 KB, 9,268 µs at 256 MB.
    assert cost_links.all_reduce_s(host, 2, 16384) == pytest.approx(15.5e-6, rel=0.02)
    assert cost_links.all_reduce_s(host, 2, 268435456) == pytest.approx(9268e-6, rel=0.02)


def test_all_reduce_latency_between_and_beyond_the_known_ranks():
    known = replace(link(12, 100), all_reduce_latency_s={2: 12e-6, 4: 18e-6, 8: 30e-6})
    assert cost_links.all_reduce_latency_s(known, 3) == pytest.approx(15e-6)
    assert cost_links.all_reduce_latency_s(known, 6) == pytest.approx(24e-6)
    assert cost_links.all_reduce_latency_s(known, 16) == pytest.approx(54e-6)
    # NCCL on H100: 6.9, 10.5 and 17.5 µs over 2, 4 and 8 ranks.
    for ranks, microseconds in ((2, 6.9), (4, 10.5), (8, 17.5)):
        assert cost_links.all_reduce_latency_s(link(6.9, 260), ranks) == pytest.approx(
            microseconds * 1e-6, rel=0.02
        )


# --- memory -------------------------------------------------------------------------------------------------


def test_weights_of_70b_are_141_gb():
    whole = put(LLAMA_70B, "tp1", box("h200", 1))
    assert round(cost_memory.weight_bytes(whole, 0) / 1e9, 1) == 141.1


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp3", "pp2", "pp3", "tp2pp2", "tp3pp2", "tp9"])
@pytest.mark.parametrize("spec", [SMOL, LLAMA_8B], ids=lambda spec: spec.name)
def test_ranks_hold_the_model_between_them(spec, layout):
    placement = put(spec, layout, box("h100", 9))
    ranks = range(placement.dims.replica_size)
    held = 2 * sum(cost_memory.weight_bytes(placement, rank) for rank in ranks)
    assert held >= 4 * spec.total_params
    kv = sum(need.kv_per_token for need in memories(placement, Workload()))
    assert kv >= spec.kv_bytes_per_token("bfloat16")
    if spec.kv_heads % placement.dims.tp == 0:
        assert kv == spec.kv_bytes_per_token("bfloat16")


def test_replicated_kv_heads_are_paid_for():
    by_8 = memories(put(LLAMA_8B, "tp8", box("h100", 16)), Workload())
    by_16 = memories(put(LLAMA_8B, "tp16", box("h100", 16)), Workload())
    assert by_16[0].kv_per_token == by_8[0].kv_per_token  # one whole head each, in both


def test_a_tied_head_is_stored_once_on_one_stage_and_twice_on_two():
    table = SMOL.embedding_params * 4
    whole, split = (put(SMOL, layout, box("h100", 2), "float32") for layout in ("tp1", "pp2"))
    one = cost_memory.weight_bytes(whole, 0)
    two = sum(cost_memory.weight_bytes(split, rank) for rank in (0, 1))
    assert two - one == table


def test_ranks_of_a_pool_divide_its_memory():
    alone = memories(put(SMOL, "tp1", box("cpu", 4, pool="host"), "float32"), Workload())
    four = memories(put(SMOL, "dp4", box("cpu", 4, pool="host"), "float32"), Workload())
    assert four[0].free == alone[0].free // 4


# --- the laws -----------------------------------------------------------------------------------------------


def test_a_pipeline_at_one_sequence_is_one_gpu_and_its_hops():
    machine = box("rtx-4090", 2)
    one = sum(decode_step_s(put(LLAMA_8B, "tp1", machine), 0, 1, 1152, 1.0).values())
    step = decode_step_s(put(LLAMA_8B, "pp2", machine), 0, 1, 1152, 1.0)
    own = engine("shardwise")
    host = own.step_s + own.sequence_s  # each stage's own
    assert sum(step.values()) == pytest.approx(one + host + step["send_recv"], rel=1e-9)


def test_a_pipeline_in_full_flight_gives_what_data_parallelism_does():
    machine = with_devices(box("h100", 2), step_overhead_s=0.0)
    piped = predict(LLAMA_8B, "pp2", machine, concurrency=64).output_tokens_per_s
    split = predict(LLAMA_8B, "dp2", machine, concurrency=64).output_tokens_per_s
    assert piped == pytest.approx(split, rel=0.06)


def test_more_ranks_of_one_cpu_read_no_faster():
    machine = box("cpu", 2, pool="host")
    one = decode_step_s(put(SMOL, "tp1", machine, "float32"), 0, 1, 64, 1.0)
    two = decode_step_s(put(SMOL, "tp2", machine, "float32"), 0, 1, 64, 1.0)
    assert two["weights"] >= one["weights"]
    # Of a pipeline with one sequence a single stage works at a time, and has all the bandwidth.
    piped = decode_step_s(put(SMOL, "pp2", machine, "float32"), 0, 1, 64, 1.0)
    assert piped["weights"] == pytest.approx(one["weights"])


def test_the_slowest_rank_bounds_an_uneven_split():
    machine = box("h100", 3)
    step = decode_step_s(put(LLAMA_8B, "tp3", machine), 0, 128, 1152, 1.0)  # 8 KV heads: 3, 3, 2
    whole = decode_step_s(put(LLAMA_8B, "tp1", machine), 0, 128, 1152, 1.0)
    assert step["kv"] == pytest.approx(whole["kv"] * 3 / 8)


def test_a_measured_device_is_taken_closer_to_its_figures():
    sheet = box("h100", 1)
    measured = with_devices(sheet, provenance=Provenance.MEASURED)
    assert predict(LLAMA_8B, "tp1", measured).tpot_s < predict(LLAMA_8B, "tp1", sheet).tpot_s


def test_sliding_windows_read_less():
    windowed = replace(LLAMA_8B, windows=(512,) * 32)
    machine = box("h100", 1)
    near, far = ({"prompt_tokens": n, "concurrency": 32} for n in (400, 8000))
    assert predict(windowed, "tp1", machine, **far).tpot_s < predict(LLAMA_8B, "tp1", machine, **far).tpot_s
    assert predict(windowed, "tp1", machine, **near).breakdown["kv"] == pytest.approx(
        predict(LLAMA_8B, "tp1", machine, **near).breakdown["kv"], rel=0.05
    )


def test_requests_that_do_not_fit_wait_in_their_ttft():
    machine = box("rtx-4090", 1)
    fits = predict(LLAMA_8B, "tp1", machine, concurrency=32)
    waits = predict(LLAMA_8B, "tp1", machine, concurrency=320)
    assert fits.kv_tokens // 1280 < 320
    assert waits.ttft_s > 3 * fits.ttft_s
    assert waits.output_tokens_per_s < 2 * fits.output_tokens_per_s


def test_who_has_no_room_for_its_answer_takes_a_turn_of_its_own():
    machine, prompt, output = box("rtx-4090", 1), 512, 128

    def of(concurrency: int) -> Estimate:
        return predict(
            LLAMA_8B, "tp1", machine, prompt_tokens=prompt, output_tokens=output, concurrency=concurrency
        )

    def seconds(concurrency: int) -> float:
        return concurrency * output / of(concurrency).output_tokens_per_s

    room = of(90).kv_tokens
    fits, answers, prompts = 90, room // (prompt + output), room // prompt
    assert fits < answers + 1 < prompts < 2 * fits
    # Few too many: all are read, and those that have to give way do so near their ends.
    own_s = (output - 1) * of(1).tpot_s
    assert seconds(fits) < seconds(answers + 1) < seconds(fits) + own_s / 4
    # As many as prompts fit: who gives way has nearly its whole answer to come, but its first token is there.
    assert own_s < seconds(prompts) - seconds(fits) - (prompts - fits) * of(1).ttft_s < 2 * own_s
    assert of(prompts).ttft_s < of(fits).ttft_s * prompts / fits * 1.05
    # Twice as many: half wait for the end of the others.
    assert seconds(2 * fits) > 2 * seconds(fits)
    assert of(2 * fits).ttft_s > of(fits).ttft_s + 0.4 * seconds(fits)


def test_a_dollar_figure_needs_every_price():
    priced = predict(LLAMA_8B, "tp2", box("h100", 2))
    assert priced.usd_per_million_tokens == pytest.approx(2 * 4.76 / 3600 / priced.output_tokens_per_s * 1e6)
    assert (
        predict(LLAMA_8B, "tp2", with_devices(box("h100", 2), usd_per_hour=None)).usd_per_million_tokens
        is None
    )


LAYOUTS = ["tp1", "tp2", "pp2", "dp2", "tp3", "tp4", "pp3", "tp2pp2", "tp2dp2", "pp2dp2", "dp4"]
workloads = st.builds(
    Workload,
    prompt_tokens=st.integers(1, 5000),
    output_tokens=st.integers(1, 600),
    concurrency=st.integers(1, 600),
    objective=st.sampled_from(Objective),
)
machines = st.sampled_from(
    [
        box("h100", 4),
        box("h100", 4, LinkKind.HOST),
        box("l40s", 4),
        box("b200", 4),
        box("cpu", 4, pool="host"),
    ]
)
cases = given(
    machine=machines, layout=st.sampled_from(LAYOUTS), workload=workloads, factor=st.floats(1.0, 20.0)
)


def fitting(machine: Topology, layout: str, workload: Workload, spec: ModelSpec = SMOL) -> Placement | None:
    placement = put(spec, layout, machine, "float32")
    return None if rejection(placement, workload, None) else placement


def no_slower(fast: Estimate, slow: Estimate) -> bool:
    slack = 1 + 1e-9
    return (
        fast.ttft_s <= slow.ttft_s * slack
        and fast.tpot_s <= slow.tpot_s * slack
        and fast.output_tokens_per_s * slack >= slow.output_tokens_per_s
    )


@settings(max_examples=60, deadline=None)
@cases
def test_more_bandwidth_is_never_slower(machine, layout, workload, factor):
    placement = fitting(machine, layout, workload)
    if placement is None:
        return
    before = estimate(placement, workload)
    rate = next(iter(machine.links.values())).bytes_per_s
    wider = replace(placement, topology=with_links(machine, bytes_per_s=rate * factor))
    assert no_slower(estimate(wider, workload), before)
    memory = machine.devices[0].bandwidth_bytes_per_s
    faster = replace(placement, topology=with_devices(machine, bandwidth_bytes_per_s=memory * factor))
    assert no_slower(estimate(faster, workload), before)


@settings(max_examples=60, deadline=None)
@cases
def test_no_share_of_the_limit_passes_one(machine, layout, workload, factor):
    made = with_devices(machine, layer_overhead_s=0.0, step_overhead_s=0.0, provenance=Provenance.MEASURED)
    made = with_links(made, bytes_per_s=1e12 * factor, latency_s=0.0)
    placement = fitting(made, layout, workload)
    if placement is not None:
        assert 0 < estimate(placement, workload).share_of_limit <= 1


@settings(max_examples=60, deadline=None)
@cases
def test_more_memory_is_never_less_feasible(machine, layout, workload, factor):
    small = with_devices(machine, free_bytes=2_000_000_000)
    large = with_devices(machine, free_bytes=int(2_000_000_000 * factor))
    if fitting(small, layout, workload) is not None:
        assert fitting(large, layout, workload) is not None


@settings(max_examples=60, deadline=None)
@cases
def test_a_breakdown_is_the_step_and_memory_is_what_is_free(machine, layout, workload, factor):
    placement = fitting(machine, layout, workload)
    if placement is None:
        return
    made = estimate(placement, workload)
    assert min(made.breakdown.values()) >= 0
    assert made.tpot_s >= sum(made.breakdown.values()) * (1 - 1e-9)
    assert made.memory_bytes_per_device <= max(need.free for need in memories(placement, workload))
