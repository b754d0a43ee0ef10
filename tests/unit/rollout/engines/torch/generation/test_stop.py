"""When a response ends."""

from __future__ import annotations

import typing

from hypothesis import given
from hypothesis import strategies as st

from miles.services.rollout.engines.torch.generation.stop import StopRule, StopStrings

END = 256


class ByteDecoder:
    """Tokens 0 to 255 are bytes; 256 is a special token; the rest are words."""

    words: typing.ClassVar = {257: "hello wor", 258: "ld", 259: "", 260: "\n\nQ:"}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        text = b""
        for token in token_ids:
            text += bytes([token]) if token < 256 else self.words.get(token, "<|end|>").encode()
        return text.decode(errors="replace")


def first_stop(tokens: list[int], stop: tuple[str, ...], prompt: int = 0) -> int | None:
    """Response length at which the rule ends, fed token by token."""
    rule = StopRule((), StopStrings(ByteDecoder(), stop), 0)
    return next((n for n in range(1, len(tokens) - prompt + 1) if rule.ends(tokens[: prompt + n], n)), None)


def test_a_stop_string_is_found_across_token_boundaries() -> None:
    assert first_stop([*b"say ", 257, 258, 33], ("world",)) == 6


def test_a_stop_string_inside_one_token_ends_with_it() -> None:
    assert first_stop([65, 260, 66], ("\n\n",)) == 2


def test_a_stop_string_of_characters_split_into_bytes_is_found() -> None:
    text = "naïve 😀 end".encode()
    assert first_stop(list(text), ("😀",)) == len("naïve 😀".encode())


def test_tokens_without_text_do_not_hide_a_stop_string() -> None:
    assert first_stop([97, 259, 259, 98], ("ab",)) == 4


def test_special_tokens_are_matched_by_their_text() -> None:
    assert first_stop([97, END], ("<|end|>",)) == 2


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    assert first_stop([*b"STOP", *b"go"], ("STOP",), prompt=4) is None
    assert first_stop([*b"STO", *b"P"], ("STOP",), prompt=3) is None


@given(st.text(alphabet="ab\né", max_size=60), st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), min_size=1))
def test_byte_tokens_stop_where_the_text_first_holds_a_stop_string(text: str, stop: list[str]) -> None:
    data = text.encode()
    ends = [n for n in range(1, len(data) + 1) if any(s.encode() in data[:n] for s in stop)]
    assert first_stop(list(data), tuple(stop)) == (ends[0] if ends else None)


def test_a_response_cannot_end_before_its_minimum_and_end_tokens_are_banned_until_then() -> None:
    rule = StopRule((END, 5, 5), None, 3)
    assert rule.banned(0) == rule.banned(1) == (5, END)
    assert rule.banned(2) == ()
    assert not rule.ends([1, END], 2)
    assert rule.ends([1, 2, END], 3)


def test_a_stop_string_completed_before_the_minimum_does_not_end_the_response_later() -> None:
    rule = StopRule((), StopStrings(ByteDecoder(), ("ab",)), 3)
    assert not rule.ends([*b"ab"], 2)
    assert not rule.ends([*b"abc"], 3)
    assert rule.ends([*b"abcab"], 5)
