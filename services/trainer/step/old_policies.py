"""The versions of the policy that generated the samples, kept while samples of them may come.

A sample of the version that the policy has is not counted here: the policy itself says what it said then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from miles.services.trainer.step.weight_copy import CopiedRole, WeightCopy, Weights

if TYPE_CHECKING:
    from miles.services.trainer.batch.rollout_batch import RolloutBatch
    from miles.services.trainer.step.progress import Report
    from miles.services.trainer.step.roles import Role


class OldActors:
    """Copies by version, of those that were published and are at most `staleness` versions old."""

    def __init__(
        self, weights: Weights, evaluate: Callable[[RolloutBatch, Report], torch.Tensor], staleness: int
    ) -> None:
        """`weights` are the policy's, and `evaluate` asks its model, whatever its weights are."""
        self._weights = weights
        self._evaluate = evaluate
        self._staleness = staleness
        self._published = True  # what is loaded goes to the engines before anything else happens
        self.copies: dict[int, WeightCopy] = {}

    def publish(self) -> None:
        """Note that engines get the policy as it is."""
        self._published = True

    def keep(self, version: int) -> None:
        """Call before the policy, which is of this version, learns from a rollout: copy it, and drop what is too old.

        The next rollout's samples are at most `staleness` versions older than version + 1.
        """
        old = [each for each in self.copies if each < version + 1 - self._staleness]
        dropped = [self.copies.pop(each) for each in old]
        if self._published and self._staleness > 0:
            copy = dropped.pop() if dropped else None
            if copy is None:
                copy = WeightCopy(self._weights)
            else:
                copy.take()  # in memory that is there
            self.copies[version] = copy
        self._published = False

    def make_room(self, versions: Iterable[int]) -> None:
        """Have a copy for each of these versions and no others, to be filled from a checkpoint."""
        self.copies = {version: WeightCopy(self._weights) for version in versions}

    def evaluate(self, version: int, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """As `Role.evaluate`, of a version that is among the copies."""
        return CopiedRole(self.copies[version], self._evaluate).evaluate(batch, report)

    def log_probs(
        self, number: int, batch: RolloutBatch, policy: Role, engine_T: torch.Tensor | None, report: Report
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [T] of the versions that generated the tokens, and 1 where an old actor gave them [T].

        The policy is of version `number`. Versions that are not kept, e.g. because a run was resumed without them, are
        known from the engine (`engine_T`). Every version that occurs costs a pass over the batch.
        """
        versions_T = batch.token_versions(number)
        log_probs_T = torch.zeros(len(versions_T))
        kept_T = torch.zeros(len(versions_T))
        for version in batch.versions(number):
            here_T = versions_T == version
            if version in self.copies:
                given_T = self.evaluate(version, batch, report)
                kept_T += here_T
            elif version == number or engine_T is None:
                given_T = policy.evaluate(batch, report)
            else:
                given_T = engine_T
            log_probs_T = torch.where(here_T.to(given_T.device), given_T, log_probs_T.to(given_T.device))
        return log_probs_T, kept_T.to(log_probs_T.device)
