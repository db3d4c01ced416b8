"""What people have, as the lines of OpenAI's batch files: JSONL, plain text, a column of CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from cluster.errors import BadRequest
from orchestrator.request import SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_KINDS = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".tsv", ".parquet")
_SAMPLING = frozenset(SamplingParams.__struct_fields__)


@dataclass(frozen=True, slots=True)
class Source:
    path: Path
    column: str | None = None  # of a table, that holds the prompts
    chat: bool = False  # a prompt is a user's message
    sampling: Mapping[str, Any] | None = None  # of lines that say nothing themselves


def endpoint_of(source: Source) -> str:
    """What the file's requests are for, by its first. Raises BadRequest."""
    first = next(_rows(source), None)
    if first is None:
        raise BadRequest(f"{source.path} holds no requests; give one a line")
    return CHAT if _is_chat(first, source) else COMPLETIONS


def is_batch_file(source: Source) -> bool:
    """Whether its lines are OpenAI's already, and may go as they are."""
    if source.path.suffix not in (".jsonl", ".json", ".ndjson"):
        return False
    first = next(_rows(source), None)
    return first is not None and "custom_id" in first


def write_lines(source: Source, to: Path) -> None:
    """A batch file of it. Raises BadRequest, naming the row."""
    endpoint = endpoint_of(source)
    with to.open("wb") as file:
        for number, row in enumerate(_rows(source), 1):
            if _is_chat(row, source) != (endpoint == CHAT):
                raise BadRequest(
                    f"{source.path} row {number}: prompts and messages are mixed; give one kind a file"
                )
            line = {
                "custom_id": f"row-{number}",
                "method": "POST",
                "url": endpoint,
                "body": _body(row, source),
            }
            file.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")


def _is_chat(row: Mapping[str, Any], source: Source) -> bool:
    if "custom_id" in row:
        return row.get("url") == CHAT
    return "messages" in row or (source.chat and "prompt" in row)


def _body(row: Mapping[str, Any], source: Source) -> dict[str, Any]:
    asked = {**(source.sampling or {}), **{name: value for name, value in row.items() if name in _SAMPLING}}
    if "messages" in row:
        return {**asked, "messages": row["messages"]}
    if "prompt_token_ids" in row:
        return {**asked, "prompt": row["prompt_token_ids"]}
    prompt = row["prompt"]
    return (
        {**asked, "messages": [{"role": "user", "content": prompt}]}
        if source.chat
        else {**asked, "prompt": prompt}
    )


def _rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """Raises BadRequest."""
    suffix = source.path.suffix.lower()
    if suffix not in _KINDS:
        raise BadRequest(f"{source.path} is none of {', '.join(_KINDS)}; convert it to JSONL")
    if not source.path.is_file():
        raise BadRequest(f"{source.path} does not exist; give a file of requests")
    if suffix == ".parquet":
        return _parquet(source)
    return _text(source, suffix)


def _text(source: Source, suffix: str) -> Iterator[Mapping[str, Any]]:
    try:
        with source.path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".txt":
                yield from ({"prompt": line.rstrip("\r\n")} for line in file if line.strip())
            elif suffix in (".csv", ".tsv"):
                yield from _table(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","), source)
            else:
                yield from (_object(n, line, source) for n, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise BadRequest(f"{source.path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except csv.Error as error:
        raise BadRequest(f"{source.path} is no CSV: {error}") from None


def _object(number: int, line: str, source: Source) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{source.path} line {number} is not JSON at column {len(line[: error.pos].rstrip()) + 1}"
        raise BadRequest(f"{where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{source.path} line {number} is not JSON: {str(error)[:100]}") from None
    kinds = ("custom_id", "messages", "prompt", "prompt_token_ids")
    if not isinstance(found, dict) or not any(kind in found for kind in kinds):
        raise BadRequest(f"{source.path} line {number} has none of {', '.join(kinds)}; give one of them")
    return found


def _table(rows: Iterator[Mapping[str, Any]], source: Source) -> Iterator[Mapping[str, Any]]:
    first = next(iter(rows), None)
    if first is None:
        return
    column = source.column or "prompt"
    if column not in first:
        columns = ", ".join(str(name) for name in first)
        raise BadRequest(f"{source.path} has no column {column!r}; give --column, one of {columns}")
    yield from ({"prompt": row[column]} for row in chain([first], rows))


def _parquet(source: Source) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise BadRequest(
            "Parquet files need pyarrow: pip install pyarrow, or convert the file to CSV"
        ) from None
    file = parquet.ParquetFile(source.path)
    column = source.column or "prompt"
    if column not in file.schema_arrow.names:
        columns = ", ".join(file.schema_arrow.names)
        raise BadRequest(f"{source.path} has no column {column!r}; give --column, one of {columns}")
    for batch in file.iter_batches(batch_size=1024, columns=[column]):
        yield from ({"prompt": str(value)} for value in batch.column(0).to_pylist())
