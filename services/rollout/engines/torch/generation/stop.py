"""Stop rules: whether a response ends with its newest token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol


class Decoder(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens."""


class StopStrings:
    """Detects a stop string that the newest token completes, decoding only the response's tail.

    A stop string of n bytes is covered by the last n tokens that have text; one more token gives the decoder the
    context of the first, and three more allow for tokens that hold part of a character.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._tail = max(len(text.encode()) for text in stop) + 4

    def completed_by_last(self, tokens: Sequence[int], response_length: int) -> bool:
        """Whether a stop string ends within the last of `tokens`, whose last `response_length` are the response."""
        tail = list(tokens[-min(self._tail, response_length) :])
        text = self._decoder.decode(tail, skip_special_tokens=False)
        candidates = [stop for stop in self._stop if stop in text]
        if not candidates:
            return False
        before = self._decoder.decode(tail[:-1], skip_special_tokens=False)
        return any(text.count(stop) > before.count(stop) for stop in candidates)


class StopRule:
    """Everything that can end one response with reason STOP."""

    def __init__(self, stop_token_ids: Collection[int], strings: StopStrings | None, min_new_tokens: int) -> None:
        self.stop_token_ids = tuple(sorted(set(stop_token_ids)))
        self._strings = strings
        self._min_new_tokens = min_new_tokens

    def banned(self, response_length: int) -> tuple[int, ...]:
        """Tokens that may not come next at this response length: none once the response may end."""
        return self.stop_token_ids if response_length + 1 < self._min_new_tokens else ()

    def ends(self, tokens: Sequence[int], response_length: int) -> bool:
        """Whether the response, the last `response_length` (> 0) of `tokens`, ends with its last token."""
        if response_length < self._min_new_tokens:
            return False
        if tokens[-1] in self.stop_token_ids:
            return True
        return self._strings is not None and self._strings.completed_by_last(tokens, response_length)
