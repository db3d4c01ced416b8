"""Prompts of a JSONL file: what a line may say, and where the next line starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import BadRequest
from launch.prompts import Prompt, check, from_file, from_texts
from orchestrator.request import SamplingParams
from tests.byte_text import BYTES

DEFAULTS = SamplingParams(max_tokens=9, temperature=0.5)


def read(tmp_path: Path, content: str | bytes) -> list[Prompt]:
    file = tmp_path / "asks.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return from_file(file, DEFAULTS, BYTES)


def test_a_line_overrides_the_command_lines_sampling(tmp_path: Path) -> None:
    line = '{"prompt": "ab", "max_tokens": 3, "seed": null, "top_p": 1, "stop_token_ids": [4], "logprobs": 2}'
    (prompt,) = read(tmp_path, line)
    assert prompt.token_ids == BYTES.encode("ab")
    wanted = SamplingParams(max_tokens=3, temperature=0.5, stop_token_ids=(4,), logprobs=2)
    assert prompt.sampling == wanted


def test_stop_may_be_one_string_or_several(tmp_path: Path) -> None:
    one, two = read(tmp_path, '{"prompt": "a", "stop": "x"}\n{"prompt": "a", "stop": ["x", "y"]}')
    assert (one.sampling.stop, two.sampling.stop) == (("x",), ("x", "y"))


def test_blank_lines_count_but_hold_no_prompt(tmp_path: Path) -> None:
    prompts = read(tmp_path, '\n{"prompt_token_ids": [1]}\r\n\n  \n{"prompt_token_ids": [2]}')
    assert [list(p.token_ids) for p in prompts] == [[1], [2]]
    assert [p.where.removeprefix(str(tmp_path)) for p in prompts] == [
        "/asks.jsonl line 2",
        "/asks.jsonl line 5",
    ]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for Python, but not for JSON."""
    (prompt,) = read(tmp_path, '{"prompt": "a\u2028b\u0085c"}')
    assert prompt.token_ids == BYTES.encode("a\u2028b\u0085c")


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    assert read(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}')[0].token_ids == BYTES.encode("a")


def test_messages_are_shown_by_the_last_one() -> None:
    class Chat:
        def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
            assert messages == [{"role": "user", "content": "hello"}]
            return [1, 2, 3]

    (prompt,) = from_texts(["hello"], DEFAULTS, Chat(), chat=True)  # type: ignore[arg-type]
    assert (prompt.token_ids, prompt.label, prompt.where) == ([1, 2, 3], "hello", "prompt 1")


def test_a_long_wrong_value_is_quoted_in_part(tmp_path: Path) -> None:
    with pytest.raises(BadRequest) as refused:
        read(tmp_path, '{"prompt_token_ids": "' + "x" * 10_000 + '"}')
    assert len(str(refused.value).removeprefix(str(tmp_path))) < 200
    assert '"xxx' in str(refused.value)


def test_one_that_can_never_run_is_named() -> None:
    prompts = [Prompt([1], DEFAULTS, "", "prompt 1"), Prompt([1] * 8, DEFAULTS, "", "prompt 2")]
    check(prompts, vocab=10, context=9, has_tokenizer=False)
    with pytest.raises(BadRequest, match="prompt 2: the prompt has 8 tokens; the context is 8"):
        check(prompts, vocab=10, context=8, has_tokenizer=False)
