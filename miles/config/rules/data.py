"""Rules about the inputs of a run: model, prompts, lengths, sampling, rewards, evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator

from miles.config.eval_sets import evaluates
from miles.config.rules.registry import needs, rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.reward import parse_reward_service


@rule
def model_is_given(s: FlatSettings) -> Iterator[Fault]:
    if not s.hf_checkpoint:
        yield Fault("hf_checkpoint", s.hf_checkpoint, "a run needs a model", "set it to a Hugging Face folder")


@rule
def prompts_are_given(s: FlatSettings) -> Iterator[Fault]:
    if not s.prompt_data and s.num_rollout != 0 and not s.debug_train_only:
        yield Fault("prompt_data", s.prompt_data, "training needs prompts", "set it to a JSONL or Parquet file")


@rule
def run_has_an_end(s: FlatSettings) -> Iterator[Fault]:
    if s.num_rollout is None and s.num_epoch is None:
        yield Fault("num_rollout", None, "neither is num_epoch", "set one of them, so that the run has an end")


@rule
def lengths_fit_the_context(s: FlatSettings) -> Iterator[Fault]:
    context = s.rollout_max_context_len
    if context is None:
        return
    for key in ("rollout_max_prompt_len", "eval_max_prompt_len"):
        length = getattr(s, key)
        if length is not None and length >= context and (s.given(key) or not key.startswith("eval_")):
            problem = f"prompt and response share rollout_max_context_len = {context}"
            yield Fault(key, length, problem, "lower it, or raise rollout_max_context_len")


@rule
def minimum_is_below_the_maximum(s: FlatSettings) -> Iterator[Fault]:
    least, most = s.eval_min_new_tokens, s.eval_max_response_len
    if least is not None and most is not None and least > most:
        yield Fault("eval_min_new_tokens", least, f"eval_max_response_len = {most}", "lower it")


@rule
def top_k_is_a_count_or_minus_one(s: FlatSettings) -> Iterator[Fault]:
    for key in ("rollout_top_k", "eval_top_k"):
        if getattr(s, key) == 0 and s.given(key):
            yield Fault(key, 0, "no token would be left to sample", "set it to -1 for all tokens, or to a count")


@rule
def template_settings_need_the_template(s: FlatSettings) -> Iterator[Fault]:
    yield from needs(s, "chat_template_path", "apply_chat_template")
    yield from needs(s, "apply_chat_template_kwargs", "apply_chat_template")
    yield from needs(s, "tool_key", "apply_chat_template")


@rule
def stop_strings_are_not_empty(s: FlatSettings) -> Iterator[Fault]:
    if "" in (s.rollout_stop or ()):
        problem = "empty text is in every response, which would end at its first token"
        yield Fault("rollout_stop", list(s.rollout_stop), problem, "leave it out")


@rule
def built_in_rewards_have_labels(s: FlatSettings) -> Iterator[Fault]:
    if not s.rm_type:
        return
    problem = f"rm_type = {s.rm_type} compares responses with labels"
    if s.prompt_data and s.label_key is None:
        yield Fault("label_key", None, problem, "set it to the column with the reference answer")
    if (
        s.eval_prompt_data
        and not s.eval_config
        and s.eval_label_key is None
        and (s.label_key is not None or not s.prompt_data)
    ):
        yield Fault("eval_label_key", None, problem, "set it to the column with the reference answer")


@rule
def reward_keys_name_parts_of_a_reward(s: FlatSettings) -> Iterator[Fault]:
    if not s.rm_type or s.reward_service:
        return
    for key in ("reward_key", "eval_reward_key"):
        if getattr(s, key) is not None and s.given(key):
            problem = f"rm_type = {s.rm_type} gives a single number"
            yield Fault(key, getattr(s, key), problem, "leave it out, or use custom_rm_path for named numbers")


@rule
def groups_are_scored_by_a_function(s: FlatSettings) -> Iterator[Fault]:
    if s.group_rm and s.rm_type:
        problem = f"rm_type = {s.rm_type} scores samples one by one"
        yield Fault("group_rm", True, problem, "leave it out, or use custom_rm_path")


@rule
def reward_services_are_well_formed(s: FlatSettings) -> Iterator[Fault]:
    names: set[str] = set()
    for spec in s.reward_service:
        try:
            name, _ = parse_reward_service(spec)
        except ValueError as error:
            yield Fault("reward_service", spec, str(error), "write it as NAME=HOST:PORT")
            continue
        if name in names:
            yield Fault("reward_service", spec, f"{name} is named twice", "give each service a name of its own")
        if name == "default" and (s.rm_type or s.custom_rm_path):
            own = "rm_type" if s.rm_type else "custom_rm_path"
            yield Fault("reward_service", spec, f"{own} is the default already", f"rename it, or leave {own} out")
        names.add(name)


@rule
def evaluation_has_data(s: FlatSettings) -> Iterator[Fault]:
    if s.num_rollout == 0 and not evaluates(s):
        problem = "without eval_prompt_data there is nothing to do"
        yield Fault("num_rollout", 0, problem, "set eval_prompt_data to NAME FILE, or raise num_rollout")
    if s.num_rollout == 0 and s.skip_eval_before_train:
        problem = "that evaluation is all there is to do when num_rollout = 0"
        yield Fault("skip_eval_before_train", True, problem, "leave it out, or raise num_rollout")


@rule
def evaluation_data_come_in_pairs(s: FlatSettings) -> Iterator[Fault]:
    data = s.eval_prompt_data or ()
    if len(data) % 2:
        problem = f"names and files alternate and these are {len(data)}"
        yield Fault("eval_prompt_data", list(data), problem, "write NAME FILE NAME FILE …")
        return
    names = data[::2]
    for name in sorted(set(names)):
        if names.count(name) > 1:
            yield Fault("eval_prompt_data", name, "it names two data sets", "give each a name of its own")
        if not re.fullmatch(r"[\w.-]+", name):
            problem = "its metric is eval/NAME"
            yield Fault("eval_prompt_data", name, problem, "use letters, digits, dots, dashes and underscores")
