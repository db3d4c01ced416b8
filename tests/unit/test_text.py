"""Tokens to text a step at a time, stop strings, chat templates, tokenizers of directories and GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from cluster.errors import BadModel, BadRequest
from launch.models import resolve
from orchestrator.text import AnswerText, Detokenizer, StopFinder, Text, text_of
from strategies.source import ModelSource, SourceKind
from tests.byte_text import BYTES

EMOJI = "Hello 🤗🏳️‍🌈 日本 été, naïve — ok"


@pytest.fixture(scope="module")
def smollm2() -> Text:
    text = text_of(resolve("smollm2"))
    assert text is not None
    return text


@given(st.text())
def test_incremental_text_is_the_text_and_never_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in BYTES.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_text_decode_as_a_whole(tokens: list[int]) -> None:
    detokenizer = Detokenizer(BYTES)
    assert "".join(map(detokenizer.push, tokens)) + detokenizer.flush() == BYTES.decode(tokens)


def test_bytes_that_never_become_text_do_not_pile_up() -> None:
    (first,) = BYTES._tokenizer.encode("é").ids[:1]
    detokenizer = Detokenizer(BYTES)
    assert any(detokenizer.push(first) for _ in range(100))


def test_smollm2_incremental(smollm2: Text) -> None:
    tokens = smollm2.encode(EMOJI + "<|im_end|>" + EMOJI)
    detokenizer = Detokenizer(smollm2)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == smollm2.decode(tokens) == EMOJI * 2
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_left_out_and_an_unfinished_character_comes_last() -> None:
    end = next(iter(BYTES.special_ids))
    answer = AnswerText(BYTES)
    tokens = [*BYTES.encode("a"), end, *BYTES.encode("é")[:1]]
    assert [answer.push(token) for token in tokens] == ["a", "", ""]
    assert answer.finish() == "\ufffd"
    assert answer.text == "a\ufffd"


def _answer(text: str, stops: list[str], min_tokens: int = 0) -> tuple[list[str], AnswerText]:
    answer = AnswerText(BYTES, stops, min_tokens)
    pieces = [answer.push(token) for token in BYTES.encode(text)]
    return [*pieces, answer.finish()], answer


def test_stop_strings_across_tokens() -> None:
    pieces, answer = _answer("one STOP two", ["STOP"])
    assert (answer.text, answer.stopped) == ("one ", True)
    assert "".join(pieces) == "one "


def test_what_may_be_a_stop_string_is_held_back_and_given_when_it_is_not() -> None:
    pieces, answer = _answer("a STO b ST", ["STOP"])
    assert pieces == ["a", " ", "", "", "", "STO ", "b", " ", "", "", "ST"]
    assert (answer.text, answer.stopped) == ("a STO b ST", False)


def test_the_first_of_several_stop_strings_cuts() -> None:
    finder = StopFinder(["END", "wor"])
    assert finder.push("hello world END") == "hello "
    assert finder.stopped
    assert finder.push("more") == finder.flush() == ""


def test_a_stop_string_may_overlap_itself() -> None:
    finder = StopFinder(["aab"])
    assert [finder.push(c) for c in "aaab"] == ["", "", "a", ""]
    assert finder.stopped


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    _, answer = _answer("xxabxx", ["x"], min_tokens=2)
    assert answer.text == "xxab"


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stopping_by_pieces_equals_stopping_at_once(text: str, stops: list[str]) -> None:
    _, answer = _answer(text, stops)
    # The stop that is complete first cuts; of those complete at one token, the one that starts first.
    starts = [(text.find(stop), stop) for stop in stops if stop in text]
    ends = [(start + len(stop), start) for start, stop in starts]
    first = min(ends, default=(0, len(text)))[0]
    cut = min((start for end, start in ends if end == first), default=len(text))
    assert answer.text == text[:cut]


def test_smollm2_cuts_off_digits(smollm2: Text) -> None:
    newlines = smollm2.encode("\n\n")
    assert len(newlines) == 1
    assert smollm2.encode("\n\n12") == newlines + smollm2.encode("1") + smollm2.encode("2")


def test_chats_that_the_template_refuses(smollm2: Text) -> None:
    with pytest.raises(BadRequest, match="refuses these messages"):
        smollm2.encode_chat([{"role": "user"}])
    with pytest.raises(BadRequest, match="has no chat template; give a prompt"):
        BYTES.encode_chat([{"role": "user", "content": "hi"}])


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.content }}]{% endfor %}{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def _directory(path: Path, template: str | None) -> Path:
    tokenizer = Tokenizer.from_str(BYTES._tokenizer.to_str())
    tokenizer.enable_truncation(4)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token="<end>"
    )
    fast.save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def test_a_directory(tmp_path: Path) -> None:
    text = text_of(ModelSource("m", _directory(tmp_path, TEMPLATE), SourceKind.HF))
    assert text is not None
    assert text.decode(text.encode("not cut short")) == "not cut short"
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    ids = text.encode_chat([{"role": "user", "content": "hi"}], [tool])
    assert ids[0] in text.special_ids
    assert text.decode(ids) == "[hi]<f>>"
    with pytest.raises(BadRequest, match="no system"):
        text.encode_chat([{"role": "system", "content": "x"}])


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    text = text_of(ModelSource("m", _directory(tmp_path, escape), SourceKind.HF))
    assert text is not None
    with pytest.raises(BadRequest, match="unsafe"):
        text.encode_chat([{"role": "user", "content": "hi"}])


def test_models_without_a_tokenizer(tmp_path: Path) -> None:
    assert text_of(ModelSource("m", tmp_path, SourceKind.HF)) is None
    assert text_of(ModelSource("Qwen3-8B", None, SourceKind.BUILTIN)) is None
    assert text_of(ModelSource("m", _gguf(tmp_path), SourceKind.GGUF)) is None


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadModel, match="cannot be read"):
        text_of(ModelSource("m", tmp_path, SourceKind.HF))


def _gguf(path: Path, **fields: Any) -> Path:
    file = path / "m.gguf"
    writer = GGUFWriter(file, "llama")
    for key, value in fields.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_gguf_sentencepiece(tmp_path: Path) -> None:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *"▁helo", "he", "ll", "hell", "hello", "▁hello"]
    types = [2, 3, 3, *[6] * 256, *[1] * 10]
    scores = [0.0] * 264 + [-1.0, -2.0, -3.0, -4.0, -5.0]
    file = _gguf(
        tmp_path,
        tokenizer_model="llama",
        token_list=tokens,
        token_types=types,
        token_scores=scores,
        bos_token_id=1,
        eos_token_id=2,
    )
    text = text_of(ModelSource("m", file, SourceKind.GGUF))
    assert text is not None
    ids = text.encode("hello hello é")
    hello = tokens.index("▁hello")
    assert ids[:3] == [1, hello, hello]
    assert text.decode(ids) == "hello hello é"
    detokenizer = Detokenizer(text)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "hello hello é"


@pytest.mark.parametrize(
    ("pre", "bos", "words"),
    [("llama-bpe", True, 3), ("qwen2", False, 5), ("tekken", True, 5), ("gpt-2", False, 3)],
)
def test_gguf_byte_level_kinds_cut_digits_as_they_must(
    pre: str, bos: bool, words: int, tmp_path: Path
) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", *alphabet, "12", "123"]
    file = _gguf(
        tmp_path,
        tokenizer_model="gpt2",
        tokenizer_pre=pre,
        token_list=tokens,
        token_types=[3, *[1] * 258],
        token_merges=["1 2", "12 3"],
        bos_token_id=0,
    )
    text = text_of(ModelSource("m", file, SourceKind.GGUF))
    assert text is not None
    ids = text.encode("a 123")
    assert (ids[0] == 0) == bos
    assert len(ids) - bos == words
    assert text.decode(ids) == "a 123"


def test_gguf_tokenizers_of_unknown_kinds(tmp_path: Path) -> None:
    file = _gguf(tmp_path, tokenizer_model="t5", token_list=["a"])
    with pytest.raises(BadModel, match="tokenizer 't5' is not supported; supported are gpt2 and llama"):
        text_of(ModelSource("m", file, SourceKind.GGUF))
    file = _gguf(tmp_path, tokenizer_model="gpt2", tokenizer_pre="odd", token_list=["a"])
    with pytest.raises(BadModel, match=r"pre-tokenizer 'odd' is not supported.*qwen2"):
        text_of(ModelSource("m", file, SourceKind.GGUF))
