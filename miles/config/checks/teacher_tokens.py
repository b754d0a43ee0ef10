"""Checks whether a teacher has the policy's tokens: it is asked by token ids."""

from __future__ import annotations

import pathlib

from miles.config.checks.json_file import read_json_object


def why_other_tokens(policy: str, teacher: str) -> str | None:
    """Say how the tokens of two Hugging Face folders differ; None when they do not, or nothing can be compared.

    With the same tokenizer the sizes of embeddings may differ: many models have rows that no token uses.
    """
    vocabularies = [_vocabulary(folder) for folder in (policy, teacher)]
    if all(vocabularies):
        own, others = vocabularies
        different = 0 if own == others else sum(others.get(token) != number for token, number in own.items())
        if not different:
            return None
        return f"its tokenizer.json gives {different} of the policy's {len(own)} tokens no id or another one"
    sizes = [read_json_object(pathlib.Path(folder) / "config.json").get("vocab_size") for folder in (policy, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        return f"its vocab_size is {sizes[1]} instead of {sizes[0]}"
    return None


def _vocabulary(folder: str) -> dict[str, int]:
    path = pathlib.Path(folder) / "tokenizer.json"
    if not path.is_file():
        return {}
    model = read_json_object(path).get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    return found if isinstance(found, dict) else {}
