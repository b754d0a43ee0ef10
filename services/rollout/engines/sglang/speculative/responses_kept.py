"""Earlier responses that an engine's servers search for drafts: which are kept, and how they are put together. Pure."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]

PROMPT_TOKENS = 32
"""End of the prompt before each response, by which the first tokens of the next one are found; SGLang looks for the
last 18 tokens of a request (--speculative-ngram-max-trie-depth)."""


class ResponsesKept:
    """The earlier responses of the prompts that came last, within a number of tokens."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: of all responses and ends of prompts together."""
        self._max_tokens = max_tokens
        self._kept: OrderedDict[bytes, list[Tokens]] = OrderedDict()
        """By prompt, the one that came last at the end: each response behind the prompt's end."""
        self._total = 0
        self._last: tuple[str, object] | None = None

    def offer(self, group: str, prompt: Sequence[int], responses: Sequence[Tokens]) -> bool:
        """Keep a prompt's responses, newest first, instead of those it had; False when nothing changes.

        All requests of a group offer the same objects, so that those behind its first cost nothing.
        """
        if not responses or self._last == (group, id(responses[0])):
            return False
        self._last = (group, id(responses[0]))
        ids = np.asarray(prompt, np.int32)
        key = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        end = ids[-PROMPT_TOKENS:]
        new = [np.concatenate([end, np.asarray(each, np.int32)]) for each in responses if len(each)]
        before = self._kept.pop(key, [])
        self._total += _size(new) - _size(before)
        if new:
            self._kept[key] = new
        while self._total > self._max_tokens:
            _, dropped = self._kept.popitem(last=False)
            self._total -= _size(dropped)
        return len(new) != len(before) or any(not np.array_equal(a, b) for a, b in zip(new, before, strict=True))

    @property
    def tokens(self) -> int:
        """Of all that is kept, with a separator behind each response."""
        return self._total

    def documents(self) -> list[Tokens]:
        """Each response behind the end of its prompt, the likeliest to be met again last.

        SGLang takes the latest occurrence first, so that the newest response of the newest prompt is at the end.
        """
        return [response for responses in self._kept.values() for response in reversed(responses)]


def _size(responses: Sequence[Tokens]) -> int:
    return sum(len(response) + 1 for response in responses)
