"""Mixtures of experts, latent attention and formats: planned and priced, refused by the engine; names of layouts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import BadLayout, BadModel
from strategies.cost_memory import kv_bytes_per_token, linear_params, memories, weight_bytes
from strategies.cost_ops import Pass, mean_window, rank_s
from strategies.cost_steps import stage_s
from strategies.formats import FORMATS
from strategies.place import place
from strategies.plan import Layout, ParallelDims, Placement
from strategies.read_spec import builtin, from_hf_config
from strategies.runnable import check_known, why_not
from strategies.spec import Experts, ModelSpec, Workload
from tests.unit.machines import LLAMA_8B, box

MIXTURES = {  # billions of parameters: all, and those that a token goes through (its embedding row left out)
    "DeepSeek-R1": (671.0, 37),
    "Kimi-K2.5": (1026, 32),
    "Qwen3-235B-A22B": (235, 22),
    "Qwen3-30B-A3B": (30.5, 3),
    "gpt-oss-120b": (117, 5.1),
    "MiniMax-M2.5": (229, 10),
    "GLM-4.5-Air": (106, 12),
}


def spec_of(name: str) -> ModelSpec:
    found = builtin(name)
    assert found is not None
    return found


def put(spec: ModelSpec, layout: str, key: str = "h200", n: int = 8) -> Placement:
    return place(spec, Layout.parse(layout), "bfloat16", box(key, n))


@pytest.mark.parametrize("name", MIXTURES)
def test_sizes_are_those_that_the_makers_give(name):
    spec, (total, active) = spec_of(name), MIXTURES[name]
    assert spec.total_params / 1e9 == pytest.approx(total, rel=0.01)
    assert (spec.active_params + spec.embedding_params) / 1e9 == pytest.approx(active, rel=0.07)


def test_a_latent_row_is_70_kb_a_token_on_every_rank():
    spec = spec_of("DeepSeek-V3")
    assert spec.kv_bytes_per_token("bfloat16") == 61 * 576 * 2
    assert kv_bytes_per_token(put(spec, "tp8"), 0) == 61 * 576 * 2


@pytest.mark.parametrize("layout", ["tp8", "tp8ep8", "dp8ep8", "tp4dp2ep8", "tp4pp2"])
def test_ranks_hold_every_expert_between_them(layout):
    spec = spec_of("Qwen3-235B-A22B")
    put_so = put(spec, layout)
    held = [linear_params(spec, shard, put_so.dims)[1] for shard in put_so.shards]
    copies = put_so.dims.dp if put_so.dims.expert_ranks == put_so.dims.tp else 1
    total = sum(held) * put_so.dims.dp / copies
    assert total == pytest.approx(94 * 128 * 3 * 4096 * 1536, rel=1e-6)


def test_experts_kept_whole_cost_what_experts_split_do_but_read_no_more():
    spec = spec_of("Qwen3-235B-A22B")
    work = Pass(decodes=64, context=1000)
    split, whole = (rank_s(put(spec, name), 0, 0, work, 1.0) for name in ("tp8", "tp8ep8"))
    assert whole["weights"] <= split["weights"] * 1.01


def test_a_single_token_hits_as_many_experts_as_it_takes_and_many_hit_all():
    spec = spec_of("Qwen3-235B-A22B")

    def reads(tokens: int) -> float:
        return rank_s(put(spec, "tp8"), 0, 0, Pass(decodes=tokens, context=1), 1.0)["weights"]

    sparse = replace(spec, experts=replace(spec.experts, count=8))  # where every token takes every expert
    all_hit = rank_s(put(sparse, "tp8"), 0, 0, Pass(decodes=1, context=1), 1.0)["weights"]
    assert reads(1) == pytest.approx(all_hit, rel=0.02)
    assert reads(512) > 8 * reads(1)


def test_replicas_that_share_experts_exchange_tokens():
    spec = spec_of("DeepSeek-R1")
    machine, work = box("h200", 8), Pass(decodes=16, context=1000)
    shared = place(spec, Layout.parse("dp8ep8"), "bfloat16", machine)
    assert stage_s(shared, 0, 0, work, 1.0)["all_to_all"] > 0
    assert "all_to_all" not in stage_s(put(spec, "tp8ep8"), 0, 0, work, 1.0)


def test_sliding_layers_see_their_window():
    spec = spec_of("gpt-oss-120b")
    assert spec.windows[:2] == (128, None)
    assert mean_window(spec, range(36), 10_000) == (128 + 10_000) / 2


def test_a_text_config_inside_is_what_is_read():
    inner = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"}
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    sizes |= {
        "num_key_value_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 99,
        "rms_norm_eps": 1e-5,
    }
    latent = {
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    }
    mixture = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
    }
    config = {"model_type": "seeing", "text_config": {**inner, **sizes, **latent, **mixture}}
    spec = from_hf_config(config, "k")
    assert spec.experts == Experts(8, 2, 32, 1, 0)
    assert spec.latent is not None and (spec.latent.q_rank, spec.latent.cached) == (0, 20)


def test_formats_shrink_weights_and_the_cache():
    spec = LLAMA_8B
    plain = weight_bytes(put(spec, "tp1"), 0)
    tables = 2 * 2 * spec.embedding_params
    for name, ratio in (("fp8", 0.5), ("int8", 0.5), ("int4", 0.2656), ("fp4", 0.281)):
        kept = weight_bytes(put(spec, f"tp1+{name}"), 0)
        assert (kept - tables) / (plain - tables) == pytest.approx(ratio, rel=0.01)
    assert kv_bytes_per_token(put(spec, "tp1+kvfp8"), 0) * 2 == kv_bytes_per_token(put(spec, "tp1"), 0)


def test_offload_streams_what_does_not_fit_and_no_more():
    spec, machine = spec_of("Llama-3.3-70B"), box("rtx-4090", 2)
    put_so = place(spec, Layout.parse("tp2+fp8+offload"), "bfloat16", machine)
    need = memories(put_so, Workload())[0]
    assert need.fixed <= need.free
    assert need.kv_tokens >= 1280
    whole = weight_bytes(put_so, 0)
    assert need.weights < whole <= need.weights + need.streamed
    fits = place(LLAMA_8B, Layout.parse("tp2+offload"), "bfloat16", machine)
    assert memories(fits, Workload())[0].streamed == 0


@pytest.mark.parametrize(
    "name",
    ["tp8ep8+fp8", "tp2+int4+offload", "tp1+offload", "dp8ep8", "tp2+fp8+kvfp8", "pp2+kvfp8", "tp2+gguf"],
)
def test_a_layouts_name_reads_back(name):
    assert Layout.parse(name).name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tp2+fp9", r"\+fp9 is not a format; formats are \+kvfp8, \+fp8"),
        ("tp2+fp8+int4", "names 2 formats"),
        ("tp2+offload+int8", "offload comes last, and once: tp2.int8.offload"),
        ("tp2+offload+offload", "offload comes last, and once: tp2.offload"),
        ("tp4ep3", "ep must divide tp or equal tp × dp, 4; it is 3"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name, said):
    with pytest.raises(BadLayout, match=said):
        Layout.parse(name)


@pytest.mark.parametrize("name", ["tp2+fp8", "tp2ep2", "tp2+offload"])
def test_what_can_only_be_planned_is_no_layout_to_run(name):
    with pytest.raises(
        BadLayout, match=r"can be planned, not run, by this version; run a plain one such as tp2"
    ):
        ParallelDims.parse(name)


def test_the_engine_says_what_it_does_not_run(tmp_path: Path, capsys):
    assert why_not(LLAMA_8B, Layout.parse("tp2")) is None
    assert why_not(LLAMA_8B, Layout.parse("tp2+int4")) is None
    assert why_not(LLAMA_8B, Layout.parse("tp2+fp4")) == "+fp4 is planned only"
    assert "runs where --layout names it" in why_not(LLAMA_8B, Layout.parse("tp2+int4"), named=False)
    assert why_not(LLAMA_8B, Layout.parse("tp2+int4+offload")) is None
    assert "where --layout names it" in why_not(LLAMA_8B, Layout.parse("tp2+offload"), named=False)
    assert "has latent attention" in why_not(spec_of("DeepSeek-R1"), Layout.parse("tp8"))
    check_known(LLAMA_8B)
    with pytest.raises(
        BadModel, match=r"DeepSeek-R1 \(deepseek_v3\) is a mixture of experts; the engine has"
    ):
        check_known(spec_of("DeepSeek-R1"))
    from launch import __main__

    assert __main__.main(["generate", "qwen3-30b-a3b", "--weights", "dummy", "--prompt", "hi"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_experts_need_experts():
    with pytest.raises(BadLayout, match=r"ep=2 splits experts; Llama-3.1-8B has no experts"):
        put(LLAMA_8B, "tp2ep2")


def test_every_format_is_named_once():
    assert len({kept.name for kept in FORMATS.values()}) == len(FORMATS) == 16
    assert json.dumps(sorted(FORMATS))
