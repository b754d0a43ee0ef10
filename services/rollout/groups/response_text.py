"""The text of a response, as rewards, filters and records see it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any


def response_decoder(tokenizer: Any, end_tokens: Collection[int]) -> Callable[[Sequence[int], bool], str]:
    """Return the function (response tokens, leave out special tokens) -> text.

    The text ends before the token that ended the response: one of `end_tokens`, or any special token. It says that the
    answer is over and is no part of it. Stop strings, and stop tokens that are ordinary text, are what the model wrote
    and stay.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    to_text = text_decoder(tokenizer)
    ends = special.union(end_tokens, tokenizer.all_special_ids)

    def decode(tokens: Sequence[int], skip_special_tokens: bool) -> str:
        text_tokens = list(tokens[:-1] if len(tokens) and tokens[-1] in ends else tokens)
        return to_text(text_tokens, skip_special_tokens)

    return decode


def text_decoder(tokenizer: Any) -> Callable[[list[int], bool], str]:
    """Return the function (tokens, leave out special tokens) -> text, without any change to spaces."""
    from transformers import PreTrainedTokenizerFast

    own, usual = type(tokenizer), PreTrainedTokenizerFast
    if issubclass(own, usual) and own.decode is usual.decode and own._decode is usual._decode:
        backend = tokenizer.backend_tokenizer  # which `decode` calls, after checks that take longer than decoding
        return lambda tokens, skip: str(backend.decode(tokens, skip_special_tokens=skip))
    return lambda tokens, skip: str(
        tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    )
