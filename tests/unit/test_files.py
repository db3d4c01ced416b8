"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import launch.validate
from cluster.files import keep_whole, write_whole
from launch.__main__ import main
from orchestrator.engine import write_packed
from orchestrator.journal import write_durably


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


def test_what_can_be_made_again_is_told_where_it_cannot_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").touch()
    path = tmp_path / "cache" / "profile.json"
    keep_whole(b"found", path)
    (line,) = caplog.messages
    assert line.startswith(f"{path} cannot be kept (") and line.endswith("it will be made anew the next time")


def test_a_disk_without_room_is_no_bug_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "manifest.json"
    full.with_suffix(".new").symlink_to("/dev/full")
    monkeypatch.setattr(launch.validate, "run", lambda args: write_durably(full, {"a": 1}))
    assert main(["validate", "figures.csv"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"shardwise validate: {full}: No space left on device; make room there, or give another place that can be "
        "written\n"
    )

    def broken(args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(launch.validate, "run", broken)
    with pytest.raises(OSError, match="Input/output error"):
        main(["validate", "figures.csv"])


def test_what_safetensors_says_of_a_full_disk_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(write_packed, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as told:
        write_packed.write_shards(tmp_path, [("a", torch.zeros(2))])
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(tmp_path / "part-1.safetensors"))
