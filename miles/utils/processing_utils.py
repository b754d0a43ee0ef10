"""Tokenizers and processors of checkpoints."""

from __future__ import annotations

from typing import Any

from miles.data import template


def load_tokenizer(name_or_path: str, chat_template_path: str | None = None, **_: Any) -> Any:
    """Load a checkpoint's tokenizer. Code that comes with a checkpoint is not run, whatever the arguments say."""
    return template.load_tokenizer(name_or_path, chat_template_path)


def load_processor(name_or_path: str, **_: Any) -> Any:
    """Return None: prompts are text, and no model with images is trained."""
    return None
