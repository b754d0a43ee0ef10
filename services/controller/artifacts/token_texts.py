"""The text of each token of a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"
"""What a decoder puts for bytes that are no character yet."""
_MAX_PIECES = 4
"""A character has at most so many bytes, each of which may be a token."""

Decode = Callable[[Sequence[int]], str]


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
    """A text for each token; put together they are the response.

    A token is decoded with the one before, for decoders that drop a space at the beginning. One whose bytes do not end
    a character has no text of its own: the token that ends the character has all of it.
    """
    texts: list[str] = []
    context, begin = 0, 0
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[context:begin]), decode(ids[context:end])
        if text.endswith(_INCOMPLETE) and end - begin < _MAX_PIECES and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        context, begin = begin, end
    return texts
