"""The interface of what proposes drafts to the torch engine.

The engine draws each token of a response from the policy's own distribution by the response's own random numbers, at
all drafted positions of one forward pass, and accepts drafts up to the first that differs from what was drawn. This is
rejection sampling of drafts that are certain of their token: a draft is accepted with the probability that the policy
gives it, and what replaces it is distributed as the policy is without it. So a response is the same, token by token,
with drafts, without, and with wrong ones, and a proposer is free in everything: it can only cost time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from miles.services.rollout.engines.torch.generation.sequence import Sequence as Request


@dataclasses.dataclass(frozen=True, slots=True)
class Computed:
    """Positions of a request that the policy has computed and that stay: accepted drafts, prompts, sampled tokens."""

    request: Request
    start: int
    end: int
    hidden_ND: Mapping[int, torch.Tensor]
    """By layer: the residual stream behind decoder layer i at these positions, [end - start, D]; of the layers that the
    proposer reads alone."""


class Proposer(Protocol):
    """Proposes the next tokens of requests. Called by the worker thread alone, between two forward passes."""

    @property
    def layers(self) -> Sequence[int]:
        """Decoder layers, from 0, whose output it reads; empty when it needs tokens alone."""

    def propose(self, requests: Sequence[Request], steps: int) -> list[list[int]]:
        """For each request, up to `steps` tokens that may follow `request.tokens`; none where it knows none."""

    def note_computed(self, computed: Sequence[Computed]) -> None:
        """Take what a forward pass has computed, before the next `propose`."""

    def note_shared(self, source: Request, target: Request, length: int) -> None:
        """The first `length` positions of `target` were copied from `source` instead of computed."""

    def forget(self, request: Request) -> None:
        """A request has ended, or its cache is gone and all of its positions will be computed again."""
