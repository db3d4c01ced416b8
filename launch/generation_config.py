"""generation_config.json, beside a model's config: how its makers sample it, and where its answers end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from cluster.errors import BadModel, BadRequest
from orchestrator.request import SamplingParams
from strategies.source import ModelSource
from strategies.spec import ModelSpec

_NAME = "generation_config.json"
_FIELDS: Mapping[str, type] = {  # those that vLLM takes over, too
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of requests that say nothing themselves
    eos_ids: tuple[int, ...] = ()

    def applied(self, spec: ModelSpec) -> ModelSpec:
        """Answers end with its tokens, too."""
        return replace(spec, eos_ids=tuple(dict.fromkeys((*spec.eos_ids, *self.eos_ids))))


def read(source: ModelSource) -> GenerationConfig:
    """Nothing where there is no such file. Raises BadModel."""
    if source.path is None or not source.path.is_dir() or not (source.path / _NAME).is_file():
        return GenerationConfig()
    path = source.path / _NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        eos = found.get("eos_token_id")
        eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        given = {name: found[name] for name in _FIELDS if found.get(name) is not None}
        sampling: dict[str, Any] = {
            name: msgspec.convert(value, _FIELDS[name]) for name, value in given.items()
        }
        if found.get("do_sample") is False:
            sampling = {name: value for name, value in sampling.items() if name == "repetition_penalty"}
        SamplingParams(**sampling)
        return GenerationConfig(sampling, tuple(msgspec.convert(list(eos_ids), list[int])))
    except (OSError, ValueError, AttributeError, BadRequest) as error:
        raise BadModel(f"{path} cannot be read: {str(error).splitlines()[0]}; mend or remove it") from None
