"""A tokenizer with one token per character, saved in a checkpoint."""

from __future__ import annotations

import pathlib
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% if tools %}T{{ tools | length }};{% endif %}"
    "{% for m in messages %}{{ m.role[0] | upper }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}{% if note is defined %}{{ note }}{% endif %}"
)


def save_tokenizer(folder: pathlib.Path, chat_template: str | None) -> str:
    """Save a tokenizer whose token ids are code points minus 32."""
    tokenizer = Tokenizer(models.WordLevel({chr(c): c - 32 for c in range(32, 127)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ", eos_token="~")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return str(folder)


def text_of(tokens: Any) -> str:
    """What tokens of the test tokenizer stand for."""
    return "".join(chr(token + 32) for token in tokens)
