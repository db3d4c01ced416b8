"""What a model's makers say of sampling it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import BadModel
from launch.generation_config import GenerationConfig, read
from strategies.source import ModelSource, SourceKind
from tests.served_api import in_loop, served


def config(path: Path, **fields: Any) -> GenerationConfig:
    (path / "generation_config.json").write_text(json.dumps(fields))
    return read(ModelSource("m", path, SourceKind.HF))


def test_what_is_taken_over(tmp_path: Path) -> None:
    source = ModelSource("m", tmp_path, SourceKind.HF)
    assert read(source) == GenerationConfig()
    found = config(tmp_path, temperature=0.6, top_p=0.9, top_k=20, eos_token_id=[1, 2], max_length=20)
    assert found == GenerationConfig({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, (1, 2))
    assert config(tmp_path, eos_token_id=7, bos_token_id=None).eos_ids == (7,)
    greedy = config(tmp_path, do_sample=False, temperature=0.6, repetition_penalty=1.1)
    assert greedy.sampling == {"repetition_penalty": 1.1}


@pytest.mark.parametrize("fields", [{"top_p": 5}, {"temperature": "hot"}, {"eos_token_id": "end"}])
def test_what_is_wrong(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"generation_config\.json cannot be read"):
        config(tmp_path, **fields)


@in_loop
async def test_requests_that_say_nothing_get_it() -> None:
    async with served(defaults={"temperature": 0.0, "repetition_penalty": 2000.0}) as api:
        told = (await api.chat(temperature=0.5)).json()["error"]["message"]
        assert "repetition_penalty is 2000.0" in told
        told = (await api.chat(repetition_penalty=1, n=2)).json()["error"]["message"]
        assert "n is 2 at temperature 0" in told
