"""Reverse KL to a teacher over a set of tokens at each position: top-k on-policy distillation.

The definition is that of "Rethinking On-Policy Distillation" (arXiv 2604.13016) in the form of the public system miles.
Dims: T response tokens, M members of a set.
"""

from __future__ import annotations

from typing import Literal

import torch

from miles.algorithms.packing import LOWEST_LOG_PROB, as_float

WeightMode = Literal["student_p", "teacher_p", "none"]


def top_k_reverse_kl(
    student_TM: torch.Tensor,
    teacher_TM: torch.Tensor,
    chosen_TM: torch.Tensor,
    weights: WeightMode = "student_p",
    *,
    normalize: bool = True,
) -> torch.Tensor:
    """D_t = Σ_v w_t(v) (log p_student(v) − log p_teacher(v)) over the chosen tokens v of position t; float [T].

    Args:
        student_TM: log-probs of the set's tokens under the student, in nats.
        teacher_TM: under the teacher.
        chosen_TM: bool; the others are no members, and their entries are not looked at.
        weights: w(v) is the student's probability of v, the teacher's, or 1.
        normalize: divide the weights of a position by their sum. So the absolute size of probabilities does not matter,
            and 1 becomes 1 / members; without it they stay as they are.

    An empty set gives 0. Weights are constants: nothing here has a gradient.
    """
    with torch.no_grad():
        student_TM, teacher_TM = (as_float(x_TM).clamp_min(LOWEST_LOG_PROB) for x_TM in (student_TM, teacher_TM))
        log_weights_TM = {"student_p": student_TM, "teacher_p": teacher_TM, "none": torch.zeros_like(student_TM)}[
            weights
        ]
        log_weights_TM = log_weights_TM.masked_fill(~chosen_TM, -torch.inf)
        weights_TM = torch.softmax(log_weights_TM, dim=-1) if normalize else log_weights_TM.exp()
        weights_TM = weights_TM.nan_to_num(0.0)  # NaN where nothing is chosen
        gaps_TM = torch.where(chosen_TM, student_TM - teacher_TM, 0.0)
        return (weights_TM * gaps_TM).sum(dim=-1)
