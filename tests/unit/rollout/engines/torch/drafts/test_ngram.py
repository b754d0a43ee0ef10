"""Drafts from text: the longest match, the commonest continuation, and what a prompt's requests share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.torch.drafts.ngram import Corpus, NgramProposer
from miles.services.rollout.engines.torch.generation.sequence import Sequence
from miles.services.rollout.engines.torch.generation.stop import StopRule


def request(
    name: str, prompt: list[int], response: tuple[int, ...] = (), earlier: tuple[list[int], ...] = ()
) -> Sequence:
    arrays = tuple(np.array(each, np.int32) for each in earlier)
    asked = GenerationRequest(name, prompt, SamplingParams(max_new_tokens=99), earlier_responses=arrays)
    made = Sequence(asked, StopRule((), None, 0))
    for token in response:
        made.append(token, 0)
    return made


@pytest.mark.parametrize(
    ("text", "tokens", "drafts"),
    [
        ([1, 2, 3, 4, 5, 6], [9, 2, 3], [4, 5, 6]),
        ([1, 2, 3, 4, 5, 6], [9, 9, 3], []),
        ([1, 2, 3, 4, 5, 6], [5, 6], []),
        ([7, 1, 2, 3, 8, 1, 2, 4], [8, 1, 2], [4]),
        ([8, 1, 2, 4, 7, 1, 2, 3], [8, 1, 2], [4, 7, 1]),
        ([1, 2, 5, 0, 1, 2, 6, 0, 1, 2, 6, 0], [1, 2], [6, 0, 1]),
    ],
)
def test_what_followed_the_longest_match_is_drafted(text: list[int], tokens: list[int], drafts: list[int]) -> None:
    corpus = Corpus()
    corpus.add(text)
    assert corpus.continuation(tokens, 3) == drafts


def test_a_response_that_repeats_itself_is_drafted_from_itself() -> None:
    proposer = NgramProposer()
    running = request("r", [1, 2, 3], (4, 5, 6))
    assert proposer.propose([running], 4) == [[]]
    for token in (2, 3, 4):
        running.append(token, 0)
    assert proposer.propose([running], 4) == [[5, 6, 2, 3]]
    running.append(9, 0)
    assert proposer.propose([running], 4) == [[]]
    running.append(4, 0)
    running.append(5, 0)
    assert proposer.propose([running], 2) == [[6, 2]]


def test_earlier_responses_are_drafted_from_the_first_token_on() -> None:
    proposer = NgramProposer()
    first = request("a", [1, 2, 3], earlier=([4, 5, 6, 7],))
    second = request("b", [1, 2, 3], (4, 5), earlier=())
    other = request("c", [1, 2, 4], (4, 5))
    assert proposer.propose([first, second, other], 3) == [[4, 5, 6], [6, 7], []]


def test_running_requests_of_a_prompt_draft_from_one_another() -> None:
    proposer = NgramProposer()
    ahead, behind = request("a", [1, 2, 3], (4, 5, 6, 7)), request("b", [1, 2, 3], (4, 5))
    assert proposer.propose([ahead, behind], 2) == [[], [6, 7]]


def test_texts_go_with_the_last_request_of_their_prompt() -> None:
    proposer = NgramProposer()
    first, second = request("a", [1, 2, 3], (4, 5, 6, 7)), request("b", [1, 2, 3], (4, 5))
    proposer.propose([first, second], 2)
    proposer.forget(first)
    assert proposer.propose([second], 2) == [[6, 7]]
    proposer.forget(second)
    proposer.forget(second)
    assert proposer.propose([second], 2) == [[]]


def test_a_request_whose_cache_was_taken_away_is_indexed_once() -> None:
    proposer = NgramProposer()
    running, other = request("a", [1, 2], (3, 4, 5, 1, 2)), request("b", [1, 2])
    assert proposer.propose([running, other], 3)[0] == [3, 4, 5]
    proposer.forget(running)
    running.append(3, 0)
    assert proposer.propose([running], 2) == [[4, 5]]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=40), min_size=1, max_size=3),
    st.lists(st.integers(0, 3), min_size=2, max_size=20),
)
def test_drafts_continue_a_place_where_the_last_two_tokens_stood(texts: list[list[int]], tokens: list[int]) -> None:
    corpus = Corpus()
    for text in texts:
        corpus.add(text)
    drafts = corpus.continuation(tokens, 4)
    run = [*tokens[-2:], *drafts]
    assert not drafts or any(text[i : i + len(run)] == run for text in texts for i in range(len(text)))
