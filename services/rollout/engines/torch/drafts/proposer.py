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
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from miles.config.speculation import Speculation
    from miles.services.rollout.engines.torch.generation.sequence import Sequence as Request


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """The model that drafts are proposed to, as a proposer is built from it."""

    speculation: Speculation
    config: Any
    """Its Hugging Face configuration."""
    model: torch.nn.Module
    """Its parameters are on the meta device until the first weights come, and others after each load; look them up at
    each use."""
    dtype: torch.dtype
    device: torch.device
    max_running_requests: int
    max_total_tokens: int
    """Prompt, response and drafts of a request at most."""


@dataclasses.dataclass(frozen=True, slots=True)
class Computed:
    """Positions of a request that the policy has computed and that stay: accepted drafts, prompts, sampled tokens."""

    request: Request
    start: int
    end: int
    hidden_ND: Mapping[int, torch.Tensor]
    """By layer: the residual stream behind decoder layer i at these positions, [end - start, D]; of the layers that the
    proposer reads alone."""


class DraftWeights(Protocol):
    """The weights of a draft model, which the draft stream brings; tensors by name of its checkpoint."""

    @property
    def version(self) -> int | None:
        """Version that proposes now; None before the first `load`."""

    def check(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Check names, shapes and dtypes, in any thread; return what `load` takes. Raises WeightsRefused."""

    def load(self, version: int, checked: Mapping[str, torch.Tensor]) -> None:
        """Propose with these weights from now on; called by the worker thread."""

    def served(self) -> Mapping[str, torch.Tensor]:
        """The tensors of the last `load`, as they came; empty before it. Called by the worker thread."""


class Proposer(Protocol):
    """Proposes the next tokens of requests. Called by the worker thread alone, between two forward passes."""

    @property
    def weights(self) -> DraftWeights | None:
        """Its weights; None when it has none."""

    @property
    def layers(self) -> Sequence[int]:
        """Decoder layers, from 0, whose output it reads; empty when it needs tokens alone."""

    def propose(self, requests: Sequence[Request], steps: int) -> list[list[int]]:
        """For each request, up to `steps` tokens that may follow `request.tokens`; none where it knows none."""

    def note_computed(self, computed: Sequence[Computed]) -> None:
        """Take what a forward pass has computed, before the next `propose`; while drafts are turned off, too."""

    def note_shared(self, source: Request, target: Request, length: int) -> None:
        """The first `length` positions of `target` were copied from `source` instead of computed."""

    def forget(self, request: Request) -> None:
        """A request has ended, or its cache is gone and all of its positions will be computed again."""
