"""What the engine's flags come to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from cluster.errors import BadLayout, UserError
from launch.configured import engine_config
from launch.options import (
    EngineOptions,
    add_engine_arguments,
    add_layout_arguments,
    check_blocks,
    engine_options,
    layout,
)
from strategies.plan import ParallelDims


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    add_layout_arguments(parser)
    return parser.parse_args(["model", *argv])


@pytest.mark.parametrize(
    ("argv", "dims"),
    [
        ("", None),
        ("--layout auto", None),
        ("--layout tp2pp3dp4", ParallelDims(2, 3, 4)),
        ("-tp 2", ParallelDims(2, 1, 1)),
        ("-pp 3 -dp 4", ParallelDims(1, 3, 4)),
        ("--tensor-parallel-size 2 --data-parallel-size 2", ParallelDims(2, 1, 2)),
    ],
)
def test_layouts(argv: str, dims: ParallelDims | None) -> None:
    assert layout(parsed(*argv.split())) == dims


@pytest.mark.parametrize("kept", ["", "int8", "int4", "fp8"])
def test_formats(kept: str, model: Path) -> None:
    argv = ["--weights", "dummy", "--device", "cpu", "--layout", f"tp2+{kept}" if kept else "tp2"]
    args = parsed(*argv)
    args.model = str(model)
    assert layout(args) == ParallelDims(2)
    assert engine_options(args).format == kept


@pytest.mark.parametrize("name", ["tp2+fp4", "tp2+fp4+kvfp8", "tp2+fp4+offload", "tp2ep2"])
def test_formats_that_are_planned_only(name: str) -> None:
    with pytest.raises(BadLayout, match="can be planned, not run, by this version"):
        layout(parsed("--layout", name))


@pytest.mark.parametrize("argv", ["--layout tp2 -tp 2", "--layout auto -dp 2", "-pp 0", "-tp -3"])
def test_layouts_that_are_refused(argv: str) -> None:
    with pytest.raises(BadLayout):
        layout(parsed(*argv.split()))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def made(model: Path, *argv: str) -> EngineOptions:
    args = parsed("--weights", "dummy", "--device", "cpu", *argv)
    args.model = str(model)
    return engine_options(args)


@pytest.mark.parametrize("asked", ["0.5", "nan", "1e9"])
def test_a_step_timeout_has_bounds(model: Path, asked: str) -> None:
    assert made(model, "--step-timeout", "30").step_timeout_s == 30
    with pytest.raises(UserError, match=r"--step-timeout is .*; it must be from 1 to 86400 seconds"):
        made(model, "--step-timeout", asked)


def test_defaults_on_a_cpu(model: Path) -> None:
    options = made(model)
    assert (options.device, options.dtype, options.dummy_weights) == ("cpu", "float32", True)
    assert (options.max_model_len, options.num_blocks, options.prefix_caching) == (None, None, True)
    assert options.least_context == 256  # all positions, where these are few
    assert made(model, "--dtype", "bfloat16").dtype == "bfloat16"


def test_no_sequence_is_longer_than_the_blocks_asked_for(model: Path) -> None:
    assert made(model).most_context == 256
    assert made(model, "--max-model-len", "100").most_context == 100
    assert made(model, "--num-gpu-blocks-override", "3").most_context == 48


def test_environment_says_whether_gpus_reach_each_other(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(model).peer_access
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert not made(model).peer_access


def test_blocks_asked_for_must_hold_a_context(model: Path) -> None:
    check_blocks(made(model, "--num-gpu-blocks-override", "16"))
    check_blocks(made(model, "--num-gpu-blocks-override", "2", "--max-model-len", "32"))
    with pytest.raises(UserError, match="15 blocks of 16 hold 240 tokens, fewer than a context of 256"):
        check_blocks(made(model, "--num-gpu-blocks-override", "15"))


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto", "ray://10.0.0.1:10001"])
def test_addresses(model: Path, address: str) -> None:
    assert made(model, "--address", address).address == address


@pytest.mark.parametrize("address", ["10.0.0.1", ":6379", "head:port"])
def test_addresses_that_are_none(model: Path, address: str) -> None:
    with pytest.raises(UserError, match=f"--address {address} is not HOST:PORT"):
        made(model, "--address", address)


@pytest.mark.parametrize("share", [0.001, 0.88, 1.0])
def test_the_share_of_a_gpus_memory_reaches_the_workers(model: Path, share: float) -> None:
    options = made(model, "--gpu-memory-utilization", str(share))
    assert options.gpu_memory_utilization == share
    assert engine_config(options, ParallelDims()).memory_utilization == share


@pytest.mark.parametrize("share", ["0", "-0.1", "1.01", "nan", "inf"])
def test_shares_of_a_gpus_memory_that_are_none(model: Path, share: str) -> None:
    with pytest.raises(
        UserError, match=f"--gpu-memory-utilization is {share}; it must be over 0 and at most 1"
    ):
        made(model, "--gpu-memory-utilization", share)


def test_offloaded_layouts_and_what_they_are_given(model: Path) -> None:
    elsewhere = ["--address", "auto", "--device", "cuda"]
    layout = ["--layout", "tp2+int8+offload", "--resident-layers", "1"]
    options = made(model, *layout, "--device-memory-gb", "25.3", *elsewhere)
    assert (options.format, options.offload, options.resident_layers) == ("int8", True, 1)
    config = engine_config(options, ParallelDims(2))
    assert (config.offload, config.resident_layers) == (True, 1)
    assert config.memory_cap_bytes == 25_300_000_000
    assert not made(model, "--layout", "tp2").offload
    assert config.host_kv_bytes == 0
    asked = made(model, "--host-kv-gb", "2.5")
    assert engine_config(asked, ParallelDims(2)).host_kv_bytes == 2_500_000_000


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--layout tp1 --resident-layers 1", "of offloaded layouts; add --layout tp1\\+offload"),
        (
            "--layout zero3+offload --resident-layers 1",
            "ZeRO-3 keeps every layer off the device: leave it away",
        ),
        ("--layout tp1+offload --resident-layers -1", "must be at least 0"),
        ("--layout tp1+offload --resident-layers 3", "is 3; .* has 2 layers"),
        ("--layout tp1+offload --offload-dir /proc/version", "/proc/version is a file; give a folder"),
        (
            "--layout tp1+offload --offload-dir /nowhere/x",
            "is in no folder that is there; mkdir -p /nowhere,",
        ),
        ("--device-memory-gb 4", "is of GPUs; leave it away with --device cpu"),
        ("--layout tp1+offload --offload-io deepspeed", "is of --offload-dir; give a folder"),
        ("--layout tp1+sparse24+offload", "keeps all layers on the device; leave \\+offload away"),
        ("--device-memory-gb 0.5", "must be from 1 to 10000 GB"),
        ("--device-memory-gb nan", "must be from 1 to 10000 GB"),
        ("--host-kv-gb 0", "must be over 0 and at most 10000 GB"),
        ("--host-kv-gb 1 --no-enable-prefix-caching", "leave it away, or --no-enable-prefix-caching"),
    ],
)
def test_offload_flags_that_make_no_sense(argv: str, says: str, model: Path) -> None:
    with pytest.raises(UserError, match=says):
        made(model, *argv.split())


def test_a_gpus_memory_is_limited_for_nothing_where_there_is_none(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    args = parsed("--weights", "dummy", "--device-memory-gb", "4")
    args.model = str(model)
    monkeypatch.setattr("launch.options.choose_device", lambda asked: "cpu")
    assert engine_options(args).device == "cpu"
    assert caplog.messages == ["--device-memory-gb 4 is of GPUs, and there is none: it changes nothing"]


def test_a_folder_for_offload_is_made_and_the_way_to_it_is_not(model: Path, tmp_path: Path) -> None:
    from launch.disk_limit import disk_rate

    asked = ["--layout", "tp1+offload", "--offload-dir"]
    options = made(model, *asked, str(tmp_path / "new"))
    assert disk_rate(options, reads=False) is None
    assert (tmp_path / "new").is_dir()
    with pytest.raises(UserError, match=f"mkdir -p {tmp_path}/no/such, or give another"):
        made(model, *asked, str(tmp_path / "no" / "such" / "folder"))
    assert not (tmp_path / "no").exists()


def test_an_empty_folder_is_not_this_one() -> None:
    with pytest.raises(SystemExit):
        parsed("--layout", "tp1+offload", "--offload-dir", "")
