"""Rules about the policy's loss: settings that it does not read, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.catalog import catalog
from miles.config.schema.derivation import PLAIN_EPS_CLIP
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.policy_loss_spec import LOSS_OF_ESTIMATOR, POLICY_LOSS_SPECS


@rule
def a_loss_is_named_once(s: FlatSettings) -> Iterator[Fault]:
    own = LOSS_OF_ESTIMATOR.get(s.advantage_estimator)
    if own is not None and s.policy_loss_type != own:
        problem = f"advantage_estimator = {s.advantage_estimator} names a policy loss already"
        yield Fault("policy_loss_type", s.policy_loss_type, problem, "set advantage_estimator to grpo, or leave it out")


@rule
def clipping_has_an_effect(s: FlatSettings) -> Iterator[Fault]:
    name, spec = s.policy_loss_type, POLICY_LOSS_SPECS[s.policy_loss_type]
    if spec.eps_clip is None:
        for key in ("eps_clip", "eps_clip_high"):
            if s.given(key) and getattr(s, key) != PLAIN_EPS_CLIP:  # which is its value where it is not given
                yield Fault(key, getattr(s, key), f"{name} clips nothing", "leave it out")
    elif s.eps_clip >= spec.eps_clip_below:
        remedy = "lower it; only cispo, dppo_kl and gmpo take more"
        yield Fault("eps_clip", s.eps_clip, f"it sets no lower bound, which {name} needs", remedy)
    if s.eps_clip_c is not None and not spec.dual_clip:
        remedy = "leave it out, or set eps_clip_high" if spec.eps_clip is not None else "leave it out"
        yield Fault("eps_clip_c", s.eps_clip_c, f"{name} has no dual clip", remedy)


@rule
def settings_of_a_loss_need_that_loss(s: FlatSettings) -> Iterator[Fault]:
    for name, spec in POLICY_LOSS_SPECS.items():
        for key in spec.settings if name != s.policy_loss_type else ():
            if getattr(s, key) != catalog()[key].default:
                problem = f"policy_loss_type = {s.policy_loss_type} does not read it"
                yield Fault(key, getattr(s, key), problem, f"set policy_loss_type to {name}, or leave it out")
    if s.policy_loss_type == "dro" and s.dro_beta is None:
        yield Fault("dro_beta", None, "policy_loss_type = dro has no weight for its penalty", "set it, say to 0.05")


@rule
def losses_that_weigh_sequences_are_means_of_samples(s: FlatSettings) -> Iterator[Fault]:
    if not s.calculate_per_token_loss or POLICY_LOSS_SPECS[s.policy_loss_type].per_token:
        return
    if s.policy_loss_type == "dr_grpo":
        problem = "dr_grpo divides sums of tokens by the response limit, not by their number"
        remedy = "leave it out, or set advantage_estimator to grpo with disable_grpo_std_normalization"
    else:
        problem = f"{s.policy_loss_type} weighs samples by their lengths already"
        remedy = "leave it out, or set policy_loss_type to gspo"
    yield Fault("calculate_per_token_loss", True, problem, remedy)


@rule
def observation_tokens_are_known_by_their_mask(s: FlatSettings) -> Iterator[Fault]:
    if not s.echo_loss_coef:
        return
    if s.mask_offpolicy_in_partial_rollout:
        problem = "it masks tokens of the policy's own, which echo_loss_coef would take for observations"
        yield Fault("mask_offpolicy_in_partial_rollout", True, problem, "leave one of them out")
    if s.calculate_per_token_loss:
        problem = "echo_loss_coef weighs a mean of samples' means"
        yield Fault("calculate_per_token_loss", True, problem, "leave one of them out")


@rule
def vespo_has_one_ratio_to_the_engine(s: FlatSettings) -> Iterator[Fault]:
    for key in ("use_tis", "use_icepop"):
        if s.policy_loss_type == "vespo" and getattr(s, key):
            problem = "vespo weighs sequences by one ratio, not by the ratios of tokens besides"
            yield Fault(
                key, True, problem, "set use_rollout_logprobs, which has that ratio start at the engine's policy"
            )
