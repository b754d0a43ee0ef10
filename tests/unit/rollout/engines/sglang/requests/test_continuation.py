"""A response that several requests produce, and that its reader sees as one."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from miles.services.rollout.engines.base import (
    FinishReason,
    GenerationDelta,
    GenerationRequest,
    GenerationResult,
    SamplingParams,
)
from miles.services.rollout.engines.sglang.requests.continuation import Continuation, read_end_tokens
from miles.types import SpeculativeStats, VersionSpan

PROMPT = [5, 6, 7]


def request(**sampling: object) -> GenerationRequest:
    return GenerationRequest(
        "r", PROMPT, SamplingParams(**{"max_new_tokens": 10, **sampling}), return_routed_experts=True
    )


def ended(
    reason: FinishReason, tokens: list[int], version: int, rows: range | None, *, retractions: int = 0
) -> GenerationDelta:
    """The last delta of one request: rows of routing as one layer and one expert, which is the row's number."""
    experts = None if rows is None else np.array(rows, np.uint8).reshape(-1, 1, 1)
    spans = (VersionSpan(version, 0, len(tokens)),) if tokens else ()
    stats = SpeculativeStats(1, 2, 3) if tokens else None
    result = GenerationResult(reason, spans, 2 + version, experts, stats, retractions)
    return GenerationDelta(tokens, [-1.0] * len(tokens), result)


def result_of(delta: GenerationDelta) -> GenerationResult:
    assert delta.result is not None
    return delta.result


def test_the_next_request_goes_on_behind_what_was_recorded() -> None:
    response = Continuation(request())
    assert response.request == request()
    response.add(GenerationDelta([1], [-1.0]))
    first = result_of(response.add(ended(FinishReason.ABORT, [2], 0, range(4))))
    assert response.goes_on(first)
    following = response.request
    assert (following.input_ids, following.resumed_tokens) == ([5, 6, 7, 1, 2], 2)
    assert following.routed_experts_start == 4
    assert following.sampling == request().sampling


def test_the_results_of_all_requests_are_one() -> None:
    response = Continuation(request())
    assert response.goes_on(result_of(response.add(ended(FinishReason.ABORT, [1, 2], 0, range(4)))))
    assert response.goes_on(result_of(response.add(ended(FinishReason.ABORT, [], 0, None))))  # it had not begun
    assert response.aborted().weight_versions == (VersionSpan(0, 0, 2),)
    last = result_of(response.add(ended(FinishReason.STOP, [3, 4], 1, range(4, 6), retractions=1)))
    assert last.reason is FinishReason.STOP
    assert last.weight_versions == (VersionSpan(0, 0, 2), VersionSpan(1, 2, 4))
    assert last.routed_experts is not None
    assert last.routed_experts.ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert last.speculative == SpeculativeStats(2, 4, 6)
    assert (last.cached_prompt_tokens, last.retractions) == (2, 1)
    assert not response.goes_on(last)


def test_a_response_whose_routing_was_lost_ends_without_it() -> None:
    response = Continuation(request(), end_tokens=[2])
    lost = result_of(response.add(ended(FinishReason.ABORT, [1, 2], 0, None)))
    assert (lost.reason, lost.routed_experts) == (FinishReason.ABORT, None)
    assert not response.goes_on(lost)
    response = Continuation(request())
    assert response.goes_on(result_of(response.add(ended(FinishReason.ABORT, [1], 0, range(3)))))
    lost = result_of(response.add(ended(FinishReason.ABORT, [2], 0, None)))
    assert (lost.reason, lost.routed_experts) == (FinishReason.ABORT, None)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2], FinishReason.ABORT),
        ([1, 9], FinishReason.STOP),  # a token of the model
        ([1, 8], FinishReason.STOP),  # a token of the request
        ([9, 1], FinishReason.ABORT),
        ([1] * 10, FinishReason.LENGTH),
    ],
)
def test_a_response_that_ended_as_it_was_aborted_has_ended(tokens: list[int], expected: FinishReason) -> None:
    response = Continuation(request(stop_token_ids=(8,)), end_tokens=[9])
    rows = range(len(PROMPT) + len(tokens) - 1)
    assert result_of(response.add(ended(FinishReason.ABORT, tokens, 0, rows))).reason is expected


def test_end_tokens_are_those_of_both_files(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "text_config": {"eos_token_id": None}}))
    assert read_end_tokens(str(tmp_path)) == {2}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert read_end_tokens(str(tmp_path)) == {2, 5}
