"""The command itself: quick to say what it can do, one line for what it was asked wrongly."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import plan, progress
from launch.__main__ import main

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "transformers", "numpy")
PATIENCE_S = 5.0  # it takes 0.1 s; the rest is for a machine with other work

HELP = f"""
import sys
from launch.__main__ import main
try:
    main(["--help"])
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True)
    assert time.monotonic() - started < PATIENCE_S
    assert done.returncode == 0
    assert done.stderr == "[]\n"
    assert all(name in done.stdout for name in ("plan", "compare", "generate", "doctor"))


MISTYPED = f"""
import sys
from launch.__main__ import main
for command in (
    "generate smolm2 --prompt hi",
    "serve smolm2 --port 0",
    "compare smolm2",
    "plan smolm2",
    "batch run smolm2 {{path}} -o out.jsonl",
    "quantize smolm2 --to int4 -o out",
    "quality smolm2 --layout tp1",
    "generate smollm2 --prompt hi --max-model-len 100000",
    "generate smollm2 --prompt hi --resident-layers 3",
    "generate smollm2 --prompts {{path}} --chat",
):
    code = main(command.split())
    print(code, [name for name in {HEAVY[:3]} if name in sys.modules])
"""


def test_a_model_mistyped_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """Torch alone takes 4 s and more to import."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hi"}')
    source = MISTYPED.replace("{path}", str(prompts))
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.stdout == "2 []\n" * 10, done.stderr
    assert done.stderr.count("no model 'smolm2'") == 7, done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("plan", "shardwise plan: the following arguments are required: MODEL"),
        ("plan qwen3-8b --objective best", "invalid choice: 'best' (choose from"),
        ("compare smollm2 --concurrency abc", "argument --concurrency: invalid int value: 'abc'"),
        ("compare smollm2 --concurency 4", "unknown argument --concurency, the nearest is --concurrency"),
        ("compare smollm2 --concurency=4", "unknown argument --concurency=4, the nearest is --concurrency"),
        ("plan qwen3-8b --frobnicate", "unknown argument --frobnicate; see shardwise plan --help"),
        ("generate smollm2", "one of the arguments --prompt --prompts is required"),
        ("--frobnicate", "shardwise: unknown argument --frobnicate; see shardwise --help"),
    ],
)
def test_wrong_arguments_get_one_line(argv: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv.split())
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


def test_interrupted_amid_its_imports_it_says_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(parser: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "add_arguments", interrupted)
    assert main(["plan", "smollm2"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_no_command_at_all_gets_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: shardwise")


def test_lines_count_from_the_commands_beginning_and_tell_what_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "BEGUN_S", time.monotonic() - 100)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    progress.tell_torch()
    assert capsys.readouterr().err == "", "a log has what was wrong alone"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress.tell_torch()
    monkeypatch.setitem(sys.modules, "torch", None)
    progress.tell_torch()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"· 100\.\d s  importing torch", line)
