"""When and on what the policy is evaluated."""

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
    """Evaluation; sampling settings that are not given are those of the rollout."""

    eval_interval: Annotated[Positive | None, Derived("1 when num_rollout is 0")] = None
    """Rollouts between evaluations; without it nothing is evaluated."""

    eval_prompt_data: Annotated[tuple[str, ...] | None, Metavar("NAME FILE")] = None
    """Data sets to evaluate on: a name and a file, and so on in pairs."""

    skip_eval_before_train: bool = False
    """Leave out the evaluation of the initial weights."""

    n_samples_per_eval_prompt: Positive = 1
    """Responses per prompt."""

    eval_temperature: Annotated[NonNegativeFloat, Derived("rollout_temperature")] = derived()
    """Sampling temperature; 0 is greedy."""

    eval_top_p: Annotated[Probability, Derived("rollout_top_p")] = derived()
    """Probability mass of the most likely tokens that are sampled from."""

    eval_top_k: Annotated[int, Field(ge=-1), Derived("rollout_top_k")] = derived()
    """Number of most likely tokens that are sampled from; -1 is all."""

    eval_max_response_len: Annotated[Positive | None, Derived("rollout_max_response_len")] = None
    """Limit of a response, in tokens."""

    eval_max_prompt_len: Annotated[Positive | None, Derived("rollout_max_prompt_len")] = None
    """Prompts longer than this are left out, in tokens."""

    eval_min_new_tokens: NonNegative | None = None
    """Tokens before which a response cannot end."""

    eval_input_key: Annotated[str, Derived("input_key")] = derived()
    """Column of the prompt."""

    eval_label_key: Annotated[str | None, Derived("label_key")] = None
    """Column of the reference answer."""

    @property
    def datasets(self) -> dict[str, str]:
        """File of each evaluation data set, by name."""
        data = self.eval_prompt_data or ()
        return dict(zip(data[::2], data[1::2], strict=True))
