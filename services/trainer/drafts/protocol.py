"""What the draft trainer asks of a draft model that learns."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from miles.drafts.recording import RecordedSample
    from miles.weights.publisher import Layout


class Learner(Protocol):
    """A draft model with its optimizer. Called by one thread alone."""

    def learn(self, samples: Sequence[RecordedSample]) -> Iterator[Mapping[str, float]]:
        """Learn from the samples of one training step, one optimizer step at each `next`, which yields its metrics.

        Whoever ends the iteration early leaves the model as it is after the last optimizer step.
        """

    def layout(self) -> Layout:
        """Name, dtype and shape of each tensor that engines load, in the order of `export`."""

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield those tensors."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """Weights, moments and counters of the optimizer by name: all that `load_state` needs."""

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a state. Raises ValueError for one of another model."""

    def move(self, device: torch.device) -> None:
        """Move the weights and the optimizer's state to a device."""

    def save(self, folder: pathlib.Path) -> None:
        """Write the model into a Hugging Face folder, which is made."""
