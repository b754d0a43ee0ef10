"""Drafts of a small language model that has the policy's tokens."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from miles.drafts.folder import read_tensors
from miles.services.rollout.engines.torch.drafts.draft_cache import DraftCache, passes
from miles.services.rollout.engines.torch.drafts.module_weights import ModuleWeights
from miles.services.rollout.engines.torch.drafts.proposer import Computed, DraftWeights, Policy
from miles.services.rollout.engines.torch.model.architecture import model_shape, read_config
from miles.services.rollout.engines.torch.model.attention import STEP_ARGUMENT
from miles.services.rollout.engines.torch.model.empty_model import build_empty_model
from miles.services.rollout.engines.torch.model.spans import Span

if TYPE_CHECKING:
    from miles.services.rollout.engines.torch.generation.sequence import Sequence as Request


@dataclasses.dataclass(slots=True)
class _State:
    slot: int
    done: int = 0
    """Leading positions in its cache that are those of the request's tokens."""
    drafted: list[int] = dataclasses.field(default_factory=list)
    """What else is in its cache behind them: drafts, of which the policy may have accepted some."""


class StandaloneProposer:
    """Drafts greedily, for all requests in one batch; implements Proposer.

    Args:
        policy: The policy; its speculation names the folder of the draft model.

    Raises UnsupportedModel for an architecture that the engine cannot run, and ValueError for a draft with fewer
    tokens than the policy, or with other weights than its configuration says.
    """

    layers: Sequence[int] = ()

    def __init__(self, policy: Policy) -> None:
        path = policy.speculation.draft_model_path
        if path is None:
            raise ValueError("drafts of kind standalone need a model: set sglang_speculative_draft_model_path")
        config = read_config(path, policy.max_total_tokens)
        shape, tokens = model_shape(config), model_shape(policy.config).vocabulary
        if shape.vocabulary < tokens:
            raise ValueError(f"the draft model {path} has {shape.vocabulary} tokens, and the policy {tokens}")
        self._tokens = tokens
        self._model = build_empty_model(config, policy.dtype, policy.device)
        stored = read_tensors(pathlib.Path(path))
        self._weights = ModuleWeights(self._model, stored, policy.device, policy.dtype)
        length = policy.max_total_tokens + policy.speculation.num_steps
        self._cache = DraftCache(
            shape, max_slots=policy.max_running_requests, max_length=length, dtype=policy.dtype, device=policy.device
        )
        self._states: dict[int, _State] = {}
        """By id of a request."""

    @property
    def weights(self) -> DraftWeights:
        """Its weights."""
        return self._weights

    def propose(self, requests: Sequence[Request], steps: int) -> list[list[int]]:
        """For each request `steps` tokens: the likeliest, each behind the one before."""
        states = [self._state(request) for request in requests]
        for request, state in zip(requests, states, strict=True):
            _keep_accepted(state, request.tokens)
        drafts_N = self._catch_up(requests, states)
        drafts = [drafts_N]
        for step in range(steps - 1):
            spans = [
                Span(state.slot, len(request.tokens) + step, len(request.tokens) + step + 1)
                for request, state in zip(requests, states, strict=True)
            ]
            drafts_N = self._forward(drafts_N, spans, self._cache.tensor(range(len(spans))))
            drafts.append(drafts_N)
        proposed: list[list[int]] = torch.stack(drafts, dim=1).tolist()
        for state, own in zip(states, proposed, strict=True):
            state.drafted = own[:-1]
        return proposed

    def note_computed(self, computed: Sequence[Computed]) -> None:
        """Nothing: it reads tokens when drafts are asked for."""

    def note_shared(self, source: Request, target: Request, length: int) -> None:
        """Compute a prefix once for the requests that share it."""
        state = self._state(source)
        if state.done < length:
            self._compute([source], [Span(state.slot, state.done, length)])
            state.done, state.drafted = length, []
        own = self._state(target)
        self._cache.copy(state.slot, own.slot, length)
        own.done, own.drafted = length, []

    def forget(self, request: Request) -> None:
        """Free the request's slot."""
        state = self._states.pop(id(request), None)
        if state is not None:
            self._cache.free_slot(state.slot)

    def _state(self, request: Request) -> _State:
        state = self._states.get(id(request))
        if state is None:
            state = self._states[id(request)] = _State(self._cache.take_slot())
        return state

    def _catch_up(self, requests: Sequence[Request], states: Sequence[_State]) -> torch.Tensor:
        """Compute what the draft has not seen of each request; return the likeliest token behind each, [N]."""
        spans = []
        for request, state in zip(requests, states, strict=True):
            start, state.done = min(state.done, len(request.tokens) - 1), len(request.tokens)
            spans.append(Span(state.slot, start, len(request.tokens)))
        return self._compute(requests, spans)

    def _compute(self, requests: Sequence[Request], spans: Sequence[Span]) -> torch.Tensor:
        """Compute spans of requests; return the likeliest token behind each, int64 [N]."""
        by_slot = {span.slot: request for span, request in zip(spans, requests, strict=True)}
        drafts: dict[int, torch.Tensor] = {}
        for part in passes(spans):
            tokens = [token for span in part for token in by_slot[span.slot].tokens[span.start : span.end]]
            found_N = self._forward(self._cache.tensor(tokens), part, _last_rows(part, self._cache))
            drafts |= {span.slot: draft for span, draft in zip(part, found_N, strict=True)}
        return torch.stack([drafts[span.slot] for span in spans])

    def _forward(self, tokens_N: torch.Tensor, spans: Sequence[Span], rows: torch.Tensor) -> torch.Tensor:
        """The likeliest tokens, int64, behind some rows of a forward pass over spans."""
        step = self._cache.step(spans)
        output = self._model(
            input_ids=tokens_N[None],
            position_ids=step.positions_N[None],
            use_cache=False,
            logits_to_keep=rows,
            **{STEP_ARGUMENT: step},
        )
        likeliest: torch.Tensor = output.logits[0, :, : self._tokens].argmax(-1)
        return likeliest


def _keep_accepted(state: _State, tokens: Sequence[int]) -> None:
    """Count drafts in the cache that the response has as well; the last token's row is always computed again."""
    for draft in state.drafted:
        if state.done >= len(tokens) - 1 or tokens[state.done] != draft:
            break
        state.done += 1
    state.drafted = []


def _last_rows(spans: Iterable[Span], cache: DraftCache) -> torch.Tensor:
    ends, end = [], 0
    for span in spans:
        end += span.rows
        ends.append(end - 1)
    return cache.tensor(ends)
