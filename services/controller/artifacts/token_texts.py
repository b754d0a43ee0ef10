"""The text of each token of a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"
"""What a decoder returns for bytes that are not a whole character yet."""
_MAX_PIECES = 4
"""Most bytes of a character, each of which may be a token."""

Decode = Callable[[Sequence[int]], str]


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
    """Return a text for each token; joined they are the response.

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
