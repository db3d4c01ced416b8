"""What transformers would fill at random is told instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.errors import BadModel
from launch.configured import engine_config
from launch.models import resolve, spec_of
from orchestrator.engine.compatible import compatible
from strategies.pipeline import shard_replica
from strategies.plan import ParallelDims
from tests import serving

NAME = "model.layers.0.mlp.fc1.weight"


def test_a_checkpoint_of_another_shape_or_with_less_is_refused_in_our_words(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = transformers.PhiConfig(**sizes, num_attention_heads=2)
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, NAME: torch.zeros(7, 8)}, file, {"format": "pt"})
    with pytest.raises(
        BadModel, match=rf"^[^:]*: {NAME} is \[7, 8\] in the .* \[12, 8\] by its config; take"
    ):
        run(tmp_path)
    del tensors[NAME]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        BadModel, match=rf"^[^:]*: the checkpoint has no {NAME}, the first of 1 that .* lacks"
    ):
        run(tmp_path)


def run(directory: Path) -> None:
    options = serving.options(str(directory), compatible=True)
    (shard,) = shard_replica(spec_of(resolve(str(directory))), ParallelDims())
    compatible(engine_config(options, ParallelDims()), shard, torch.device("cpu"))
