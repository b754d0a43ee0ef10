"""Names of dumped files: templates with placeholders."""

from __future__ import annotations

import pathlib
import re
import string

_WIDTH = re.compile(r"(0?\d{1,2}d?)?")
"""What may stand behind a placeholder's colon: {rollout_id:05d}."""


def why_no_template(text: str, *names: str) -> str:
    """Say why a text is no path with these placeholders in braces; empty when it is one."""
    allowed = f"it may hold the placeholders {', '.join(f'{{{name}}}' for name in names)} alone"
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(text)]
    except ValueError as error:
        return f"{allowed} ({error})"
    for name, spec, conversion in fields:
        if name is not None and (name not in names or not _WIDTH.fullmatch(spec or "") or conversion):
            return allowed
    return ""


def changes_with(text: str, name: str, *others: str) -> bool:
    """Return whether a template names another file for another value of this placeholder."""
    rest = dict.fromkeys(others, 0)
    return text.format(**{name: 0}, **rest) != text.format(**{name: 1}, **rest)


def rollout_path(template: str, rollout_id: int) -> pathlib.Path:
    """Return the file of a rollout."""
    return pathlib.Path(template.format(rollout_id=rollout_id))
