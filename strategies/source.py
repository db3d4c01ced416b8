"""Where a model comes from, and its spec: a directory, a GGUF file, or the built-in table."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from cluster.errors import BadModel
from strategies.gguf_header import GgufHeader, read_header
from strategies.gguf_kept import of_tensors
from strategies.other_spec import sizes_of
from strategies.read_gguf import from_gguf_metadata
from strategies.read_spec import Unsupported, builtin, from_hf_config
from strategies.spec import ModelSpec


class SourceKind(StrEnum):
    HF = "hf"  # a directory with config.json, and safetensors unless weights are dummies
    GGUF = "gguf"
    BUILTIN = "builtin"  # sizes only


@dataclass(frozen=True, slots=True)
class ModelSource:
    name: str
    path: Path | None  # None for a built-in
    kind: SourceKind


def spec_of(source: ModelSource) -> ModelSpec:
    """Reads config.json or the GGUF header, no weights. Raises BadModel."""
    if source.path is None:
        spec = builtin(source.name)
        assert spec is not None, f"{source.name} was resolved as built in"
        return spec
    if source.kind == SourceKind.GGUF:
        header = read_header(source.path)
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        factors = _rope_factors(header, source.path)
        spec = from_gguf_metadata(header.metadata, shapes, source.name, factors)
        return replace(spec, published=of_tensors(header.tensors))
    config = dict(read_json(source.path / "config.json"))
    generation = source.path / "generation_config.json"
    if generation.is_file():  # where a chat model lists every token that ends a turn
        config["eos_token_id"] = read_json(generation).get("eos_token_id") or config.get("eos_token_id")
    try:
        return from_hf_config(config, source.name)
    except Unsupported as why:
        return sizes_of(config, source.name, why)


def read_json(path: Path) -> Mapping[str, object]:
    """One JSON object. Raises BadModel."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModel(
            f"{path.parent} has no readable {path.name} ({error.strerror}); "
            "give a directory in the Hugging Face layout"
        ) from None
    except ValueError as error:
        raise BadModel(f"{path} is not JSON: {error}; fetch it again") from None
    if not isinstance(found, dict):
        raise BadModel(f"{path} holds a {type(found).__name__}; it must be a JSON object")
    return found


def _rope_factors(header: GgufHeader, path: Path) -> tuple[float, ...]:
    tensor = header.tensors.get("rope_freqs.weight")
    if tensor is None:
        return ()
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return struct.unpack(f"<{tensor.shape[0]}f", file.read(tensor.bytes))
