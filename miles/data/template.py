"""Rendering and tokenisation of prompts, with a checkpoint's tokenizer and chat template."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.data.errors import DataError
from miles.types import Message, Prompt

_RESERVED = ("chat_template", "conversation", "return_dict", "return_tensors", "tokenize", "tools")
_BATCH = 1024


def load_tokenizer(hf_checkpoint: str, chat_template_path: str | None = None) -> Any:
    """Load a checkpoint's tokenizer, with the Jinja file `chat_template_path` as its chat template when given.

    Needs transformers, not torch. Raises DataError when the checkpoint holds no tokenizer or the file is missing.
    """
    from transformers import AutoTokenizer

    if hf_checkpoint.startswith(("/", "./", "../")) and not pathlib.Path(hf_checkpoint).is_dir():
        raise DataError(f"hf_checkpoint {hf_checkpoint} is not a folder")
    template = None
    if chat_template_path is not None:
        path = pathlib.Path(chat_template_path).expanduser()
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat_template_path {path} cannot be read: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"hf_checkpoint {hf_checkpoint} has no tokenizer that can be loaded: {error}") from error
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """Turns prompts into tokens.

    With `apply_chat_template`, messages are rendered with the tokenizer's chat template and a generation prompt; plain
    text counts as one user message. Without it, plain text is used unchanged. No special tokens are added: the template
    or the text itself must contain those that the model needs.
    """

    tokenizer: Any
    apply_chat_template: bool = False
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables for the template, e.g. {"enable_thinking": false}."""

    def __post_init__(self) -> None:
        if reserved := sorted(set(self.kwargs) & set(_RESERVED)):
            raise DataError(f"apply_chat_template_kwargs may not set {', '.join(reserved)}")
        if self.apply_chat_template and not self.tokenizer.chat_template:
            raise DataError(
                f"apply_chat_template is set, but the tokenizer of {self.tokenizer.name_or_path} has no chat template; "
                "give one with chat_template_path, or leave apply_chat_template out"
            )

    def render(self, prompt: Prompt, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Render a prompt to text. Raises DataError when the prompt does not fit the template."""
        if not self.apply_chat_template:
            if isinstance(prompt, str):
                return prompt
            raise DataError("the prompt is a list of messages, which needs apply_chat_template")
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        arguments = {"add_generation_prompt": True, **self.kwargs}
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=list(tools) if tools else None, tokenize=False, **arguments
            )
        except Exception as error:  # a template is user code, which can fail in any way
            raise DataError(f"the chat template failed: {type(error).__name__}: {error}") from error
        return str(text)

    def tokenize(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return the token ids of each rendered text; int32, shape (tokens,), read-only."""
        tokens: list[npt.NDArray[np.int32]] = []
        for first in range(0, len(texts), _BATCH):
            encoded = self.tokenizer(
                list(texts[first : first + _BATCH]),
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )
            tokens += [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        for array in tokens:
            array.setflags(write=False)
        return tokens
