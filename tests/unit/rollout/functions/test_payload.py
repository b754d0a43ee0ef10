from __future__ import annotations

import time
from typing import Any

import pytest

from miles.services.rollout.engines.base import FinishReason, GenerationResult, SamplingParams
from miles.services.rollout.functions.payload import PayloadError, TextTools, answer, read_call
from miles.services.rollout.groups.partial_response import Piece
from miles.types import VersionSpan

END = ord("~")
TOOLS = TextTools(
    encode=lambda text: [ord(c) for c in text],
    decode=lambda tokens, skip: "".join(chr(t) for t in tokens if not (skip and t == END)),
    end_tokens=frozenset({END}),
    longest=10,
)


def test_text_and_parameters_are_read_as_sglang_reads_them() -> None:
    params = {"temperature": 0.5, "top_k": 3, "stop": "x", "stop_token_ids": [7], "max_new_tokens": 4}
    call = read_call({"text": "ab", "sampling_params": {**params, "repetition_penalty": 1.0, "min_p": 0.0}}, TOOLS)
    assert list(call.input_ids) == [97, 98]
    assert call.sampling == SamplingParams(4, temperature=0.5, top_k=3, stop=("x",), stop_token_ids=(7,))
    assert (call.seeded, call.skip_special_tokens, call.trim_stop) == (False, True, True)


def test_new_tokens_are_limited_by_the_models_length() -> None:
    assert read_call({"input_ids": [1] * 8}, TOOLS).sampling.max_new_tokens == 2
    assert read_call({"input_ids": [1] * 12}, TOOLS).sampling.max_new_tokens == -2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "the body is not a JSON object"),
        ({}, "give either text or input_ids"),
        ({"text": "a", "input_ids": [1]}, "give either text or input_ids"),
        ({"text": ["a", "b"]}, "there is one request a call"),
        ({"input_ids": [[1]]}, "there is one request a call"),
        ({"input_ids": []}, "there are no input tokens"),
        ({"text": "a", "stream": True}, "stream = True: not served here"),
        ({"text": "a", "image_data": ["x"]}, "image_data = "),
        ({"text": "a", "sampling_params": {"min_p": 0.1}}, r"sampling_params.min_p = 0.1: not served here"),
        ({"text": "a", "sampling_params": {"n": 2}}, r"sampling_params.n = 2"),
        ({"text": "a", "sampling_params": {"top_p": "1"}}, r"sampling_params.top_p = '1' is no number"),
    ],
)
def test_what_is_not_served_is_refused(body: Any, words: str) -> None:
    with pytest.raises(PayloadError, match=words):
        read_call(body, TOOLS)


def answered(text: str, reason: FinishReason, **params: Any) -> dict[str, Any]:
    call = read_call({"text": "a", "sampling_params": params}, TOOLS)
    piece = Piece()
    piece.token_ids, piece.log_probs = TOOLS.encode(text), [-0.5] * len(text)
    piece.result = GenerationResult(reason, (VersionSpan(3, 0, 1), VersionSpan(4, 1, len(text))), 1)
    return answer(call, piece, TOOLS, rid="r", began_s=time.monotonic())


def test_an_answer_has_tokens_log_probs_versions_and_the_reason() -> None:
    found = answered("xy", FinishReason.LENGTH)
    assert (found["text"], found["output_ids"]) == ("xy", [120, 121])
    meta = found["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 120, None], [-0.5, 121, None]]
    assert meta["finish_reason"] == {"type": "length", "length": 2}
    assert (meta["weight_version"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (
        *("4", 1, 2, 1),
    )


@pytest.mark.parametrize(
    ("text", "params", "shown", "matched"),
    [
        ("xy~", {}, "xy", END),
        ("xy~", {"no_stop_trim": True, "skip_special_tokens": False}, "xy~", END),
        ("xy~", {"no_stop_trim": True}, "xy", END),
        ("xyz", {"stop": ["q", "z"]}, "xy", "z"),
        ("xyz", {"stop": ["q", "z"], "no_stop_trim": True}, "xyz", "z"),
    ],
)
def test_the_text_ends_before_or_behind_what_ended_it(
    text: str, params: dict[str, Any], shown: str, matched: int | str
) -> None:
    found = answered(text, FinishReason.STOP, **params)
    assert found["text"] == shown
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
