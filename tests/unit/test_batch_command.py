"""`shardwise batch` against a server on a real port, whose replica answers by itself."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from launch.api.batches import Batches
from launch.api.files import FileStore
from launch.api.server import serve_http
from launch.api.service import Service
from launch.batch_input import Source, endpoint_of, write_lines
from launch.batch_run import _answer
from launch.progress import Progress
from orchestrator.coordinator import Coordinator
from orchestrator.jobs import examine
from strategies.plan import ParallelDims
from tests.fakes import TalkingReplica
from tests.served_api import EOS, FACTS, LIMITS, PATIENCE_S, PLAN, VOCAB, chat_text, says
from tests.unit.test_start import OPTIONS

KEY = "sk-0123456789abcdef"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("store")
    (root / "files").mkdir()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    stop, loops = threading.Event(), []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        replica = TalkingReplica(says("Hello"))
        made = Coordinator([replica], LIMITS, vocab=VOCAB, eos_ids=(EOS,), text=chat_text())
        async with made as coordinator:
            service = Service(coordinator, ["bytes"], PLAN, FACTS)
            files = FileStore(root / "files")
            batches = Batches(root / "batches", files, service, {})
            serving = serve_http(
                service,
                listener,
                keys=[KEY],
                progress=Progress(quiet=True),
                drain_s=5,
                files=files,
                batches=batches,
                takes_signals=False,
            )
            task = asyncio.create_task(serving)
            await asyncio.to_thread(stop.wait)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < end_s
    yield f"http://127.0.0.1:{port}"
    stop.set()
    thread.join()


@pytest.fixture
def batch(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(*argv: str, to: str = address) -> tuple[int, str, str]:
        code = main(["batch", *argv, "--address", to])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def write(path: str, lines: int) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    with Path(path).open("w") as file:
        for i in range(lines):
            asked = {**body, "temperature": -1} if i == 2 else body
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": asked}
            file.write(json.dumps(line) + "\n")


def test_from_file_to_file(batch: Callable[..., tuple[int, str, str]]) -> None:
    write("in.jsonl", 5)
    code, out, _ = batch("submit", "in.jsonl")
    assert code == 0
    batch_id = out.strip()
    code, out, _ = batch("wait", batch_id, "--json")
    assert (code, json.loads(out)["request_counts"]) == (0, {"total": 5, "completed": 4, "failed": 1})
    assert batch("results", batch_id, "-o", "out.jsonl")[0] == 0
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == ["r0", "r1", "r3", "r4"]
    (error,) = map(json.loads, Path("out.errors.jsonl").read_text().splitlines())
    assert error["custom_id"] == "r2"
    assert f"{batch_id}  completed  4 of 5 answered, 1 failed" in batch("list")[1]
    assert "completed" in batch("cancel", batch_id)[1]


def test_answers_that_find_no_room_stay_with_the_server(batch: Callable[..., tuple[int, str, str]]) -> None:
    write("in.jsonl", 1)
    code, _, said = batch("submit", "in.jsonl", "-o", "/dev/full")
    assert code == 2
    way = re.search(r"--output /dev/full: No space .*: shardwise batch results (\S+) -o FILE$", said.strip())
    assert way is not None
    assert batch("results", way[1], "-o", "out.jsonl")[0] == 0
    assert Path("out.jsonl").read_text().count("\n") == 1


def test_prompts_of_a_table_at_once(batch: Callable[..., tuple[int, str, str]]) -> None:
    Path("in.csv").write_text('id,text\n1,"a, b"\n2,c\n')
    assert batch("submit", "in.csv", "--column", "text", "--max-tokens", "2", "-o", "out.jsonl")[0] == 0
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    told = {a["custom_id"]: a["response"]["body"] for a in answers}
    assert {name: body["usage"]["prompt_tokens"] for name, body in told.items()} == {"row-1": 4, "row-2": 1}
    assert {body["choices"][0]["text"] for body in told.values()} == {"He"}


def test_what_is_wrong_is_told_in_one_line_at_once(
    batch: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    write("in.jsonl", 1)
    Path("in.doc").touch()
    Path("empty.jsonl").touch()
    Path("cut.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun_s = time.monotonic()
        code, _, said = batch("list", to=nobody)  # it takes connections, and says nothing
        assert time.monotonic() - begun_s < 2 * PATIENCE_S
    assert (code, said.count("\n"), "does not answer (timed out)" in said) == (2, 1, True)
    wrong: list[tuple[tuple[str, ...], str, str]] = [
        (("list",), nobody, "Connection refused"),
        (("list",), "ray://head.invalid:10001", "no Ray cluster answers at ray://head.invalid:10001"),
        (("submit", "nowhere.jsonl"), address, "nowhere.jsonl does not exist"),
        (("submit", "in.doc"), address, "convert it to JSONL"),
        (("submit", "empty.jsonl"), address, "holds no requests"),
        (("submit", "in.jsonl", "-o", "no/where.jsonl"), address, "--output no/where.jsonl: No such file"),
        (("submit", "in.jsonl", "-o", "."), address, "--output .: Is a directory"),
        (
            ("submit", "cut.jsonl", "-o", "cut.out"),
            address,
            "line 2 is not JSON at column 11: Expecting value",
        ),
        (("status", "batch_nope"), address, "there is no batch 'batch_nope'"),
    ]
    for argv, to, says_ in wrong:
        code, out, said = batch(*argv, to=to)
        assert (code, out, said.count("\n"), says_ in said) == (2, "", 1, True), said
    assert not Path("cut.out").exists(), "nothing is there that could be taken for answers"
    for key, says_ in (("", "none was given"), ("sk-wrong", "another")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        code, out, said = batch("list")
        assert (code, out, said.count("\n"), says_ in said) == (2, "", 1, True), said


INPUTS: list[tuple[str, str, dict[str, Any], list[dict[str, Any]]]] = [
    ("a.txt", "One\n\nTwo\n", {}, [{"prompt": "One"}, {"prompt": "Two"}]),
    ("a.txt", "One\n", {"chat": True}, [{"messages": [{"role": "user", "content": "One"}]}]),
    ("a.tsv", "prompt\tx\na\tb\n", {}, [{"prompt": "a"}]),
    ("a.jsonl", '{"prompt": "a", "seed": 1, "note": 2}\n', {}, [{"prompt": "a", "seed": 1}]),
    ("a.jsonl", '{"prompt_token_ids": [1]}\n', {"sampling": {"seed": 3}}, [{"prompt": [1], "seed": 3}]),
    ("a.jsonl", '{"messages": [], "seed": 1}\n', {"sampling": {"seed": 3}}, [{"messages": [], "seed": 1}]),
]


@pytest.mark.parametrize(("name", "content", "asked", "bodies"), INPUTS)
def test_inputs(
    name: str, content: str, asked: dict[str, Any], bodies: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    source = Source(tmp_path / name, **asked)
    write_lines(source, tmp_path / "lines")
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["body"] for line in lines] == bodies
    assert [line["custom_id"] for line in lines] == [f"row-{i}" for i in range(1, len(bodies) + 1)]
    assert {line["url"] for line in lines} == {endpoint_of(source)}


def test_a_run_here_ends_with_the_whole_name_of_its_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Serving:
        """launch.start.Deployment, of a replica that answers by itself."""

        dims, limits = ParallelDims(tp=2), LIMITS

        def coordinator(self, *_: object, **__: object) -> Coordinator:
            return Coordinator(
                [TalkingReplica(says("Hi"))], LIMITS, vocab=VOCAB, eos_ids=(EOS,), text=chat_text()
            )

    body = {"messages": [{"role": "user", "content": "hi"}]}
    path = tmp_path / "in.jsonl"
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    path.write_text(json.dumps(asked) + "\n")
    options = replace(OPTIONS, format="int4", offload=True)
    answering = _answer(
        path,
        asked["url"],
        examine(path),
        tmp_path,
        Serving(),
        options,
        {},
        chat_text(),
        Progress(),  # type: ignore[arg-type]
    )
    assert asyncio.run(answering) == {"completed": 1, "failed": 0}
    assert "tp2+int4+offload: 3 tokens in " in capsys.readouterr().err
