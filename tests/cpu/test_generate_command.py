"""`generate` as users run it, under a private Ray: ended at any moment and by any means, it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.life import Life
from tests.hosts import PATIENCE_S, ROOT
from tests.oracle import greedy
from tests.serving import ENDLESS_TOKENS
from tests.tiny import make_model

PROMPT = [3, 1, 4, 1, 5]
LINES = (
    {"prompt_token_ids": PROMPT, "max_tokens": 4},
    {"prompt_token_ids": PROMPT, "max_tokens": ENDLESS_TOKENS, "ignore_eos": True},
)

Tiny = tuple[Path, list[int]]  # a model and the tokens that transformers answers the first line with


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory = tmp_path_factory.mktemp("model")
    model = make_model(directory, "llama", max_position_embeddings=8192)
    (directory / "prompts.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return directory, greedy(model, PROMPT, 4)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """The command's temporary directory; a short path, else Ray's sockets get one elsewhere."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


@contextmanager
def generating(model: Path, layout: str, scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, started."""
    arguments = [str(model), "--prompts", str(model / "prompts.jsonl")]
    arguments += ["--layout", layout, "--device", "cpu", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-m", "launch", "generate", *arguments],
        cwd=ROOT,
        env=environment | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group, as a terminal gives it
    ) as command:
        yield command
        command.kill()  # where an assertion failed


def end(command: subprocess.Popen[str], how: signal.Signals) -> tuple[str, list[str]]:
    """Signal its group and wait for all that it had started. → the rest of its standard output, its last words"""
    started = psutil.Process(command.pid).children(recursive=True)
    assert {child.name() for child in started} > {"raylet", "gcs_server"}
    lives = [Life(child.pid) for child in started]
    os.killpg(command.pid, how)
    out, err = command.communicate(timeout=PATIENCE_S)
    for life in lives:
        life.wait(PATIENCE_S)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in started)
    return out, [line for line in err.splitlines() if not line.startswith("· ")]


@pytest.mark.parametrize(
    ("how", "layout", "code", "words"),
    [
        (signal.SIGINT, "tp2", 130, ["interrupted"]),
        (signal.SIGTERM, "tp1", 143, ["interrupted"]),
        pytest.param(signal.SIGKILL, "tp1", -9, [], marks=pytest.mark.slow),
    ],
)
def test_ended_in_the_middle_of_an_answer(
    how: signal.Signals, layout: str, code: int, words: list[str], tiny: Tiny, scratch: Path
) -> None:
    with generating(tiny[0], layout, scratch) as command:
        assert command.stdout is not None
        first = json.loads(command.stdout.readline())
        assert first["token_ids"] == tiny[1]
        assert end(command, how) == ("", words)
        assert command.returncode == code
    assert list(scratch.iterdir()) == []


def test_interrupted_while_its_workers_start(tiny: Tiny, scratch: Path) -> None:
    with generating(tiny[0], "tp2", scratch) as command:
        assert command.stderr is not None
        while "placing" not in (line := command.stderr.readline()):
            assert line, "it ended by itself"
        assert end(command, signal.SIGINT) == ("", ["interrupted"])
        assert command.returncode == 130
    assert list(scratch.iterdir()) == []
