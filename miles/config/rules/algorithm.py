"""Rules about advantages, losses and importance sampling: contradictions, and settings without effect."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.catalog import catalog
from miles.config.schema.derivation import COMPARES_SAMPLES, compares_samples
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.algorithm import parse_weighted

_PLAIN = ("tis_clip", "tis_clip_low")
_WEIGHTS = ("tis_level", "tis_mode", "tis_lower_bound", "tis_upper_bound", "tis_batch_normalize")
_REJECTION = ("rs_level", "rs_lower_bound", "rs_upper_bound", "rs_veto_threshold")
_STANDARDISES = ("grpo", "gspo", "cispo", "gdpo")
_ONLY_NORMALISES = ("maxrl", "gdpo", "optimal_token_baseline")
_TAKES_KL_IN_THE_REWARD = ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo")
_WHITENS = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")
_DISCOUNTS = ("reinforce_plus_plus", "ppo")
_OF_THE_CRITIC = ("lambd", "value_clip", "num_critic_only_steps", "critic_lr_warmup_iters", "critic_lr", "critic_load")
_SAME_AS_THE_POLICY = {"critic_lr": "lr", "critic_load": "hf_checkpoint"}


@rule
def comparing_estimators_get_several_samples(s: FlatSettings) -> Iterator[Fault]:
    if s.n_samples_per_prompt == 1 and s.num_rollout != 0 and compares_samples(s):
        problem = f"{s.advantage_estimator} compares the samples of a prompt, so every advantage would be 0"
        yield Fault("n_samples_per_prompt", 1, problem, "set it to 2 or more")


@rule
def whitening_has_several_samples(s: FlatSettings) -> Iterator[Fault]:
    whitens = s.normalize_advantages or s.advantage_estimator in _WHITENS
    differ = s.advantage_estimator == "ppo" or s.gamma != 1 or s.kl_coef or s.use_opd
    if whitens and not differ and s.rollout_batch_size * s.n_samples_per_prompt == 1 and s.num_rollout != 0:
        problem = "whitening compares the samples of a batch, so every advantage would be 0"
        yield Fault("rollout_batch_size", 1, problem, "set it or n_samples_per_prompt to 2 or more")


@rule
def reward_normalisation_is_the_estimators(s: FlatSettings) -> Iterator[Fault]:
    estimator = s.advantage_estimator
    if not s.rewards_normalization and estimator not in COMPARES_SAMPLES:
        problem = f"{estimator} takes rewards as they are"
        yield Fault("rewards_normalization", False, problem, "leave disable_rewards_normalization out")
    if not s.rewards_normalization and estimator in _ONLY_NORMALISES:
        problem = f"{estimator} is a way to compare them"
        yield Fault("rewards_normalization", False, problem, "leave disable_rewards_normalization out")
    if not s.grpo_std_normalization and estimator not in _STANDARDISES:
        problem = f"{estimator} divides by no standard deviation"
        yield Fault("grpo_std_normalization", False, problem, "leave disable_grpo_std_normalization out")
    elif not s.grpo_std_normalization and not s.rewards_normalization:
        problem = "disable_rewards_normalization leaves rewards as they are"
        yield Fault("grpo_std_normalization", False, problem, "leave one of them out")


@rule
def dr_grpo_divides_by_no_standard_deviation(s: FlatSettings) -> Iterator[Fault]:
    if s.advantage_estimator != "dr_grpo":
        return
    grpo = "leave it out, or set advantage_estimator to grpo with disable_grpo_std_normalization"
    if s.normalize_advantages:
        problem = "dr_grpo divides by no standard deviation, as whitening does"
        yield Fault("normalize_advantages", True, problem, grpo)


@rule
def gdpo_has_several_rewards(s: FlatSettings) -> Iterator[Fault]:
    if s.advantage_estimator != "gdpo":
        if s.gdpo_rewards:
            problem = f"advantage_estimator = {s.advantage_estimator} takes one reward"
            yield Fault("gdpo_rewards", s.gdpo_rewards[0], problem, "set advantage_estimator to gdpo, or leave it out")
        return
    if len(s.gdpo_rewards) < 2:
        value = s.gdpo_rewards[0] if s.gdpo_rewards else None
        yield Fault("gdpo_rewards", value, "gdpo adds up several rewards", "name two or more, or use grpo")
    names = []
    for spec in s.gdpo_rewards:
        try:
            names.append(parse_weighted(spec)[0])
        except ValueError as error:
            yield Fault("gdpo_rewards", spec, str(error), "write NAME, or NAME=WEIGHT")
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Fault("gdpo_rewards", name, "it is named twice", "name each reward once")
    if s.reward_key is None:
        problem = "gdpo's rewards have several numbers, of which metrics and filters take one"
        yield Fault("reward_key", None, problem, "set it to one of them")
    if s.normalize_advantages:
        problem = "gdpo normalises over the batch already"
        yield Fault("normalize_advantages", True, problem, "leave it out")


@rule
def kl_is_applied_once(s: FlatSettings) -> Iterator[Fault]:
    if s.kl_coef and s.kl_loss_coef:
        problem = f"kl_loss_coef = {s.kl_loss_coef:g} applies the KL a second time"
        yield Fault("kl_coef", s.kl_coef, problem, "set one of them to 0")
    if s.kl_coef and s.advantage_estimator not in _TAKES_KL_IN_THE_REWARD:
        problem = f"{s.advantage_estimator} takes no KL in the reward"
        yield Fault("kl_coef", s.kl_coef, problem, "use use_kl_loss and kl_loss_coef instead")


@rule
def kl_loss_settings_need_the_kl_loss(s: FlatSettings) -> Iterator[Fault]:
    yield from needs(s, "kl_loss_coef", "use_kl_loss")
    yield from needs(s, "use_unbiased_kl", "use_kl_loss")
    if s.ref_update_interval is not None and not (s.use_kl_loss or s.kl_coef):
        problem = "there is no reference without use_kl_loss or kl_coef"
        yield Fault("ref_update_interval", s.ref_update_interval, problem, "turn one of them on, or leave it out")


@rule
def discount_is_used(s: FlatSettings) -> Iterator[Fault]:
    if s.gamma != 1 and s.advantage_estimator not in _DISCOUNTS:
        problem = f"{s.advantage_estimator} does not discount"
        remedy = f"leave it out, or set advantage_estimator to {' or '.join(_DISCOUNTS)}"
        yield Fault("gamma", s.gamma, problem, remedy)


@rule
def critic_settings_need_a_critic(s: FlatSettings) -> Iterator[Fault]:
    if s.advantage_estimator == "ppo":
        return
    for key in _OF_THE_CRITIC:
        value = getattr(s, key)
        same = _SAME_AS_THE_POLICY.get(key)
        if value == catalog()[key].default or (same is not None and value == getattr(s, same)):
            continue
        problem = f"advantage_estimator = {s.advantage_estimator} has no critic"
        yield Fault(key, value, problem, "set advantage_estimator to ppo, or leave it out")


@rule
def distillation_has_a_teacher(s: FlatSettings) -> Iterator[Fault]:
    for key in ("opd_type", "opd_kl_coef", "opd_teacher_load"):
        yield from needs(s, key, "use_opd")
    if not s.use_opd:
        return
    if s.opd_type == "sglang":
        problem = "no server is asked for the teacher's log-probabilities"
        yield Fault("opd_type", "sglang", problem, "set it to megatron, which loads the teacher in any trainer")
    elif s.opd_type is None:
        yield Fault("opd_type", None, "use_opd does not say where its teacher is", "set it to megatron")
    elif s.opd_teacher_load is None:
        yield Fault("opd_teacher_load", None, "use_opd needs a teacher", "set it to a Hugging Face folder")


@rule
def old_log_probs_come_from_one_place(s: FlatSettings) -> Iterator[Fault]:
    if s.keep_old_actor and s.use_rollout_logprobs:
        problem = "use_rollout_logprobs already takes the engine's log-probabilities as the old ones"
        yield Fault("keep_old_actor", True, problem, "leave one of them out")
    if s.keep_old_actor and s.advantage_estimator == "optimal_token_baseline":
        problem = "optimal_token_baseline takes the current policy's probabilities of all tokens, not an older one's"
        yield Fault("keep_old_actor", True, problem, "leave it out")
    if s.keep_old_actor and s.use_routing_replay:
        problem = "use_routing_replay replays what the policy chose, and old actors chose otherwise"
        yield Fault("keep_old_actor", True, problem, "use use_rollout_routing_replay, or leave one of them out")


@rule
def routing_comes_from_one_place(s: FlatSettings) -> Iterator[Fault]:
    if s.use_routing_replay and s.use_rollout_routing_replay:
        problem = "use_rollout_routing_replay replays the engine's routing already"
        yield Fault("use_routing_replay", True, problem, "leave one of them out")
    if s.observe_rollout_routing and s.use_rollout_routing_replay:
        problem = "use_rollout_routing_replay records and observes the engine's routing already"
        yield Fault("observe_rollout_routing", True, problem, "leave one of them out")


@rule
def corrections_do_not_pile_up(s: FlatSettings) -> Iterator[Fault]:
    corrections = [key for key in ("use_tis", "use_mis", "use_icepop") if getattr(s, key)]
    if s.use_rollout_logprobs:
        for key in corrections:
            problem = "use_rollout_logprobs already takes the engine's log-probabilities as the old ones"
            yield Fault(key, True, problem, "leave one of them out")
    for key in ("use_tis", "use_mis"):
        if s.use_icepop and getattr(s, key):
            yield Fault("use_icepop", True, f"{key} corrects the same gap", "leave one of them out")
    if s.use_mis and not (s.use_tis or s.use_rs):
        yield Fault("use_mis", True, "neither use_tis nor use_rs is on, so it does nothing", "turn one of them on")
    yield from needs(s, "use_rs", "use_mis")


@rule
def the_bound_of_a_weight_is_said_once(s: FlatSettings) -> Iterator[Fault]:
    if s.tis_threshold is not None and s.tis_threshold != s.tis_clip:
        yield Fault(
            "tis_threshold", s.tis_threshold, f"tis_clip = {s.tis_clip:g} says otherwise", "leave one of them out"
        )


@rule
def importance_bounds_are_ordered(s: FlatSettings) -> Iterator[Fault]:
    pairs = (("tis_clip_low", "tis_clip"), ("tis_lower_bound", "tis_upper_bound"), ("rs_lower_bound", "rs_upper_bound"))
    for low, high in pairs:
        if getattr(s, low) >= getattr(s, high):
            problem = f"it is not below {high} = {getattr(s, high):g}"
            yield Fault(low, getattr(s, low), problem, f"lower it, or raise {high}")


@rule
def bounds_belong_to_a_correction(s: FlatSettings) -> Iterator[Fault]:
    plain = (s.use_tis and not s.use_mis) or s.use_icepop
    levels = s.use_mis and s.use_tis
    rejection = s.use_mis and s.use_rs
    defaults = {key: catalog()[key].default for key in (*_PLAIN, *_WEIGHTS, *_REJECTION)}
    defaults |= {
        "tis_lower_bound": 1 / s.tis_upper_bound,
        "rs_lower_bound": s.tis_lower_bound,
        "rs_upper_bound": s.tis_upper_bound,
    }
    for keys, used, switch in (
        (_PLAIN, plain, "use_tis or use_icepop, without use_mis"),
        (_WEIGHTS, levels, "use_mis with use_tis"),
        (_REJECTION, rejection, "use_mis with use_rs"),
    ):
        for key in keys if not used else ():
            if getattr(s, key) != defaults[key]:
                name = "tis_threshold" if key == "tis_clip" and s.tis_threshold is not None else key
                yield Fault(name, getattr(s, key), f"it only goes with {switch}", "turn that on, or leave it out")


@rule
def truncation_has_no_lower_bound(s: FlatSettings) -> Iterator[Fault]:
    if not (s.use_mis and s.use_tis) or s.tis_mode != "truncate" or s.tis_lower_bound == 1 / s.tis_upper_bound:
        return
    if not s.use_rs or s.rs_lower_bound != s.tis_lower_bound:
        problem = "tis_mode = truncate bounds weights above alone"
        yield Fault("tis_lower_bound", s.tis_lower_bound, problem, "set tis_mode to clip or mask, or leave it out")


@rule
def opsm_settings_need_opsm(s: FlatSettings) -> Iterator[Fault]:
    yield from needs(s, "opsm_delta", "use_opsm")


@rule
def opsm_compares_with_an_older_policy(s: FlatSettings) -> Iterator[Fault]:
    if s.use_opsm and s.num_steps_per_rollout == 1 and not (s.use_rollout_logprobs or s.keep_old_actor):
        problem = "in the only step of a rollout the old policy is the one being trained, so that no sequence has moved"
        remedy = "raise num_steps_per_rollout, or turn use_rollout_logprobs or keep_old_actor on"
        yield Fault("use_opsm", True, problem, remedy)
