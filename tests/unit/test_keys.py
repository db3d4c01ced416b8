"""A file of API keys, as servers and clients read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import UserError
from launch.keys import own_key, read_keys

LONG, OTHER = "a" * 32, "b" * 32


def written(directory: Path, text: str) -> Path:
    path = directory / "keys.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_remarks_and_empty_lines_are_no_keys(tmp_path: Path) -> None:
    path = written(tmp_path, f"\ufeff# of the shop\n\n  # of the till\n {LONG} \r\n{OTHER}\n")
    assert read_keys(path) == [LONG, OTHER]
    assert own_key(path) == LONG
    assert (read_keys(None), own_key(None)) == ([], None)


def test_another_servers_key_may_be_short_and_ours_may_not(tmp_path: Path) -> None:
    path = written(tmp_path, "# of another server\nsk-1\n")
    assert own_key(path) == "sk-1"
    with pytest.raises(UserError, match="key 1 is shorter than 16 characters; try `openssl rand -hex 32`"):
        read_keys(path)


@pytest.mark.parametrize("read", [read_keys, own_key])
@pytest.mark.parametrize("text", ["", "\n \n", "# a remark\n"])
def test_a_file_without_a_key_is_told(read: object, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no key; give an API key a line"):
        read(written(tmp_path, text))  # type: ignore[operator]
    with pytest.raises(UserError, match="No such file or directory; give a file with an API key a line"):
        read(tmp_path / "nowhere")  # type: ignore[operator]
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not UTF-8"):
        read(tmp_path / "binary")  # type: ignore[operator]
