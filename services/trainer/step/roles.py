"""The models of a run. Each says one number of every response token; two of them learn from what comes of it.

| role | says | learns |
|---|---|---|
| policy | log-probabilities | yes |
| critic | values | yes |
| reference, teacher, old actors | log-probabilities | no |

Dims: T response tokens of this rank's samples.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from miles.algorithms.losses import LossOutput
from miles.algorithms.metrics import MetricSum
from miles.algorithms.vocab_rows import TokenLogProbs
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch
from miles.services.trainer.step.old_policies import OldActors
from miles.services.trainer.step.progress import Report

if TYPE_CHECKING:
    import torch

OutputT = TypeVar("OutputT")
"""What a learner gives for a micro-batch's R response tokens."""


class Role(Protocol):
    """Weights that say something of tokens. Every rank makes the same calls."""

    def evaluate(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """What they say of this rank's response tokens, without gradient; float32 [T]."""


class Learner(abc.ABC, Generic[OutputT]):
    """A role with an optimizer. Every rank makes the same calls."""

    def __init__(self) -> None:
        self.iteration = 0
        """Optimizer steps taken."""

    @abc.abstractmethod
    def evaluate(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """As `Role.evaluate`."""

    @abc.abstractmethod
    def accumulate(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        report: Callable[[int], None],
    ) -> list[dict[str, MetricSum]]:
        """Add up the gradients of a step's micro-batches; returns their parts of the metrics.

        `loss` gives a micro-batch's share of the step's loss, `report` is told how many micro-batches are done.
        """

    @abc.abstractmethod
    def step(self) -> float:
        """Clip, step and clear the gradients; returns their norm before clipping."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Forget gradients that were added up, and all else that `accumulate` left behind."""

    def settle(self) -> None:
        """Call after a rollout's last step, before the weights are read, copied or replaced."""

    @property
    @abc.abstractmethod
    def learning_rate(self) -> float:
        """Of the last optimizer step."""


class Reference(Role, Protocol):
    """A role that becomes the policy as it is when asked to."""

    def follow(self) -> None:
        """Take the policy's weights."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """The models of one run; None for those that its configuration does not ask for. Backends narrow the types."""

    policy: Learner[TokenLogProbs]
    critic: Learner[torch.Tensor] | None = None
    """Gives values, float32 [R]."""
    reference: Reference | None = None
    teacher: Role | None = None
    old_actors: OldActors | None = None
