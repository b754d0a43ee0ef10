"""The interface of a kind of draft model that is trained, and what a pass over samples finds."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from miles.drafts.recording import RecordedSample


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass found, with the weights that it had before it was learnt from.

    What the device computes is left there, 0-d float32: reading it would wait for the pass.
    """

    loss: torch.Tensor
    """Mean over the predicted tokens, in nats; over unrolled steps the weighted one."""
    tokens: int
    """Predicted tokens; of an unrolled pass those of its first step."""
    agreed: torch.Tensor
    """Of these, those of which the draft's likeliest token is the policy's likeliest."""
    chains: torch.Tensor
    """Tokens of the verifications that would begin at each of `roots`, in all."""
    roots: int


class Trainable(Protocol):
    """A draft model with its weights in float32."""

    @property
    def module(self) -> torch.nn.Module:
        """What is trained: all of its parameters."""

    def usable(self, sample: RecordedSample) -> bool:
        """Whether it can learn from a sample at all."""

    def learn_from(self, samples: Sequence[RecordedSample]) -> PassResult:
        """Add the gradients of the mean loss over usable samples to the parameters'."""

    def published_name(self, parameter: str) -> str:
        """The name under which engines take a parameter of the module."""

    def save(self, folder: pathlib.Path, dtype: torch.dtype) -> None:
        """Write it as a folder that an engine can start from, in place of one that is there."""
