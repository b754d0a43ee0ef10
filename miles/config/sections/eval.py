"""Evaluation: when, on which data sets, and with which sampling."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from miles.config.schema.section import (
    Derived,
    Metavar,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Probability,
    Section,
    derived,
)


class EvalConfig(Section):
    """Evaluation; sampling settings default to those of the rollout."""

    eval_interval: Annotated[Positive | None, Derived("1 when num_rollout is 0")] = None
    """Number of rollouts between evaluations; not given never evaluates."""

    eval_prompt_data: Annotated[tuple[str, ...] | None, Metavar("NAME FILE")] = None
    """Data sets to evaluate on, as pairs of a name and a file."""

    eval_config: Annotated[str | None, Metavar("FILE")] = None
    """YAML or JSON file of the data sets to evaluate on, each with settings of its own, instead of eval_prompt_data; or
    its text in base64 behind base64:."""

    skip_eval_before_train: bool = False
    """Skip the evaluation of the initial weights."""

    n_samples_per_eval_prompt: Positive = 1
    """Number of responses per evaluation prompt."""

    eval_temperature: Annotated[NonNegativeFloat, Derived("rollout_temperature")] = derived()
    """Sampling temperature; 0 is greedy."""

    eval_top_p: Annotated[Probability, Derived("rollout_top_p")] = derived()
    """Nucleus (top-p) sampling: probability mass of the most likely tokens to sample from."""

    eval_top_k: Annotated[int, Field(ge=-1), Derived("rollout_top_k")] = derived()
    """Top-k sampling: number of the most likely tokens to sample from; -1 means all."""

    eval_max_response_len: Annotated[Positive | None, Derived("rollout_max_response_len")] = None
    """Maximum length of a response, in tokens."""

    eval_max_prompt_len: Annotated[Positive | None, Derived("rollout_max_prompt_len")] = None
    """Maximum length of a prompt, in tokens; longer ones are skipped."""

    eval_min_new_tokens: NonNegative | None = None
    """Minimum length of a response, in tokens."""

    eval_input_key: Annotated[str, Derived("input_key")] = derived()
    """Column with the prompt."""

    eval_label_key: Annotated[str | None, Derived("label_key")] = None
    """Column with the reference answer."""
