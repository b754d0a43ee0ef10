"""Rules about dumps, and about runs of one half."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import needs, rule
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.rollout_dumps.names import changes_with, why_no_template

_PLACEHOLDERS = {
    "save_debug_rollout_data": ("rollout_id",),
    "load_debug_rollout_data": ("rollout_id",),
    "save_debug_train_data": ("rollout_id", "rank"),
    "ci_save_grad_norm": ("role", "rollout_id", "step_id"),
    "ci_load_grad_norm": ("role", "rollout_id", "step_id"),
}
_OF_A_TRAINER = ("save_debug_train_data", "ci_save_grad_norm", "ci_load_grad_norm", "debug_train_only")


@rule
def dump_names_have_known_placeholders(s: FlatSettings) -> Iterator[Fault]:
    for key in _PLACEHOLDERS:
        if (problem := _why_no_template(s, key)) is not None:
            yield Fault(key, getattr(s, key), problem, "double other braces, as {{ and }}")


@rule
def dumps_do_not_overwrite_each_other(s: FlatSettings) -> Iterator[Fault]:
    several = {
        "rollout_id": None if s.num_rollout == 1 else "every rollout has a file of its own",
        "step_id": f"a rollout has {s.num_steps_per_rollout} steps" if s.num_steps_per_rollout > 1 else None,
        "role": "a critic is trained too" if s.advantage_estimator == "ppo" else None,
        "rank": "every rank has a file of its own"
        if s.actor_num_nodes * (s.actor_num_gpus_per_node or 1) > 1
        else None,
    }
    for key, names in _PLACEHOLDERS.items():
        if key == "load_debug_rollout_data" or getattr(s, key) is None or _why_no_template(s, key) is not None:
            continue
        for name in names:
            others = [other for other in names if other != name]
            if (why := several[name]) and not changes_with(getattr(s, key), name, *others):
                yield Fault(key, getattr(s, key), why, f"write {{{name}}} in its name")


@rule
def a_run_has_one_half_at_least(s: FlatSettings) -> Iterator[Fault]:
    loads = s.load_debug_rollout_data is not None
    if s.debug_rollout_only:
        for key in _OF_A_TRAINER:
            if getattr(s, key):
                problem = "debug_rollout_only has no trainer"
                yield Fault(key, getattr(s, key), problem, "leave one of them out")
    if s.debug_train_only and not loads:
        problem = "without load_debug_rollout_data there is nothing to train on"
        yield Fault("debug_train_only", True, problem, "set load_debug_rollout_data, or leave it out")
    if loads and not s.debug_train_only:
        problem = "load_debug_rollout_data starts no engines"
        yield Fault("debug_train_only", False, problem, "leave it out")
    if loads and s.num_rollout is None:
        problem = "load_debug_rollout_data reads no prompts that num_epoch could count"
        yield Fault("num_rollout", None, problem, "set it to the rollouts to train on")


@rule
def shares_of_dumps_need_dumps(s: FlatSettings) -> Iterator[Fault]:
    yield from needs(s, "load_debug_rollout_data_subsample", "load_debug_rollout_data")


def _why_no_template(s: FlatSettings, key: str) -> str | None:
    """Say what is wrong with a setting's placeholders; None when nothing is, or it is not given."""
    value = getattr(s, key)
    return None if value is None else why_no_template(value, *_PLACEHOLDERS[key]) or None
