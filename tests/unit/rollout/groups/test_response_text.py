"""The text of a response ends before its end token."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from tokenizers import AddedToken, decoders
from toy_tokenizer import save_tokenizer

from miles.data import load_tokenizer
from miles.services.rollout.groups.response_text import response_decoder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One token a character; ~ ends a text, <|call|> is special and </think> is ordinary."""
    folder: pathlib.Path = tmp_path_factory.mktemp("tokenizer")
    made = load_tokenizer(save_tokenizer(folder, None))
    made.backend_tokenizer.decoder = decoders.Fuse()
    made.backend_tokenizer.add_special_tokens([AddedToken("<|call|>", special=True)])
    made.backend_tokenizer.add_tokens([AddedToken("</think>", special=False)])
    return made


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("42~", "42"),  # the tokenizer's end token
        ("42!", "42"),  # one that only the checkpoint's configuration names
        ("42<|call|>", "42"),
        ("42", "42"),
        ("x</think>", "x</think>"),
        ("42;", "42;"),  # a stop token that is ordinary text
        ("~", ""),
        ("", ""),
    ],
)
def test_a_response_reads_without_the_token_that_ended_it(tokenizer: Any, response: str, text: str, skip: bool) -> None:
    tokens = tokenizer.encode(response, add_special_tokens=False)
    decode = response_decoder(tokenizer, {tokenizer.convert_tokens_to_ids("!")})
    assert decode(tokens, skip) == text


def test_only_the_last_token_is_left_out(tokenizer: Any) -> None:
    tokens = tokenizer.encode("4~2~", add_special_tokens=False)
    assert response_decoder(tokenizer, ())(tokens, False) == "4~2"


def test_the_text_keeps_spaces_before_punctuation(tokenizer: Any) -> None:
    assert response_decoder(tokenizer, ())(tokenizer.encode("4 , 2 .", add_special_tokens=False), False) == "4 , 2 ."
