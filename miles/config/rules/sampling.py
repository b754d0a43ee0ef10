"""Rules about how tokens are drawn: training scores them under the full distribution at the sampling temperature."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.speculation import DraftKind, speculation_of

_LOWEST_TEMPERATURE = 1e-3
"""Logits divided by less lose what float32 can tell apart; below 1e-6 SGLang is greedy."""
_CUT = (
    "log-probabilities are of the full distribution, while samples would come from a cut one, "
    "so that importance ratios would be wrong"
)
_LOSSY_ACCEPTANCE = ("speculative_accept_threshold_single", "speculative_accept_threshold_acc")


@rule
def nucleus_is_for_evaluation(s: FlatSettings) -> Iterator[Fault]:
    if s.num_rollout != 0 and s.rollout_top_p != 1:
        yield Fault("rollout_top_p", s.rollout_top_p, _CUT, "set it to 1; eval_top_p may be lower")


@rule
def top_k_is_for_evaluation(s: FlatSettings) -> Iterator[Fault]:
    if s.num_rollout != 0 and s.rollout_top_k > 0:
        yield Fault("rollout_top_k", s.rollout_top_k, _CUT, "set it to -1; eval_top_k may be a count")


@rule
def temperatures_can_be_scored(s: FlatSettings) -> Iterator[Fault]:
    if s.num_rollout != 0 and s.rollout_temperature < _LOWEST_TEMPERATURE:
        problem = "logits divided by it lose the precision that log-probabilities need"
        remedy = f"set it to {_LOWEST_TEMPERATURE:g} or more; eval_temperature = 0 evaluates greedily"
        yield Fault("rollout_temperature", s.rollout_temperature, problem, remedy)
    elif 0 < s.eval_temperature < _LOWEST_TEMPERATURE:
        problem = "logits divided by it lose the precision that sampling needs"
        remedy = f"set it to 0 for greedy, or to {_LOWEST_TEMPERATURE:g} or more"
        yield Fault("eval_temperature", s.eval_temperature, problem, remedy)


@rule
def requests_alone_say_how_to_sample(s: FlatSettings) -> Iterator[Fault]:
    args = s.sglang_args
    if (value := args.get("preferred_sampling_params")) is not None:
        problem = "requests say all sampling parameters themselves"
        yield Fault("sglang_preferred_sampling_params", value, problem, "use rollout_* and eval_* settings")
    if (value := args.get("enable_custom_logit_processor")) is not None:
        problem = "requests name no logit processor: training would not know what it changed"
        yield Fault("sglang_enable_custom_logit_processor", value, problem, "leave it out")


@rule
def speculative_decoding_keeps_the_distribution(s: FlatSettings) -> Iterator[Fault]:
    for flag in _LOSSY_ACCEPTANCE:
        value = s.sglang_args.get(flag, 1)
        if s.num_rollout != 0 and str(value) not in ("1", "1.0"):
            problem = "below 1 drafts are accepted that the policy would not sample as often as its scores say"
            yield Fault(f"sglang_{flag}", value, problem, "leave it out")


@rule
def earlier_responses_are_drafts_without_a_model(s: FlatSettings) -> Iterator[Fault]:
    value = s.draft_responses_per_prompt
    if value and speculation_of(s.sglang_args).kind is not DraftKind.NGRAM:
        problem = "no engine drafts from earlier responses"
        remedy = "set sglang_speculative_algorithm to NGRAM, or leave it out"
        yield Fault("draft_responses_per_prompt", value, problem, remedy)
