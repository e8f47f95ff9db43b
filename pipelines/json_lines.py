"""Files of JSON lines that several processes append to, each with one write call. Imports no torch."""

import json
import os
from pathlib import Path
from typing import Any


def append_json(path: Path, content: dict[str, Any]) -> None:
    """Append a line. OSError if it cannot be written; ValueError for what JSON has no number for."""
    # A line end before it, too: a full disk may have cut the last line short.
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(file, b"\n" + text.encode() + b"\n")
    finally:
        os.close(file)
