"""Rules about functions of users."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.extensions.names import (
    DEFAULT_DATA_SOURCES,
    DEFAULT_ROLLOUTS,
    FULLY_ASYNC_ROLLOUTS,
    MIS_FUNCTIONS,
    SUPERVISED_ROLLOUTS,
)

_CORRECTIONS = ("use_tis", "use_mis", "use_icepop", "use_opsm")


@rule
def generate_functions_go_together_with_the_rest(s: FlatSettings) -> Iterator[Fault]:
    yield from needs(s, "custom_generate_timeout_s", "custom_generate_function_path")
    if not s.custom_generate_function_path:
        return
    path = f"custom_generate_function_path = {s.custom_generate_function_path}"
    if s.partial_rollout:
        problem = f"{path} cannot be resumed in the middle of a trajectory"
        yield Fault("partial_rollout", True, problem, "leave it out; unfinished trajectories go on over weight updates")
    for key in ("use_rollout_routing_replay", "observe_rollout_routing"):
        if getattr(s, key):
            problem = f"{path} makes several requests, whose recorded experts are not joined"
            yield Fault(key, True, problem, "leave it out; use_routing_replay replays the trainer's own routing")


@rule
def own_losses_take_the_place_of_the_policys(s: FlatSettings) -> Iterator[Fault]:
    custom, path = s.loss_type == "custom_loss", s.custom_loss_function_path
    if custom and not path:
        problem = "custom_loss_function_path is not set"
        yield Fault("loss_type", s.loss_type, problem, "set it, or leave loss_type out")
    if path and not custom:
        yield Fault("custom_loss_function_path", path, "loss_type is policy_loss", "set loss_type to custom_loss")
    if not custom:
        return
    for key in (*_CORRECTIONS, "custom_pg_loss_reducer_function_path"):
        if getattr(s, key):
            problem = "it changes the policy loss, and loss_type = custom_loss has none"
            yield Fault(key, getattr(s, key), problem, "leave it out, and do it in custom_loss_function_path")


@rule
def own_corrections_take_the_place_of_tis(s: FlatSettings) -> Iterator[Fault]:
    path = s.custom_tis_function_path
    if not path or path in MIS_FUNCTIONS:
        return
    if s.use_mis or s.use_icepop:
        key = "use_mis" if s.use_mis else "use_icepop"
        yield Fault(key, True, f"custom_tis_function_path = {path} corrects in its place", "leave one of them out")
    elif not s.use_tis:
        yield Fault("custom_tis_function_path", path, "use_tis is off, which calls it", "turn use_tis on")


@rule
def own_reducers_have_a_loss_to_reduce(s: FlatSettings) -> Iterator[Fault]:
    if s.custom_pg_loss_reducer_function_path and s.advantage_estimator == "dr_grpo":
        path = s.custom_pg_loss_reducer_function_path
        problem = "dr_grpo divides sums of tokens by the response limit already"
        remedy = "leave one of them out; grpo with disable_grpo_std_normalization has the same advantages"
        yield Fault("custom_pg_loss_reducer_function_path", path, problem, remedy)


@rule
def own_rewards_take_the_place_of_normalisation(s: FlatSettings) -> Iterator[Fault]:
    path = s.custom_reward_post_process_path
    for key in ("rewards_normalization", "grpo_std_normalization"):
        if path and not getattr(s, key):
            problem = f"custom_reward_post_process_path = {path} takes the place of all normalisation"
            yield Fault(key, False, problem, f"leave {catalog()[key].flag} out")


@rule
def further_settings_have_a_reader(s: FlatSettings) -> Iterator[Fault]:
    if s.custom_config_path is not None:
        problem = "the command line alone reads it"
        remedy = "send its keys as settings, and those that are none in custom_settings"
        yield Fault("custom_config_path", s.custom_config_path, problem, remedy)
    paths = [key for key, entry in catalog().items() if entry.dotted_path is not None]
    if s.custom_settings and not any(getattr(s, key) for key in paths):
        names = ", ".join(s.custom_settings)
        problem = f"no setting is named {names}, and there is no function that could read them"
        yield Fault("custom_settings", s.custom_settings, problem, "correct the names, or leave them out")


_BY_GROUP = "rollout services generate group by group and no process makes whole rollouts"


@rule
def whole_rollouts_are_built_in(s: FlatSettings) -> Iterator[Fault]:
    function = s.rollout_function_path
    if function in SUPERVISED_ROLLOUTS:
        problem = "there is no supervised fine-tuning, in which a data set has the responses"
        yield Fault("rollout_function_path", function, problem, "leave it out to train on sampled responses")
    elif function and function not in DEFAULT_ROLLOUTS + FULLY_ASYNC_ROLLOUTS:
        remedy = "leave it out; custom_generate_function_path takes a function (args, sample, sampling_params)"
        yield Fault("rollout_function_path", function, _BY_GROUP, remedy)
    if s.eval_function_path and s.eval_function_path not in DEFAULT_ROLLOUTS:
        remedy = "leave it out; custom_generate_function_path is called with evaluation=True too"
        yield Fault("eval_function_path", s.eval_function_path, _BY_GROUP, remedy)
    if s.data_source_path and s.data_source_path not in DEFAULT_DATA_SOURCES:
        problem = "prompts are read from files alone, so that a resumed run goes on where it was"
        yield Fault("data_source_path", s.data_source_path, problem, "write the prompts to a file for prompt_data")
