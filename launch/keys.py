"""API keys in a file: one a line, lines that begin with # are remarks."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import UserError

LEAST_KEY = 16  # characters: shorter ones can be guessed


def read_keys(path: Path | None, *, least: int = LEAST_KEY) -> list[str]:
    """All of them, each of `least` characters or more: a server's must not be guessed. Raises UserError."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--api-key-file {path}: {reason}; give a file with an API key a line") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UserError(f"--api-key-file {path} holds no key; give an API key a line")
    short = next((i for i, key in enumerate(keys, 1) if len(key) < least), None)
    if short is not None:
        raise UserError(
            f"--api-key-file {path}: key {short} is shorter than {least} characters; try `openssl rand -hex 32`"
        )
    return keys


def own_key(path: Path | None) -> str | None:
    """What a client of any server shows: the first key, however short. Raises UserError."""
    return next(iter(read_keys(path, least=1)), None)
