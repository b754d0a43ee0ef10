"""Drafts of an EAGLE-3 head, which reads what the policy has computed.

The head's row t, at position t of its cache, reads the policy's hidden states at position t and the token behind it.
So it can compute one row less than the policy has, until the next token is known. Behind the last of these rows it goes
on with its own output in place of hidden states.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from miles.config.checks.json_file import read_json_object
from miles.drafts.eagle3 import Eagle3Head
from miles.drafts.folder import module_name, read_tensors
from miles.drafts.recorded_layers import aux_layers
from miles.drafts.vocabulary import read_vocabulary
from miles.services.rollout.engines.torch.drafts.draft_cache import DraftCache, passes
from miles.services.rollout.engines.torch.drafts.module_weights import ModuleWeights
from miles.services.rollout.engines.torch.drafts.proposer import Computed, DraftWeights, Policy
from miles.services.rollout.engines.torch.model.architecture import model_shape
from miles.services.rollout.engines.torch.model.attention import STEP_ARGUMENT, AttentionStep, slot_attention
from miles.services.rollout.engines.torch.model.spans import Span

if TYPE_CHECKING:
    from miles.services.rollout.engines.torch.generation.sequence import Sequence as Request

_EAGER = 256
"""Rows that may wait for drafts to be asked for; more, as of a prompt, are computed when they come."""
_SHARED = ("embed_tokens.weight", "d2t", "t2d")
"""What a head's folder may hold besides its parameters."""


@dataclasses.dataclass(slots=True)
class _State:
    slot: int
    done: int = 0
    """Leading rows in its cache that are of the policy's hidden states."""
    known: int = 0
    """Leading positions whose hidden states have come."""
    base: int = 0
    waiting: list[torch.Tensor] = dataclasses.field(default_factory=list)
    """Fused hidden states [n, D] of positions `base` to `known` - 1: the last done row's, and those of rows to come."""
    prompt_end_1D: torch.Tensor | None = None
    """Those of the prompt's last position, for requests that share the prompt."""
    whole: bool = True
    """Whether none is missing; else there are no drafts."""

    def take(self, start: int, end: int) -> torch.Tensor:
        """Fused hidden states of positions `start` to `end` - 1."""
        return torch.cat(self.waiting)[start - self.base : end - self.base]

    def finish(self, end: int) -> None:
        """The rows before `end` are done; keep what the last of them read."""
        kept = max(end - 1, self.base)
        self.waiting = [torch.cat(self.waiting)[kept - self.base :].clone()]
        self.done, self.base = end, kept


class Eagle3Proposer:
    """Drafts greedily, for all requests in one batch; implements Proposer.

    Args:
        policy: The policy; its speculation names the folder of the head.

    Raises ValueError for a folder that holds no head for this policy.
    """

    def __init__(self, policy: Policy) -> None:
        path = policy.speculation.draft_model_path
        if path is None:
            raise ValueError("drafts of kind eagle3 need a head: set sglang_speculative_draft_model_path")
        shape = model_shape(policy.config)
        config, stored = read_json_object(pathlib.Path(path) / "config.json"), read_tensors(pathlib.Path(path))
        self._policy = policy
        self._head = Eagle3Head(config, policy.dtype).requires_grad_(False).eval()
        self._head.rotary.to(policy.device)
        self.layers: Sequence[int] = aux_layers(path, shape.layers)
        """Decoder layers, from 0, whose output it reads."""
        if self._head.fc.in_features != len(self.layers) * shape.hidden_size:
            raise ValueError(
                f"the EAGLE-3 head {path} reads {self._head.fc.in_features} numbers at a position; {len(self.layers)} "
                f"layers of the policy are {len(self.layers) * shape.hidden_size}"
            )
        self._weights = ModuleWeights(
            self._head, stored, policy.device, policy.dtype, module_name, lambda name: name.endswith(_SHARED)
        )
        vocabulary = read_vocabulary(stored, self._head.lm_head.out_features, shape.vocabulary)
        self._vocabulary = vocabulary.to(policy.device)
        self._cache = DraftCache(
            model_shape(self._head.config),
            max_slots=policy.max_running_requests,
            max_length=policy.max_total_tokens + policy.speculation.num_steps,
            dtype=policy.dtype,
            device=policy.device,
        )
        self._states: dict[int, _State] = {}
        """By id of a request."""

    @property
    def weights(self) -> DraftWeights:
        """Its weights."""
        return self._weights

    def propose(self, requests: Sequence[Request], steps: int) -> list[list[int]]:
        """For each request `steps` tokens: the likeliest, each behind the one before."""
        drafts: list[list[int]] = [[] for _ in requests]
        ready = [i for i, request in enumerate(requests) if self._is_ready(request)]
        if not ready:
            return drafts
        states = [self._state(requests[i]) for i in ready]
        for state in states:
            state.done = min(state.done, state.known - 1)  # the last row once more, where nothing was added
        hidden_ND = self._advance([requests[i] for i in ready])
        columns = [self._likeliest(hidden_ND)]
        for step in range(steps - 1):
            spans = [Span(state.slot, state.done + step, state.done + step + 1) for state in states]
            hidden_ND = self._forward(hidden_ND, columns[-1], self._cache.step(spans))
            columns.append(self._likeliest(hidden_ND))
        for i, own in zip(ready, torch.stack(columns, dim=1).tolist(), strict=True):
            drafts[i] = own
        return drafts

    def note_computed(self, computed: Sequence[Computed]) -> None:
        """Keep what the head reads of the policy's hidden states, fused."""
        if not computed:
            return
        read_NF = torch.cat([torch.cat([each.hidden_ND[i] for i in self.layers], dim=-1) for each in computed])
        fused: Any = torch.split(self._head.fc(read_NF), [each.end - each.start for each in computed])
        for each, features_ND in zip(computed, fused, strict=True):
            state = self._state(each.request)
            state.whole &= each.start == state.known
            state.waiting.append(features_ND)
            state.known = each.end
            last = each.request.prompt_length - 1 - each.start
            if 0 <= last < len(features_ND):
                state.prompt_end_1D = features_ND[last : last + 1].clone()
        if many := [each.request for each in computed if self._computable(each.request) >= _EAGER]:
            self._advance(many)

    def note_shared(self, source: Request, target: Request, length: int) -> None:
        """Compute a prefix once for the requests that share it.

        Its last row can be shared where the token behind it is the same. Else the target computes it from the policy's
        hidden states there, which are kept of the prompt's last position.
        """
        state, own = self._state(source), self._state(target)
        if self._computable(source):
            self._advance([source])
        same = source.tokens[length : length + 1] == target.tokens[length : length + 1]
        done = length if same and length < len(target.tokens) else length - 1
        if done < length and length == source.prompt_length and state.prompt_end_1D is not None:
            own.waiting = [state.prompt_end_1D]
        own.whole = state.whole and state.done >= done and (done == length or bool(own.waiting))
        own.done, own.base, own.known = done, done, length
        own.prompt_end_1D = state.prompt_end_1D
        if own.whole and done:
            self._cache.copy(state.slot, own.slot, done)

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

    def _is_ready(self, request: Request) -> bool:
        state = self._state(request)
        return state.whole and 0 < state.known == len(request.tokens) - 1 and state.base < state.known

    def _computable(self, request: Request) -> int:
        """Rows that wait, and whose token behind is known."""
        state = self._state(request)
        return min(state.known, len(request.tokens) - 1) - state.done if state.whole else 0

    def _advance(self, requests: Sequence[Request]) -> torch.Tensor:
        """Compute all computable rows of each request, of which there are some; return the last one's output [N, D]."""
        by_slot = {self._state(request).slot: request for request in requests}
        spans = []
        for slot, request in by_slot.items():
            state = self._state(request)
            spans.append(Span(slot, state.done, state.done + self._computable(request)))
        streams: dict[int, torch.Tensor] = {}
        for part in passes(spans):
            owners = [by_slot[span.slot] for span in part]
            read = [self._state(owner).take(span.start, span.end) for owner, span in zip(owners, part, strict=True)]
            tokens = [owner.tokens[span.start + 1 : span.end + 1] for owner, span in zip(owners, part, strict=True)]
            tokens_N = self._cache.tensor([token for own in tokens for token in own])
            stream_ND = self._forward(torch.cat(read), tokens_N, self._cache.step(part))
            ends = list(itertools.accumulate(span.rows for span in part))
            streams |= {span.slot: stream_ND[end - 1] for span, end in zip(part, ends, strict=True)}
        for span in spans:
            self._state(by_slot[span.slot]).finish(span.end)
        return torch.stack([streams[slot] for slot in by_slot])

    def _forward(self, hidden_ND: torch.Tensor, tokens_N: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """The head's output [N, D] for rows that read these hidden states and tokens of the policy's."""
        model: Any = self._policy.model
        table_VD = (
            model.get_input_embeddings().weight
        )  # itself: some models scale what they look up, and SGLang does not
        embeds_ND = torch.nn.functional.embedding(tokens_N, table_VD)

        def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
            module: Any = self._head.layers[layer]
            step_of_layers: Any = {STEP_ARGUMENT: step}
            return slot_attention(module.self_attn, query, key, value, None, **step_of_layers)[0][0]

        output_ND: torch.Tensor = self._head(hidden_ND, embeds_ND, step.positions_N, attend)
        return output_ND

    def _likeliest(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The policy's tokens that the head finds likeliest behind rows, int64 [N]."""
        return self._vocabulary.policy_ids(self._head.logits(hidden_ND).argmax(-1))
