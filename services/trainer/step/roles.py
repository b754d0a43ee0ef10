"""The models of a run and what a training step asks of each. They give one number per response token.

| role | gives | trained |
|---|---|---|
| policy | log-probabilities | yes |
| critic | values | yes |
| reference, teacher, old policies | log-probabilities | no |

Dims: T response tokens of this rank's samples.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from miles.algorithms.losses import LossOutput
from miles.algorithms.metrics import MetricSum
from miles.algorithms.token_sets import TokenSetScores
from miles.algorithms.vocab_rows import TokenLogProbs
from miles.services.trainer.batch.packing import MicroBatch
from miles.services.trainer.batch.rollout_batch import OptimizerStepPlan, RolloutBatch
from miles.services.trainer.recording.recorder import Recorder
from miles.services.trainer.step.finite_gradient import StepOutcome
from miles.services.trainer.step.old_policies import OldPolicies
from miles.services.trainer.step.progress import Report
from miles.services.trainer.step.token_sets import TokenSetRequest

if TYPE_CHECKING:
    import torch

OutputT = TypeVar("OutputT")
"""What a learner's forward pass gives for a micro-batch's R response tokens."""


class LogProbRole(Protocol):
    """Weights that give log-probabilities. Every rank makes the same calls."""

    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """Log-probabilities of this rank's response tokens, without gradient; float32 [T]."""


class TokenSetRole(LogProbRole, Protocol):
    """A role that also scores other tokens than those sampled."""

    def score_token_sets(self, batch: RolloutBatch, request: TokenSetRequest, report: Report) -> TokenSetScores:
        """Log-probabilities of several tokens at the position of each response token, without gradient."""


class Reference(LogProbRole, Protocol):
    """A role that can be set to the policy's current weights."""

    def follow(self) -> None:
        """Take the policy's weights."""


class Learner(abc.ABC, Generic[OutputT]):
    """A model with an optimizer. Every rank makes the same calls."""

    def __init__(self) -> None:
        self.iteration = 0
        """Optimizer steps taken."""

    @abc.abstractmethod
    def accumulate(
        self,
        batch: RolloutBatch,
        step: OptimizerStepPlan,
        loss: Callable[[MicroBatch, OutputT], LossOutput],
        report: Callable[[int], None],
    ) -> list[dict[str, MetricSum]]:
        """Add up the gradients of a step's micro-batches; returns their parts of the metrics.

        `loss` gives a micro-batch's share of the step's loss; `report` gets the number of micro-batches done.
        """

    @abc.abstractmethod
    def step(self) -> StepOutcome:
        """Clip, step and clear the gradients; one that is not finite leaves everything but the count as it was."""

    @abc.abstractmethod
    def discard_gradients(self) -> None:
        """Discard accumulated gradients and everything else that `accumulate` has kept."""

    @abc.abstractmethod
    def reset_optimizer(self) -> None:
        """Set the optimizer's moments and its count of steps to 0; the learning rate's schedule goes on."""

    def sync_weights(self) -> None:
        """Complete weight updates; call after a rollout's last step, before weights are read, copied or replaced."""

    @property
    @abc.abstractmethod
    def learning_rate(self) -> float:
        """Of the last optimizer step."""


class PolicyLearner(Learner[TokenLogProbs]):
    """The policy."""

    @abc.abstractmethod
    def record(self, recorder: Recorder) -> None:
        """Have training passes give the recorder what it wants. Raises ValueError for layers that are not there."""

    @abc.abstractmethod
    def compute_log_probs(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """See `LogProbRole.compute_log_probs`."""

    @abc.abstractmethod
    def compute_log_probs_and_squares(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """The same and, from the same pass, the sum of squared probabilities of all tokens there; float32 [T, 2]."""

    @abc.abstractmethod
    def score_token_sets(self, batch: RolloutBatch, request: TokenSetRequest, report: Report) -> TokenSetScores:
        """See `TokenSetRole.score_token_sets`."""


class CriticLearner(Learner["torch.Tensor"]):
    """The critic; its forward pass gives values, float32 [R]."""

    @abc.abstractmethod
    def compute_values(self, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """Values of this rank's response tokens, without gradient; float32 [T]."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """The models of one run; None for those that its configuration does not ask for. Backends narrow the types."""

    policy: PolicyLearner
    critic: CriticLearner | None = None
    reference: Reference | None = None
    teacher: TokenSetRole | None = None
    old_policies: OldPolicies | None = None
