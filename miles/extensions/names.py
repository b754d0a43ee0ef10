"""Names of built-in functions, as recipes give them. The one place where a name of another system is mapped."""

from __future__ import annotations

_SYSTEMS = ("miles", "slime")


def names_of(path: str) -> tuple[str, ...]:
    """Return a path with each system's name in front."""
    return tuple(f"{system}.{path}" for system in _SYSTEMS)


_FILTERS = "rollout.filter_hub.dynamic_sampling_filters."
DYNAMIC_FILTERS = (*names_of(_FILTERS + "check_reward_nonzero_std"), *names_of(_FILTERS + "check_no_aborted"))
"""Of dynamic_sampling_filter_path; `miles.rollout.filter_hub` has the functions."""

MIS_FUNCTIONS = tuple(
    f"examples.{folder}train_infer_mismatch_helper.mis.{name}"
    for folder in ("", "infra_features.")
    for name in ("compute_mis_weights_with_cp", "compute_mis_weights_fsdp")
)
"""Of custom_tis_function_path: masked importance sampling, which use_mis computes here."""

DEFAULT_ROLLOUTS = (
    *names_of("rollout.sglang_rollout.generate_rollout"),
    "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn",
)
"""Of rollout_function_path and eval_function_path: what is done anyway."""

FULLY_ASYNC_ROLLOUTS = (
    *names_of("rollout.fully_async_rollout.generate_rollout_fully_async"),
    "fully_async_rollout.generate_rollout_fully_async",
    "miles.rollout.fully_async_rollout.FullyAsyncRolloutFn",
)
"""Of rollout_function_path: rollouts that do not wait for training, which max_weight_staleness bounds here."""

SUPERVISED_ROLLOUTS = names_of("rollout.sft_rollout.generate_rollout")
"""Of rollout_function_path: a data set's own responses."""

DEFAULT_DATA_SOURCES = names_of("rollout.data_source.RolloutDataSourceWithBuffer")
"""Of data_source_path: what is done anyway."""
