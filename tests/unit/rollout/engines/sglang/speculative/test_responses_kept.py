from __future__ import annotations

import numpy as np
import numpy.typing as npt

from miles.services.rollout.engines.sglang.speculative.responses_kept import PROMPT_TOKENS, ResponsesKept


def response(*tokens: int) -> npt.NDArray[np.int32]:
    return np.asarray(tokens, np.int32)


def documents(kept: ResponsesKept) -> list[list[int]]:
    return [document.tolist() for document in kept.documents()]


def test_the_newest_response_of_the_newest_prompt_is_last() -> None:
    kept = ResponsesKept(1000)
    assert kept.offer("g0", [1, 2], [response(12), response(11)])
    assert kept.offer("g1", [3], [response(22, 23)])
    assert documents(kept) == [[1, 2, 11], [1, 2, 12], [3, 22, 23]]
    assert kept.tokens == sum(len(document) + 1 for document in documents(kept))


def test_only_the_end_of_a_long_prompt_is_kept() -> None:
    kept = ResponsesKept(1000)
    prompt = list(range(100, 100 + 2 * PROMPT_TOKENS))
    kept.offer("g", prompt, [response(1)])
    assert documents(kept) == [[*prompt[-PROMPT_TOKENS:], 1]]


def test_a_prompts_responses_are_replaced_and_the_rest_of_a_group_changes_nothing() -> None:
    kept = ResponsesKept(1000)
    same = [response(12), response(11)]
    assert kept.offer("g0", [1, 2], same)
    assert not kept.offer("g0", [1, 2], same)
    assert not kept.offer("g5", [1, 2], [response(12), response(11)]), "the same tokens need no new corpus"
    assert not kept.offer("g6", [1, 2], [])
    assert kept.offer("g7", [1, 2], [response(13), response(12)])
    assert documents(kept) == [[1, 2, 12], [1, 2, 13]]


def test_the_prompts_that_came_first_are_forgotten_first() -> None:
    kept = ResponsesKept(9)
    for prompt in (1, 2, 3, 2, 4):
        kept.offer(f"g{prompt}", [prompt], [response(9)])
    assert documents(kept) == [[3, 9], [2, 9], [4, 9]]
    kept.offer("large", [5], [response(*range(20))])
    assert documents(kept) == []
    assert kept.tokens == 0
