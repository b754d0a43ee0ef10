"""Drafts without a model: what followed the same tokens before, in the response so far and in others to its prompt."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.services.rollout.engines.torch.drafts.proposer import Computed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from miles.services.rollout.engines.torch.generation.sequence import Sequence as Request

SIZES = (8, 4, 2)
"""Tokens at the end of a response that are looked up, the most first."""
_KEPT = 16
"""Newest places that are kept of each run of tokens."""
_LONGEST = 48
"""Matching tokens beyond which one place is as good as another."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    text: list[int]
    position: int
    """Of the token behind the run."""


class Corpus:
    """The texts that belong to one prompt, indexed by every run of `SIZES` tokens."""

    def __init__(self) -> None:
        self.requests: set[int] = set()
        """Ids of the requests that use it."""
        self._places: dict[tuple[int, ...], list[_Place]] = {}
        self._texts: dict[int, tuple[list[int], int]] = {}
        """By id of each: the text, and how many of its tokens are indexed."""
        self._earlier: dict[int, npt.NDArray[np.int32]] = {}

    def add(self, text: list[int], start: int = 0) -> None:
        """Index a text from `start` on, or what was appended to it since it was added last."""
        _, known = self._texts.get(id(text), (text, start))
        for position in range(known, len(text)):
            place = _Place(text, position)
            for size in SIZES:
                if size <= position:
                    places = self._places.setdefault(tuple(text[position - size : position]), [])
                    places.append(place)
                    if len(places) > _KEPT:
                        del places[0]
        self._texts[id(text)] = (text, len(text))

    def add_earlier(self, responses: Sequence[npt.NDArray[np.int32]], prompt: Sequence[int]) -> None:
        """Index earlier responses, newest first, that are not yet there; the last of the prompt leads to each."""
        tail = list(prompt[-max(SIZES) :])
        for response in reversed(responses):  # what is indexed last counts most
            if id(response) not in self._earlier:
                self._earlier[id(response)] = response
                self.add([*tail, *response.tolist()], len(tail))

    def continuation(self, tokens: Sequence[int], steps: int) -> list[int]:
        """Up to `steps` tokens that followed the longest run that ends `tokens`; the commonest where there are several.

        Drafts end where the places that they come from do.
        """
        for size in SIZES:
            places = self._places.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if places:
                return _most_common(_best(places, tokens), steps)
        return []


class NgramProposer:
    """Drafts from earlier responses that requests bring along, from running ones of the same prompt, and from
    themselves; implements Proposer.

    Requests of the same prompt share a corpus, which lives as long as one of them is there.
    """

    weights = None
    layers: Sequence[int] = ()

    def __init__(self) -> None:
        self._corpora: dict[bytes, Corpus] = {}
        """By prompt."""

    def propose(self, requests: Sequence[Request], steps: int) -> list[list[int]]:
        """For each request, up to `steps` tokens; none where its last two tokens are new."""
        corpora = [self._corpus(request) for request in requests]
        return [corpus.continuation(request.tokens, steps) for corpus, request in zip(corpora, requests, strict=True)]

    def note_computed(self, computed: Sequence[Computed]) -> None:
        """Nothing: texts are read when drafts are asked for."""

    def note_shared(self, source: Request, target: Request, length: int) -> None:
        """Nothing: it has no cache of the policy's positions."""

    def forget(self, request: Request) -> None:
        """Drop the request; its text serves others of its prompt while there are any."""
        prompt, _ = request.prompt_key
        corpus = self._corpora.get(prompt)
        if corpus is not None:
            corpus.requests.discard(id(request))
            if not corpus.requests:
                del self._corpora[prompt]

    def _corpus(self, request: Request) -> Corpus:
        prompt, _ = request.prompt_key
        corpus = self._corpora.setdefault(prompt, Corpus())
        first = not corpus.requests
        if id(request) not in corpus.requests:
            corpus.requests.add(id(request))
            corpus.add_earlier(request.request.earlier_responses, request.tokens[: request.prompt_length])
        corpus.add(request.tokens, 0 if first else request.prompt_length)
        return corpus


def _best(places: Sequence[_Place], tokens: Sequence[int]) -> list[_Place]:
    """The places behind the longest of the runs that end `tokens`, the newest first."""
    lengths = [_matching(place, tokens) for place in places]
    longest = max(lengths)
    return [place for place, length in zip(places, lengths, strict=True) if length == longest][::-1]


def _matching(place: _Place, tokens: Sequence[int]) -> int:
    text, position = place.text, place.position
    most = min(position, len(tokens), _LONGEST)
    return next((i for i in range(most) if text[position - 1 - i] != tokens[-1 - i]), most)


def _most_common(places: Sequence[_Place], steps: int) -> list[int]:
    drafts: list[int] = []
    for i in range(steps):
        places = [place for place in places if place.position + i < len(place.text)]
        if not places:
            break
        followers = [place.text[place.position + i] for place in places]
        token = Counter(followers).most_common(1)[0][0]
        drafts.append(token)
        places = [place for place, follower in zip(places, followers, strict=True) if follower == token]
    return drafts
