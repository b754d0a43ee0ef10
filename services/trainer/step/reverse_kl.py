"""The divergence from the teacher over sets of tokens, with models of the trainer or with what servers have scored.

Dims: T response tokens of this rank's samples, K likeliest tokens, M places of a set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from miles.algorithms.device_copies import to_device
from miles.algorithms.distillation import top_k_reverse_kl
from miles.algorithms.token_sets import TokenSetScores
from miles.distillation.token_choice import NO_TOKEN, STUDENTS, TEACHERS, UNWEIGHED, choose_tokens, pick
from miles.services.trainer.step.token_sets import TokenSetRequest

if TYPE_CHECKING:
    from miles.config.sections.distillation import DistillationConfig
    from miles.services.trainer.batch.rollout_batch import RolloutBatch
    from miles.services.trainer.step.progress import Report
    from miles.services.trainer.step.roles import TokenSetRole

Ids = npt.NDArray[np.int32]
LogProbs = npt.NDArray[np.float32]


class TokenSetDistillation:
    """Computes the divergence of every response token; every rank makes the same calls."""

    def __init__(self, config: DistillationConfig, device: torch.device) -> None:
        self._config = config
        self._device = device

    def reverse_kl(
        self, batch: RolloutBatch, student: TokenSetRole, teacher: TokenSetRole | None, report: Report
    ) -> torch.Tensor:
        """D [T] of `top_k_reverse_kl`; float32 on the device. Without a `teacher`, samples have what servers scored.

        Raises ValueError when a sample lacks that.
        """
        if teacher is None:
            ids_TM, teacher_TM = batch.teacher_sets()
            student_TM = self._score(student, batch, ids_TM, report)
        else:
            ids_TM, student_TM, teacher_TM = self._with_teacher(batch, student, teacher, report)
        return top_k_reverse_kl(
            to_device(torch.from_numpy(student_TM), self._device),
            to_device(torch.from_numpy(teacher_TM), self._device),
            to_device(torch.from_numpy(ids_TM != NO_TOKEN), self._device),
            self._config.opd_reward_weight_mode,
            normalize=self._config.opd_top_k_strategy not in UNWEIGHED,
        )

    def _with_teacher(
        self, batch: RolloutBatch, student: TokenSetRole, teacher: TokenSetRole, report: Report
    ) -> tuple[Ids, LogProbs, LogProbs]:
        """The sets, and their log-probs under both: two passes, or three where a set has tokens of both."""
        strategy, top_k = self._config.opd_top_k_strategy, self._config.opd_log_prob_top_k
        own = others = None
        if strategy in STUDENTS:
            own = student.score_token_sets(batch, TokenSetRequest(top_k), report)
        if strategy in TEACHERS:
            given = own.top_ids_TK if own is not None else None
            others = teacher.score_token_sets(batch, TokenSetRequest(top_k, given), report)
        own_ids, others_ids = (None if each is None else _ids(each) for each in (own, others))
        ids_TM = choose_tokens(strategy, own_ids, others_ids)
        if others is None:
            teacher_TM = self._score(teacher, batch, ids_TM, report)
        else:
            teacher_TM = _known(ids_TM, own_ids, others.log_probs_TM, others)
        if own is None or strategy in ("union", "xor"):
            student_TM = self._score(student, batch, ids_TM, report)
        else:
            student_TM = _known(ids_TM, None, None, own)
        return ids_TM, student_TM, teacher_TM

    def _score(self, role: TokenSetRole, batch: RolloutBatch, ids_TM: Ids, report: Report) -> LogProbs:
        request = TokenSetRequest(0, torch.from_numpy(ids_TM.astype(np.int64)))
        return _numpy(role.score_token_sets(batch, request, report).log_probs_TM)


def _known(ids_TM: Ids, asked_TK: Ids | None, scores_TK: torch.Tensor | None, scores: TokenSetScores) -> LogProbs:
    """Log-probs of the members from those of a model's likeliest tokens, and of those that it was asked for."""
    found_TM = pick(ids_TM, _ids(scores), _numpy(scores.top_log_probs_TK))
    if asked_TK is None or scores_TK is None:
        return found_TM
    return np.where(np.isnan(found_TM), pick(ids_TM, asked_TK, _numpy(scores_TK)), found_TM)


def _ids(scores: TokenSetScores) -> Ids:
    return scores.top_ids_TK.cpu().numpy().astype(np.int32)


def _numpy(values: torch.Tensor) -> LogProbs:
    return values.float().cpu().numpy()
