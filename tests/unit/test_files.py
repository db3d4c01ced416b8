"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.files import write_whole


def test_the_newest_is_there_alone(tmp_path: Path) -> None:
    path = tmp_path / "below" / "one.json"
    write_whole(b"older", path)
    write_whole(b"newer", path)
    assert path.read_bytes() == b"newer"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_put_there_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(b"more", path)
    assert list(tmp_path.iterdir()) == [path]
