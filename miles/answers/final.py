"""Which part of a response counts as its answer: what follows the thinking."""

from __future__ import annotations

_THINKING_ENDS = (
    "</think>",
    "</thinking>",
    "</thought>",
    "[/THINK]",
    "\u25c1/think\u25b7",
    "<|channel|>final<|message|>",
)
_THINKING_BEGINS = ("<think>", "<thinking>", "<thought>", "[THINK]", "\u25c1think\u25b7")


def final_answer(response: str) -> str:
    """Return what follows the last end of thinking; all of a response that does not think.

    Thinking that was begun and never ended has no answer behind it: the empty text.
    """
    ends = [(found, mark) for mark in _THINKING_ENDS if (found := response.rfind(mark)) >= 0]
    if ends:
        found, mark = max(ends)
        response = response[found + len(mark) :]
    return _up_to_thinking(response)


def _up_to_thinking(text: str) -> str:
    begins = [found for mark in _THINKING_BEGINS if (found := text.find(mark)) >= 0]
    return text[: min(begins)] if begins else text
