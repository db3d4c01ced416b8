"""Text to measure and to calibrate by: a file, or what every Python brings: its own language reference."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import BadRequest

BUNDLED = "Python's language reference"


def read_text(path: Path) -> str:
    """Raises BadRequest."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"{path} cannot be read ({error.strerror}); give a file of plain text") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 at byte {error.start}; give a file of plain text") from None


def bundled(*, to_calibrate: bool = False) -> str:
    """Every other topic to measure by, those between them to calibrate by. Raises BadRequest."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise BadRequest("this Python comes without pydoc_data; give a file of plain text") from None
    return "\n\n".join(topics[name] for name in sorted(topics)[to_calibrate::2])
