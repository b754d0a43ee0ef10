"""Reads JSON files that may be missing or damaged."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty when the file cannot be read or has none."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
