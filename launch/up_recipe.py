"""What `shardwise up` reads in a recipe, and the `shardwise serve` that it comes to. Parsed strictly, here alone.

model:
  name: /models/Llama-3.1-8B  # a directory, a .gguf file, smollm2; or a built-in name with weights: dummy
  dtype: bfloat16             # this and all that follows is optional, and is serve's flag of that name
  max_model_len: 8192
  weights: checkpoint
  seed: 0
objective: {prompt_tokens: 1024, output_tokens: 256, concurrency: 16, objective: throughput}
serve:
  name: llama                 # of the deployment; default: the file's name
  layout: tp2                 # default: the planner's choice for the objective
  address: 10.0.0.1:6379      # of a Ray cluster; default: this machine
  host: 127.0.0.1
  port: 8000
  api_key_file: keys.txt      # paths count from the recipe
machine:                      # optional: that what is here is what the recipe was made for
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import BadRecipe
from cluster.topology import Topology
from launch.config import Fields, machine_of, read_sections
from strategies.plan import Layout
from strategies.runnable import check_layout
from strategies.spec import BYTES_PER_ELEMENT, Objective

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MODEL_HINT = "add `model: {name: smollm2}`, or give --model"
_MOST = 10**9
_NO_KEYS: Fields = Fields("", {})


@dataclass(frozen=True, slots=True)
class Wanted:
    """A deployment, as the recipe asks for it."""

    name: str
    address: str | None  # of a Ray cluster; None: this machine
    machine: Topology | None  # that the recipe was made for
    device: str | None  # cpu or cuda, where the recipe says it
    key_file: Path | None
    batch_dir: Path | None
    drain_s: float
    model: str
    flags: tuple[str, ...]  # of `shardwise serve`, without what the fields above say

    def arguments(
        self, *, device: str | None, key_file: Path | None, address: str | None, batch_dir: Path | None
    ) -> list[str]:
        """Of `shardwise serve`."""
        given = {
            "--device": device,
            "--api-key-file": key_file,
            "--batch-dir": batch_dir,
            "--address": address,
            "--drain-timeout": f"{self.drain_s:g}",
        }
        told = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
        return [self.model, *self.flags, *told]


def read_wanted(path: Path, asked: Mapping[str, str | int | None]) -> Wanted:
    """`asked`, where not None, stands in for the recipe's name, model, address and port. Raises BadRecipe."""
    sections = read_sections(path)
    serve, model = _asked(sections["serve"], asked, path), sections["model"] or _NO_KEYS
    name = serve.text("name", path.stem.lower())
    if not NAME.fullmatch(name):
        raise BadRecipe(
            f"{serve.where}: name is {name!r}; it must be of a-z, 0-9, '.', '_' and '-', up to 63 of them"
        )
    machine = None if sections["machine"] is None else machine_of(sections["machine"], path.stem)
    named = asked.get("model") or model.values.get("name")
    if named is None:
        raise BadRecipe(f"{path} says no model; {MODEL_HINT}")
    device = _choice(serve, "device", ("auto", "cpu", "cuda"))
    if machine is not None and device is None:
        device = machine.devices[0].kind
    objective = sections["objective"] or _NO_KEYS
    folder = _path(serve, "offload_dir", path)
    return Wanted(
        name=name,
        address=serve.text("address") if serve.values.get("address") is not None else None,
        machine=machine,
        device=None if device == "auto" else device,
        key_file=_path(serve, "api_key_file", path),
        batch_dir=_path(serve, "batch_dir", path),
        drain_s=serve.number("drain_timeout_s", 300.0),
        model=_model(str(asked.get("model") or model.text("name")), path, is_asked=bool(asked.get("model"))),
        flags=(
            *_flags(_MODEL, model),
            *_flags(_OBJECTIVE, objective),
            *_flags(_SERVE, serve),
            *_offload(folder),
        ),
    )


def _asked(serve: Fields | None, asked: Mapping[str, str | int | None], path: Path) -> Fields:
    given = serve or Fields(f"{path}: serve", {})
    changes = {key: value for key, value in asked.items() if key != "model" and value is not None}
    return replace(given, values={**given.values, **changes})


def _model(name: str, path: Path, *, is_asked: bool) -> str:
    """Absolute where it is a file beside the recipe: the server runs elsewhere."""
    found = Path(name).expanduser()
    base = Path.cwd() if is_asked else path.absolute().parent
    return str(base / found) if found.is_absolute() or (base / found).exists() else name


def _path(serve: Fields, key: str, recipe: Path) -> Path | None:
    if serve.values.get(key) is None:
        return None
    return recipe.absolute().parent / Path(serve.text(key)).expanduser()


def _offload(folder: Path | None) -> list[str]:
    return [] if folder is None else ["--offload-dir", str(folder)]


def _choice(fields: Fields, key: str, known: Sequence[str]) -> str | None:
    if fields.values.get(key) is None:
        return None
    value = fields.text(key)
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise BadRecipe(f"{fields.where}: {key} is {value!r}; the nearest known is {near}")
    return value


# --- keys that are flags of serve ---------------------------------------------------------------------------

_Told = Callable[[Fields, str], Sequence[str]]  # the words that follow the flag


def _integer(low: int, high: int = _MOST) -> _Told:
    return lambda fields, key: [str(fields.integer(key, low, low, high))]


def _number(fields: Fields, key: str) -> Sequence[str]:
    return [f"{fields.number(key):g}"]


def _one_of(*known: str) -> _Told:
    def told(fields: Fields, key: str) -> Sequence[str]:
        return [_choice(fields, key, known) or ""]

    return told


def _text(fields: Fields, key: str) -> Sequence[str]:
    return [fields.text(key)]


def _names(fields: Fields, key: str) -> Sequence[str]:
    value: Any = fields.values[key]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
        raise BadRecipe(f"{fields.where}: {key} is {value!r}; it must be a name or a list of names")
    return names


def _layout(fields: Fields, key: str) -> Sequence[str]:
    name = fields.text(key)
    if name != "auto":
        check_layout(Layout.parse(name))
    return [name]


def _switch(fields: Fields, key: str) -> Sequence[str] | None:
    return [] if fields.flag(key, False) else None


_Keys = Mapping[str, tuple[str, Callable[[Fields, str], Sequence[str] | None]]]

_MODEL: _Keys = {
    "dtype": ("--dtype", _one_of("auto", *BYTES_PER_ELEMENT)),
    "max_model_len": ("--max-model-len", _integer(1)),
    "weights": ("--weights", _one_of("checkpoint", "dummy")),
    "seed": ("--seed", _integer(0)),
}
_OBJECTIVE: _Keys = {
    "prompt_tokens": ("--prompt-tokens", _integer(1)),
    "output_tokens": ("--output-tokens", _integer(1)),
    "concurrency": ("--concurrency", _integer(1)),
    "objective": ("--objective", _one_of(*map(str, Objective))),
}
_SERVE: _Keys = {
    "layout": ("--layout", _layout),
    "host": ("--host", _text),
    "port": ("--port", _integer(0, 65_535)),
    "allow_without_key": ("--allow-without-key", _switch),
    "served_model_name": ("--served-model-name", _names),
    "max_queue": ("--max-queue", _integer(1)),
    "max_queue_tokens": ("--max-queue-tokens", _integer(1)),
    "max_num_seqs": ("--max-num-seqs", _integer(1)),
    "max_num_batched_tokens": ("--max-num-batched-tokens", _integer(1)),
    "gpu_memory_utilization": ("--gpu-memory-utilization", _number),
    "device_memory_gb": ("--device-memory-gb", _number),
    "host_memory_gb": ("--host-memory-gb", _number),
    "resident_layers": ("--resident-layers", _integer(0)),
    "host_kv_gb": ("--host-kv-gb", _number),
    "request_timeout_s": ("--request-timeout", _number),
    "step_timeout_s": ("--step-timeout", _number),
    "tool_call_parser": ("--tool-call-parser", _text),
    "access_log": ("--access-log", _switch),
}


def _flags(keys: _Keys, fields: Fields) -> list[str]:
    words: list[str] = []
    for key, (flag, told) in keys.items():
        if fields.values.get(key) is not None and (follow := told(fields, key)) is not None:
            words += [flag, *follow]
    return words
