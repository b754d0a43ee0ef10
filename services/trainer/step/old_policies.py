"""Copies of earlier policies: the versions that generated the samples, kept while samples of them may arrive.

The current version has no copy: the policy itself gives its log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from miles.services.trainer.step.weight_copy import ComputeLogProbs, CopiedRole, WeightCopy, Weights

if TYPE_CHECKING:
    from miles.services.trainer.batch.rollout_batch import RolloutBatch
    from miles.services.trainer.step.progress import Report
    from miles.services.trainer.step.roles import LogProbRole


class OldPolicies:
    """Copies by version, of those that were published and are at most `staleness` versions old."""

    def __init__(self, weights: Weights, compute_log_probs: ComputeLogProbs, staleness: int) -> None:
        """`weights` are the policy's, and `compute_log_probs` runs its model with whatever weights it has."""
        self._weights = weights
        self._compute_log_probs = compute_log_probs
        self._staleness = staleness
        self._published = True  # what is loaded goes to the engines before anything else happens
        self.copies: dict[int, WeightCopy] = {}

    def publish(self) -> None:
        """Note that engines get the current policy."""
        self._published = True

    def keep(self, version: int) -> None:
        """Copy the policy, which is of this version, before a rollout trains it, and discard copies that are too old.

        The next rollout's samples are at most `staleness` versions older than version + 1.
        """
        old = [each for each in self.copies if each < version + 1 - self._staleness]
        discarded = [self.copies.pop(each) for each in old]
        if self._published and self._staleness > 0:
            copy = discarded.pop() if discarded else None
            if copy is None:
                copy = WeightCopy(self._weights)
            else:
                copy.take()  # reuses its memory
            self.copies[version] = copy
        self._published = False

    def make_room(self, versions: Iterable[int]) -> None:
        """Have a copy for each of these versions and no others, to be filled from a checkpoint."""
        self.copies = {version: WeightCopy(self._weights) for version in versions}

    def compute_log_probs(self, version: int, batch: RolloutBatch, report: Report) -> torch.Tensor:
        """As `LogProbRole.compute_log_probs`, of a version that has a copy."""
        return CopiedRole(self.copies[version], self._compute_log_probs).compute_log_probs(batch, report)

    def log_probs_by_version(
        self, number: int, batch: RolloutBatch, policy: LogProbRole, engine_T: torch.Tensor | None, report: Report
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [T] of the versions that generated the tokens, and 1 where a copy gave them [T].

        The policy is of version `number`. Without a copy of a version, e.g. after a run was resumed without it, the
        engine's log-probabilities (`engine_T`) are used. Every version that occurs costs a pass over the batch.
        """
        versions_T = batch.token_versions(number)
        log_probs_T = torch.zeros(len(versions_T))
        kept_T = torch.zeros(len(versions_T))
        for version in batch.versions(number):
            here_T = versions_T == version
            if version in self.copies:
                given_T = self.compute_log_probs(version, batch, report)
                kept_T += here_T
            elif version == number or engine_T is None:
                given_T = policy.compute_log_probs(batch, report)
            else:
                given_T = engine_T
            log_probs_T = torch.where(here_T.to(given_T.device), given_T, log_probs_T.to(given_T.device))
        return log_probs_T, kept_T.to(log_probs_T.device)
