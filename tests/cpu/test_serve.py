"""`shardwise serve` as users run it: a real model behind a real port, and the clients that they already have."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.hosts import PATIENCE_S, ROOT

START_S = 120.0
CHAT: Any = [{"role": "user", "content": "Name a colour."}]
ENDLESS: Any = {"model": "smollm2", "messages": CHAT, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S)

    def status(self, path: str) -> int:
        return httpx2.get(f"{self.url}{path}", timeout=PATIENCE_S).status_code

    def metric(self, name: str) -> float:
        text = httpx2.get(f"{self.url}/metrics", timeout=PATIENCE_S).text
        found = [line for line in text.splitlines() if line.startswith(name)]
        return float(found[0].rpartition(" ")[2])

    def wait_for(self, name: str, value: float) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while self.metric(name) != value:
            assert time.monotonic() < end_s, (name, self.metric(name))
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        arguments = [
            "smollm2",
            "--layout",
            "tp1",
            "--device",
            "cpu",
            "--port",
            "0",
            "--max-model-len",
            "2048",
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with subprocess.Popen(
            [sys.executable, "-m", "launch", "serve", *arguments],
            cwd=ROOT,
            env=environment | {"TMPDIR": scratch},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            killer = threading.Timer(START_S, process.kill)
            killer.start()
            said = ""
            while not (found := re.search(r"serving smollm2 on (\S+)", said)):
                said = process.stderr.readline()
                assert said, "it ended by itself"
            killer.cancel()
            threading.Thread(target=process.stderr.read, daemon=True).start()  # lest it fill
            yield Server(process, found[1])
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def test_the_openai_package(server: Server) -> None:
    asked = {"model": "smollm2", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = server.client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    stream = server.client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert last.usage == whole.usage

    async def at_once() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            done = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(3)))
        return [one.choices[0].message.content for one in done]

    assert asyncio.run(at_once()) == [text] * 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="has no curl")
def test_curl(server: Server) -> None:
    body = json.dumps(
        {"prompt": "The sky is", "max_tokens": 4, "temperature": 0, "logprobs": 1, "stream": True}
    )
    argv = [
        "curl",
        "-sSN",
        f"{server.url}/v1/completions",
        "-H",
        "content-type: application/json",
        "-d",
        body,
    ]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [len(one["tokens"]) for one in told] == [1] * 4
    assert [one["text_offset"][0] for one in told][:1] == [0]


def test_answers_that_have_a_form(server: Server) -> None:
    age = {"type": "integer", "minimum": 10, "maximum": 99}
    schema = {"type": "object", "properties": {"age": age}, "required": ["age"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    asked: Any = {"model": "smollm2", "messages": CHAT, "max_tokens": 60, "temperature": 0}
    done = server.client.chat.completions.create(**asked, response_format=form)
    person = json.loads(done.choices[0].message.content or "")
    assert done.choices[0].finish_reason == "stop"
    assert 10 <= person["age"] <= 99
    regex = {"response_format": {"type": "regex", "regex": "(red|blue)!{3}"}}
    sampled = server.client.chat.completions.create(
        model="smollm2", messages=CHAT, n=2, seed=1, extra_body=regex
    )
    assert all(re.fullmatch("(red|blue)!{3}", choice.message.content or "") for choice in sampled.choices)
    tool: Any = {"type": "function", "function": {"name": "paint", "parameters": schema}}
    called = server.client.chat.completions.create(**asked, tools=[tool], tool_choice="required")
    (call,) = called.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "paint"
    assert 10 <= json.loads(call.function.arguments)["age"] <= 99


def test_a_client_that_leaves_is_dropped(server: Server) -> None:
    running, aborted = "vllm:num_requests_running", 'vllm:request_success_total{finished_reason="abort"'
    before = server.metric(aborted)
    stream = server.client.chat.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    assert server.metric(running) == 1
    stream.close()
    server.wait_for(aborted, before + 1)
    server.wait_for(running, 0)
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.5).chat.completions.create(**ENDLESS)
    server.wait_for(aborted, before + 2)
    server.wait_for(running, 0)


def test_sigterm_under_load(server: Server) -> None:
    """What is in flight ends, nothing new is taken, the exit code is 0."""
    asked = {"model": "smollm2", "messages": CHAT, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
    stream = iter(server.client.chat.completions.create(**asked, stream=True))
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    end_s = time.monotonic() + PATIENCE_S
    while server.status("/readyz") == 200:
        assert time.monotonic() < end_s
    assert server.status("/livez") == 200
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        server.client.chat.completions.create(**asked)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.process.wait(PATIENCE_S) == 0


REFUSED = {
    "--host 0.0.0.0": "lets others in and there is no API key: give --api-key-file, or --allow-without-key",
    "--host 256.1.1.1": "is no address of this machine",
    "--port 70000": "--port is 70000; it must be from 0 to 65535",
    "--port {taken}": "cannot listen on 127.0.0.1:{taken}: Address already in use; give another --port",
    "--api-key-file nowhere": "--api-key-file nowhere: No such file or directory",
    "--api-key-file {short}": "key 1 is shorter than 16 characters",
    "--api-key-file {empty}": "holds no key; give an API key a line",
    "--tool-call-parser xml": "--tool-call-parser is 'xml'; it must be one of hermes, mistral, llama3_json",
    "--kept-as x": "--kept-as wants --address: a private Ray ends with its server, and all replicas with it",
    "--kept-as a:b --address auto": "--kept-as is 'a:b'; it must be up to 64 letters",
    "--served-model-name a ''": "--served-model-name has an empty name; give what clients are to call the model",
    "--max-queue 0": "--max-queue is 0; it must be over 0",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_is_refused_before_anything_starts(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    from launch.__main__ import main

    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "empty").write_text("# none\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = {"taken": taken.getsockname()[1], "short": tmp_path / "short", "empty": tmp_path / "empty"}
        code = main(["serve", "smollm2", "--device", "cpu", *shlex.split(flags.format(**told))])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert REFUSED[flags].format(**told) in err
