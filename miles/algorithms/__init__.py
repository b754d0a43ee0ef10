"""Reinforcement-learning algorithms as pure functions on tensors; see docs/algorithms.md.

They know no model, service or configuration file. Start at `losses` and `advantages`.
"""

from miles.algorithms.advantages import Advantages, compute_advantages, reverse_kl_to_teacher, shape_rewards
from miles.algorithms.corrections import (
    Correction,
    CorrectionMethod,
    IcePop,
    TruncatedImportanceSampling,
    compute_correction,
)
from miles.algorithms.estimators import ESTIMATORS, AdvantageBatch, AdvantageConfig, register_estimator
from miles.algorithms.kl import approximate_kl
from miles.algorithms.linear_log_probs import linear_token_log_probs
from miles.algorithms.log_probs import token_log_probs
from miles.algorithms.loss_aggregation import aggregate, token_weights
from miles.algorithms.losses import LossBatch, LossConfig, LossOutput, critic_loss, rl_loss, sft_loss, value_loss
from miles.algorithms.metrics import MetricMax, MetricSum, reduce_metrics
from miles.algorithms.mis import MaskedImportanceSampling, mismatch_metrics
from miles.algorithms.packing import Packing
from miles.algorithms.policy_losses import (
    POLICY_LOSSES,
    ClipConfig,
    PolicyInputs,
    PolicyLoss,
    PolicyLossConfig,
    PolicyTerms,
    opsm_drop,
    policy_loss,
    register_policy_loss,
)
from miles.algorithms.rewards import (
    divide_by_mean,
    shape_groups,
    shape_several,
    standardize,
    subtract_leave_one_out_mean,
    subtract_mean,
)
from miles.algorithms.squared_probs import linear_sum_squared_probs, sum_squared_probs
from miles.algorithms.vocab_rows import TokenLogProbs, VocabShard
from miles.algorithms.whitening import masked_whiten

__all__ = [
    "ESTIMATORS",
    "POLICY_LOSSES",
    "AdvantageBatch",
    "AdvantageConfig",
    "Advantages",
    "ClipConfig",
    "Correction",
    "CorrectionMethod",
    "IcePop",
    "LossBatch",
    "LossConfig",
    "LossOutput",
    "MaskedImportanceSampling",
    "MetricMax",
    "MetricSum",
    "Packing",
    "PolicyInputs",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyTerms",
    "TokenLogProbs",
    "TruncatedImportanceSampling",
    "VocabShard",
    "aggregate",
    "approximate_kl",
    "compute_advantages",
    "compute_correction",
    "critic_loss",
    "divide_by_mean",
    "linear_sum_squared_probs",
    "linear_token_log_probs",
    "masked_whiten",
    "mismatch_metrics",
    "opsm_drop",
    "policy_loss",
    "reduce_metrics",
    "register_estimator",
    "register_policy_loss",
    "reverse_kl_to_teacher",
    "rl_loss",
    "sft_loss",
    "shape_groups",
    "shape_rewards",
    "shape_several",
    "standardize",
    "subtract_leave_one_out_mean",
    "subtract_mean",
    "sum_squared_probs",
    "token_log_probs",
    "token_weights",
    "value_loss",
]
