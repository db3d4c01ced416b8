"""What `up` reads in a recipe: the flags of serve that it comes to, and every mistake in one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from launch import serve
from launch.config import RECIPES
from launch.up_recipe import Wanted, read_wanted

FULL = """
model: {name: smollm2, dtype: float32, max_model_len: 2048, weights: checkpoint, seed: 3}
objective: {prompt_tokens: 64, output_tokens: 32, concurrency: 4, objective: throughput}
serve:
  name: tiny
  layout: tp2dp2
  address: 10.0.0.1:6379
  device: cpu
  host: 0.0.0.0
  port: 8123
  api_key_file: keys.txt
  allow_without_key: true
  served_model_name: [a, b]
  batch_dir: /data/batches
  max_queue: 9
  max_queue_tokens: 1000
  max_num_seqs: 5
  max_num_batched_tokens: 600
  gpu_memory_utilization: 0.8
  device_memory_gb: 20
  resident_layers: 2
  offload_dir: disk
  host_kv_gb: 4.5
  request_timeout_s: 60
  step_timeout_s: 90
  drain_timeout_s: 20
  tool_call_parser: hermes
  access_log: true
"""


def read(tmp_path: Path, text: str, **asked: Any) -> Wanted:
    path = tmp_path / "Box.yaml"
    path.write_text(text)
    return read_wanted(path, asked)


def served(wanted: Wanted) -> argparse.Namespace:
    """What `shardwise serve` makes of it."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(
        wanted.arguments(
            device="cpu", key_file=wanted.key_file, address=wanted.address, batch_dir=wanted.batch_dir
        )
    )


def test_every_key_becomes_the_flag_of_serve_that_it_is_named_for(tmp_path: Path) -> None:
    wanted = read(tmp_path, FULL)
    assert (wanted.name, wanted.address, wanted.device) == ("tiny", "10.0.0.1:6379", "cpu")
    args = served(wanted)
    expected = {
        "model": "smollm2",
        "dtype": "float32",
        "max_model_len": 2048,
        "weights": "checkpoint",
        "seed": 3,
        "prompt_tokens": 64,
        "output_tokens": 32,
        "concurrency": 4,
        "objective": "throughput",
        "layout": "tp2dp2",
        "address": "10.0.0.1:6379",
        "host": "0.0.0.0",
        "port": 8123,
        "api_key_file": tmp_path / "keys.txt",
        "allow_without_key": True,
        "served_model_name": ["a", "b"],
        "batch_dir": Path("/data/batches"),
        "max_queue": 9,
        "max_queue_tokens": 1000,
        "max_num_seqs": 5,
        "max_num_batched_tokens": 600,
        "gpu_memory_utilization": 0.8,
        "device_memory_gb": 20.0,
        "resident_layers": 2,
        "offload_dir": tmp_path / "disk",
        "host_kv_gb": 4.5,
        "request_timeout": 60.0,
        "step_timeout": 90.0,
        "drain_timeout": 20.0,
        "tool_call_parser": "hermes",
        "access_log": True,
    }
    assert {key: getattr(args, key) for key in expected} == expected


def test_little_is_enough_and_the_rest_is_as_serve_has_it(tmp_path: Path) -> None:
    wanted = read(tmp_path, "model: {name: smollm2}\n")
    assert (wanted.name, wanted.address, wanted.device, wanted.machine) == ("box", None, None, None)
    args = served(wanted)
    assert (args.host, args.port, args.layout, args.api_key_file) == ("127.0.0.1", 8000, None, None)


def test_the_command_line_stands_in_for_the_recipe(tmp_path: Path) -> None:
    wanted = read(tmp_path, FULL, name="other", model="/models/x", address="auto", port=1)
    assert (wanted.name, wanted.model, wanted.address, served(wanted).port) == (
        "other",
        "/models/x",
        "auto",
        1,
    )


def test_a_model_beside_the_recipe_is_told_by_its_whole_path(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    assert read(tmp_path, "model: {name: weights}").model == str(tmp_path / "weights")


def test_the_machine_says_the_device(tmp_path: Path) -> None:
    machine = "model: {name: smollm2}\nmachine: {devices: [{device: rtx-4090, count: 2}]}\n"
    assert read(tmp_path, machine).device == "cuda"
    assert read(tmp_path, machine + "serve: {device: auto}\n").device is None


@pytest.mark.parametrize("name", ["cpu", "dual-3090", "dual-4090", "h100-node"])
def test_what_ships_ready_made_can_be_brought_up(name: str) -> None:
    wanted = read_wanted(RECIPES / f"{name}.yaml", {})
    assert wanted.name == name
    assert wanted.machine is not None
    assert served(wanted).model


MISTAKES = {
    "serve: {port: 1}": "says no model; add `model: {name: smollm2}`, or give --model",
    "model: {name: smollm2}\nserve: {prot: 1}": "serve has an unknown key 'prot'; the nearest known is port",
    "model: {name: smollm2}\nserve: {port: 65536}": "port is 65536; it must be a whole number from 0 to 65535",
    "model: {name: smollm2}\nserve: {port: '80'}": "port is '80'; it must be a whole number",
    "model: {name: smollm2}\nserve: {layout: tp0}": "layout 'tp0': every size must be at least 1",
    "model: {name: smollm2}\nserve: {layout: 2}": "layout is 2; it must be a string",
    "model: {name: smollm2}\nserve: {device: gpu}": "device is 'gpu'; the nearest known is cpu",
    "model: {name: smollm2}\nserve: {name: ''}": "name is ''; it must be a string, and not empty",
    "model: {name: smollm2}\nserve: {name: a b}": "name is 'a b'; it must be of a-z",
    "model: {name: smollm2}\nserve: {name: ../x}": "name is '../x'; it must be of a-z",
    "model: {name: smollm2}\nserve: {served_model_name: [1]}": "served_model_name is [1]; it must be a name or a list",
    "model: {name: smollm2}\nserve: {allow_without_key: 1}": "allow_without_key is 1; it must be true or false",
    "model: {name: smollm2}\nserve: {request_timeout_s: -1}": "request_timeout_s is -1; it must be a number above 0",
    "model: {name: smollm2, dtype: bf16}": "dtype is 'bf16'; the nearest known is bfloat16",
    "model: {name: smollm2, max_model_len: 0}": "max_model_len is 0; it must be a whole number from 1",
    "model: {name: smollm2}\nobjective: {objective: fast}": "objective is 'fast'; the nearest known is",
    "model: {name: [x]}": "name is ['x']; it must be a string",
    "model: {name: smollm2}\nmachine: {devices: []}": "devices is []; it must be a list",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert MISTAKES[text] in str(caught.value)
    assert "\n" not in str(caught.value)
