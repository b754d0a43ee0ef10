"""Checkpoints with a toy tokenizer, and prompt files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from toy_tokenizer import CHAT_TEMPLATE, save_tokenizer

from miles.data import load_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a checkpoint with a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("checkpoint"), CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a checkpoint without a chat template."""
    return save_tokenizer(tmp_path_factory.mktemp("plain"), None)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: str) -> Any:
    """The tokenizer of `checkpoint`."""
    return load_tokenizer(checkpoint)


@pytest.fixture
def write_jsonl(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Writes rows (objects, or text as it is) to a .jsonl file and returns its path."""

    def write(*rows: Any, name: str = "prompts.jsonl") -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return str(tmp_path / name)

    return write
