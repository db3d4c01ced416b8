"""What a user can get wrong: exit code 2, one line that says value, rule and way out, and nothing is started."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import launch.start
from launch.__main__ import main
from launch.models import resolve
from tests.tiny import make_model

ROOT = Path(__file__).parents[2]

LINES = {
    "good": '{"prompt_token_ids": [1, 2]}',
    "broken": '{"prompt_token_ids": [1,',
    "array": "[1, 2]",
    "unknown": '{"prompt_token_ids": [1], "temprature": 1}',
    "type": '{"prompt_token_ids": [1], "max_tokens": "ten"}',
    "ids": '{"prompt_token_ids": [1.5]}',
    "stops": '{"prompt_token_ids": [1], "stop": [3]}',
    "nan": '{"prompt_token_ids": [1], "temperature": NaN}',
    "infinite": '{"prompt_token_ids": [1], "temperature": 1e999}',
    "negative": '{"prompt_token_ids": [1], "max_tokens": -3}',
    "tiny": '{"prompt_token_ids": [1], "temperature": 1e-40}',
    "outside": '{"prompt_token_ids": [1, 131]}',
    "below": '{"prompt_token_ids": [-1]}',
    "stop_id": '{"prompt_token_ids": [1], "stop_token_ids": [900]}',
    "stop": '{"prompt_token_ids": [1], "stop": "x"}',
    "no_ids": '{"prompt_token_ids": []}',
    "long": json.dumps({"prompt_token_ids": [1] * 512}),
    "greedy": '{"prompt_token_ids": [1], "n": 2}',
    "both": '{"prompt": "hi", "prompt_token_ids": [1]}',
    "neither": '{"max_tokens": 3}',
    "text": '{"prompt": "hi"}',
    "number": '{"prompt": 3}',
    "messages": '{"messages": [{"role": "user", "content": "hi"}]}',
    "words": '{"messages": "hi"}',
    "roleless": '{"messages": [{"content": "hi"}]}',
    "half": '{"prompt": "\\ud800"}',
    "deep": "[" * 100_000,
}
"""Files of prompts: each line is the second of a file of its name, after a good one."""

PROMPTS = {  # of the tiny model, which has a vocabulary of 131, a context of 512 and no tokenizer
    "broken": "broken.jsonl line 2: not JSON at column 25: Expecting value; give one JSON object a line",
    "array": "array.jsonl line 2: [1, 2] is no JSON object; give one, such as",
    "unknown": "unknown.jsonl line 2: unknown field 'temprature'; the nearest known is temperature",
    "type": 'type.jsonl line 2: max_tokens is "ten"; it must be a whole number',
    "ids": "ids.jsonl line 2: prompt_token_ids is [1.5]; it must be a list of token ids",
    "stops": "stops.jsonl line 2: stop is [3]; it must be a string or a list of them",
    "nan": "nan.jsonl line 2: temperature is nan; it must be a finite number",
    "infinite": "infinite.jsonl line 2: temperature is inf; it must be a finite number",
    "negative": "negative.jsonl line 2: max_tokens is -3; it must be at least 1",
    "tiny": "tiny.jsonl line 2: temperature is 1e-40; it must be 0, which is greedy, or at least 1e-06",
    "outside": "outside.jsonl line 2: token id 131 is outside the vocabulary; it must be from 0 to 130",
    "below": "below.jsonl line 2: token id -1 is outside the vocabulary",
    "stop_id": "stop_id.jsonl line 2: token id 900 is outside the vocabulary",
    "stop": "stop.jsonl line 2: stop strings need a tokenizer, and this model has none; use stop_token_ids",
    "no_ids": "no_ids.jsonl line 2: the prompt has no tokens; it needs at least one",
    "long": "long.jsonl line 2: the prompt has 512 tokens; the context is 512 and must hold at least one more",
    "greedy": "greedy.jsonl line 2: n is 2 at temperature 0",
    "both": "both.jsonl line 2: give exactly one of prompt, messages, prompt_token_ids, not prompt and prompt",
    "neither": "neither.jsonl line 2: give exactly one of prompt, messages, prompt_token_ids, not none",
    "text": "text.jsonl line 2: this model has no tokenizer; give prompt_token_ids",
    "messages": "messages.jsonl line 2: this model has no tokenizer; give prompt_token_ids",
    "deep": "deep.jsonl line 2: JSON that cannot be read: maximum recursion depth",
    "blank": "blank.jsonl holds no prompts; give one JSON object a line",
    "latin": "--prompts latin.jsonl is not UTF-8 at byte 12; save it as UTF-8",
    "nowhere": "--prompts nowhere.jsonl: No such file or directory; give a JSONL file",
}

MODELS = {  # a directory or file of the zoo → what is wrong with it
    "nowhere": "no model 'nowhere': there is no such directory or file, and the built-in names are",
    "./nowhere": "./nowhere does not exist; give a directory, a .gguf file or a built-in name",
    "smolm2": "the nearest built-in names are smollm2",
    "a" * 5000: "cannot be read (File name too long); give a directory",
    "truncated": "truncated/model.safetensors is cut short or corrupt",
    "gpt2": "gpt2: GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, MistralForCausalLM",
    "no_config": "no_config has no config.json; give a directory in the Hugging Face layout",
    "not_json": "not_json/config.json is not JSON: Expecting value",
    "list": "list/config.json holds a list; it must be a JSON object",
    "no_field": "no_field: the config has no hidden_size, which is required",
    "nan_field": "nan_field: hidden_size is nan; it must be a number",
    "text_field": "text_field: hidden_size is '64'; it must be a number",
    "pickle": "holds a pickle checkpoint, pytorch_model.bin: unpickling runs code from the file; convert it",
    "no_weights": "no_weights has neither model.safetensors nor model.safetensors.index.json",
    "other_shape": "model.embed_tokens.weight is [131, 64] in the checkpoint, but [131, 128] by its config",
    "lost_shard": "names model-00002-of-",
    "bad_tokenizer": "bad_tokenizer cannot be read",
    "cut.gguf": "cut.gguf is cut short: its tensors end at byte",
    "text.gguf": "text.gguf is not a GGUF file: it starts with b'hell', not b'GGUF'",
    "empty.gguf": "empty.gguf is cut short or corrupt",
    "notes.txt": "notes.txt is a file, but no .gguf",
    "qwen3-8b": "qwen3-8b is a built-in spec, a config without weights; add --weights dummy",
}

COMMANDS = {
    # sampling, from the command line
    "generate smollm2 --prompt hi --temperature nan": "temperature is nan; it must be a finite number",
    "generate smollm2 --prompt hi --temperature -1": "temperature is -1.0; it must be at least 0",
    "generate smollm2 --prompt hi --max-tokens -5": "max_tokens is -5; it must be at least 1",
    "generate smollm2 --prompt hi --max-tokens abc": "argument --max-tokens: invalid int value: 'abc'",
    "generate smollm2 --prompt hi --top-p 2": "top_p is 2.0; it must be from 0 to 1",
    # prompts
    "generate smollm2 --prompt ''": "prompt 1: the prompt has no tokens; it needs at least one",
    "generate smollm2 --prompt ok '\udcff'": "prompt 2: the text holds half a character",
    "generate smollm2 --prompts half.jsonl": "half.jsonl line 2: the text holds half a character",
    "generate smollm2 --prompts number.jsonl": "number.jsonl line 2: prompt is 3; it must be a string",
    "generate smollm2 --prompts words.jsonl": 'line 2: messages is "hi"; it must be a list such as [{"role"',
    "generate smollm2 --prompts roleless.jsonl": "roleless.jsonl line 2: the chat template refuses these messages",
    "generate smollm2 --chat --prompts good.jsonl": "--chat is for --prompt; a line of a --prompts file says it",
    "generate smollm2 --prompt hi --prompts good.jsonl": "--prompts: not allowed with argument --prompt",
    "generate plain --prompt hi": "prompt 1: this model has no tokenizer",
    "generate untemplated --chat --prompt hi": "untemplated has no chat template; give a prompt instead",
    "generate smollm2 --prompt 'one two three four' --max-model-len 3": "prompt 1: the prompt has 4 tokens",
    # layouts
    "generate plain --prompts good.jsonl --layout xyz": "layout 'xyz' is not a name such as tp2",
    "generate plain --prompts good.jsonl --layout tp0": "layout 'tp0': every size must be at least 1",
    "generate plain --prompts good.jsonl --layout tp2 -tp 2": "say the same thing twice; give one of them",
    "generate plain --prompts good.jsonl -tp -1": "-tp, -pp and -dp must be at least 1, not -1",
    "generate plain --prompts good.jsonl -tp 5": "tp5 does not fit: tp=5 exceeds the 4 attention heads of plain; use",
    "generate plain --prompts good.jsonl -pp 4": "pp=4 exceeds the model's 3 layers; use pp3 or less. tp1 fits",
    "generate plain --prompts good.jsonl -dp 5000": "5000 CPU ranks asked for; one host is split into 64 ranks",
    "generate llama-3.3-70b --weights dummy --prompts good.jsonl -pp 2": "282.2 GB of float32 weights over two ranks",
    "compare smollm2 --layouts tp2,xx": "layout 'xx' is not a name such as tp2",
    # the engine
    "generate plain --prompts good.jsonl --max-model-len 0": "--max-model-len is 0; it must be from 1",
    "generate plain --prompts good.jsonl --max-model-len 513": "513; plain was made for 512 positions at most",
    "generate plain --prompts good.jsonl --max-num-seqs 9999999": "it must be from 1 to 65536",
    "generate plain --prompts good.jsonl --num-gpu-blocks-override 2": "2 blocks of 16 hold 32 tokens, fewer than",
    "generate plain --prompts good.jsonl --dtype int8": "argument --dtype: invalid choice: 'int8' (choose from",
    "generate plain --prompts good.jsonl --device tpu": "argument --device: invalid choice: 'tpu' (choose from",
    "generate plain --prompts good.jsonl --address here": "--address here is not HOST:PORT, such as 10.0.0.1:6379",
    "compare plain --prompt-tokens 0": "--prompt-tokens is 0; it must be at least 1",
    "compare plain --prompt-tokens 600": "600 prompt and 256 output tokens are 856; a sequence of plain may have 512",
    "compare truncated": "truncated/model.safetensors is cut short or corrupt",
    # recipes
    "plan qwen3-8b --on typo.yaml": "devices[0] has an unknown key 'cuont'; the nearest known is count",
    "plan qwen3-8b --on section.yaml": "section.yaml has an unknown key 'machin'; the nearest known is machine",
    "plan qwen3-8b --on nowhere.yaml": "recipe nowhere.yaml does not exist; give a YAML file, or one that ships",
    "plan gpt2 --on dual-4090": "gpt2: GPT2LMHeadModel is not supported",
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts and recipes, nearly all of them broken in one way."""
    root = tmp_path_factory.mktemp("zoo")
    make_model(root / "plain", "llama")
    _spoil_models(root)
    _spoil_ggufs(root)
    for name, line in LINES.items():
        (root / f"{name}.jsonl").write_text(f"{LINES['good']}\n{line}\n")
    (root / "blank.jsonl").write_text("\n\n")
    (root / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (root / "typo.yaml").write_text("machine:\n  devices: [{device: rtx-4090, cuont: 2}]\n")
    (root / "section.yaml").write_text("machin:\n  devices: [{device: rtx-4090}]\n")
    return root


def _spoil_models(root: Path) -> None:
    def spoil(name: str, how: Callable[[Path], Any]) -> None:
        how(Path(shutil.copytree(root / "plain", root / name)))

    def config(**changes: object) -> Callable[[Path], Any]:
        def change(directory: Path) -> None:
            fields = json.loads((directory / "config.json").read_text()) | changes
            kept = {key: value for key, value in fields.items() if value is not None}
            (directory / "config.json").write_text(json.dumps(kept))

        return change

    def cut(directory: Path) -> None:
        weights = directory / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)

    spoil("truncated", cut)
    spoil("gpt2", config(architectures=["GPT2LMHeadModel"], is_encoder_decoder=True))
    spoil("no_field", config(hidden_size=None))
    spoil("nan_field", config(hidden_size=float("nan")))
    spoil("text_field", config(hidden_size="64"))
    spoil("other_shape", config(hidden_size=128))
    spoil("no_config", lambda directory: (directory / "config.json").unlink())
    spoil("not_json", lambda directory: (directory / "config.json").write_text('{"a": '))
    spoil("list", lambda directory: (directory / "config.json").write_text("[1]"))
    spoil("no_weights", lambda directory: (directory / "model.safetensors").unlink())
    spoil("bad_tokenizer", lambda directory: (directory / "tokenizer.json").write_text('{"oops"'))
    spoil("pickle", lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"))
    spoil("untemplated", _give_tokenizer)
    make_model(root / "lost_shard", "llama", max_shard_size="20KB")
    next((root / "lost_shard").glob("model-00002-*")).unlink()


def _give_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"hi": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


def _spoil_ggufs(root: Path) -> None:
    whole = resolve("smollm2").path
    assert whole is not None
    with whole.open("rb") as file:
        (root / "cut.gguf").write_bytes(file.read(5_000_000))
    (root / "text.gguf").write_text("hello world")
    (root / "empty.gguf").touch()
    (root / "notes.txt").touch()


@pytest.fixture
def refused(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs a command that must be refused. → its one line on standard error."""

    def started(*_: object) -> None:
        raise AssertionError("Ray would have been started")

    monkeypatch.chdir(zoo)
    monkeypatch.setattr(launch.start, "cluster", started)

    def run(command: str) -> str:
        try:
            code = main(shlex.split(command))
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        return err

    return run


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, refused: Callable[[str], str]) -> None:
    """Nothing is started for the good line either."""
    assert PROMPTS[name] in refused(f"generate plain --device cpu --prompts {name}.jsonl")


@pytest.mark.parametrize("name", MODELS, ids=lambda name: name[:20])
def test_models(name: str, refused: Callable[[str], str]) -> None:
    assert MODELS[name] in refused(f"generate {name} --device cpu --prompts good.jsonl")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, refused: Callable[[str], str]) -> None:
    if "--device" not in command and not command.startswith("plan"):
        command += " --device cpu"
    assert COMMANDS[command.removesuffix(" --device cpu")] in refused(command)


def test_a_prompt_longer_than_what_fits_beside_the_weights(
    refused: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known once the weights are loaded, and told before anything is asked."""
    served = SimpleNamespace(limits=SimpleNamespace(max_model_len=2))
    monkeypatch.setattr(launch.start, "cluster", lambda *_: nullcontext())
    monkeypatch.setattr(launch.start, "deployment", lambda *_, **__: nullcontext(served))
    said = refused("generate plain --device cpu --layout tp1 --prompts good.jsonl")
    assert "good.jsonl line 1: the prompt has 2 tokens; the context is 2" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_where_there_is_none(refused: Callable[[str], str]) -> None:
    said = refused("generate plain --prompts good.jsonl --device cuda")
    assert "see `shardwise doctor`, or use --device cpu" in said


def test_nothing_that_fits_is_exit_3(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = str(zoo / "good.jsonl")
    argv = ["generate", "llama-3.3-70b", "--weights", "dummy", "--device", "cpu", "--prompts", prompts]
    assert main(argv) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "No layout of Llama-3.3-70B fits" in err
    assert "tp1 needs 28" in err  # GB, in float32


@pytest.mark.parametrize(
    "command", ["generate truncated --prompts good.jsonl", "generate plain --prompts nan.jsonl"]
)
def test_as_a_process(command: str, zoo: Path) -> None:
    """No library adds a line of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "launch", *command.split(), "--device", "cpu"]
    done = subprocess.run(argv, cwd=zoo, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("shardwise generate: ")


@pytest.mark.parametrize(
    ("locked", "said"),
    [
        (".", "unreadable cannot be read (Permission denied); give a directory"),
        ("config.json", "unreadable has no readable config.json (Permission denied)"),
        ("model.safetensors", "model.safetensors cannot be read (Permission denied)"),
    ],
)
def test_files_that_may_not_be_read(locked: str, said: str, zoo: Path, tmp_path: Path) -> None:
    model = tmp_path / "unreadable"
    shutil.copytree(zoo / "plain", model)
    (model / locked).chmod(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Root reads everything, unless it lays down the capabilities that let it.
    humble = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    argv = [*humble, sys.executable, "-m", "launch", "generate", str(model), "--prompts", "good.jsonl"]
    try:
        done = subprocess.run(
            [*argv, "--device", "cpu"], cwd=zoo, env=environment, capture_output=True, text=True, check=False
        )
    finally:
        (model / locked).chmod(0o700)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert said in done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    argv = [sys.executable, "-m", "launch", "plan", "llama-3.3-70b", "--on", "h100-node", "--json"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as planning:
        assert planning.stdout is not None and planning.stderr is not None
        planning.stdout.close()
        assert planning.stderr.read() == b""
        assert planning.wait() == 141
