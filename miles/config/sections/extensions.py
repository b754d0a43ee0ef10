"""Functions of users besides rewards and filters of groups."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from miles.config.schema.section import DottedPath, Metavar, PositiveFloat, Section
from miles.extensions.names import DEFAULT_DATA_SOURCES, DEFAULT_ROLLOUTS, FULLY_ASYNC_ROLLOUTS, MIS_FUNCTIONS


class ExtensionsConfig(Section):
    """Functions of users, called in the places that docs/extensions.md lists."""

    custom_generate_function_path: Annotated[str | None, DottedPath(), Metavar("MODULE.NAME")] = None
    """Async function (args, sample, sampling_params) that generates the trajectory of a sample with any number of
    requests to the engine."""

    custom_generate_timeout_s: PositiveFloat = 3600.0
    """Timeout of a call of custom_generate_function_path, in seconds; the group is then generated again."""

    rollout_sample_filter_path: Annotated[str | None, DottedPath(), Metavar("MODULE.NAME")] = None
    """Function (args, groups) that takes samples of a rollout out of its training, by setting remove_sample."""

    custom_reward_post_process_path: Annotated[str | None, DottedPath(), Metavar("MODULE.NAME")] = None
    """Function (args, samples) that returns raw rewards, which are reported, and rewards for the advantages, in place
    of the normalisation in groups."""

    custom_loss_function_path: Annotated[str | None, DottedPath(), Metavar("MODULE.NAME")] = None
    """Function (args, batch, log_probs, sum_of_sample_mean) that returns the loss and metrics (loss_type
    custom_loss)."""

    custom_tis_function_path: Annotated[str | None, DottedPath(aliases=MIS_FUNCTIONS), Metavar("MODULE.NAME")] = None
    """Function that corrects the policy loss in place of use_tis, which turns it on; the recipes' own MIS function
    stands for use_mis."""

    custom_pg_loss_reducer_function_path: Annotated[str | None, DottedPath(), Metavar("MODULE.NAME")] = None
    """Function (total_lengths, response_lengths, loss_masks, calculate_per_token_loss) that returns the function which
    sums the policy loss."""

    custom_config_path: Annotated[str | None, Metavar("FILE")] = None
    """YAML file whose keys are settings, which win over flags, or attributes of the args of functions; the command line
    reads it."""

    custom_settings: dict[str, Any] = Field(default_factory=dict)
    """Further attributes of the args of functions, as JSON; custom_config_path adds those of its keys that are no
    settings."""

    rollout_function_path: Annotated[
        str | None, DottedPath(aliases=DEFAULT_ROLLOUTS + FULLY_ASYNC_ROLLOUTS), Metavar("MODULE.NAME")
    ] = None
    """A built-in rollout by the name that recipes give it: the usual one changes nothing, the fully asynchronous one
    makes max_weight_staleness 2. Others are refused: custom_generate_function_path takes functions of a sample."""

    eval_function_path: Annotated[str | None, DottedPath(aliases=DEFAULT_ROLLOUTS), Metavar("MODULE.NAME")] = None
    """The same for evaluation, with the usual one alone."""

    data_source_path: Annotated[str | None, DottedPath(aliases=DEFAULT_DATA_SOURCES), Metavar("MODULE.NAME")] = None
    """The built-in source of prompts by the name that recipes give it, which changes nothing; others are refused."""
