"""The prompt data set and the size of a rollout."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from miles.config.schema.section import Derived, Metavar, NonNegative, Positive, Section, derived


class DataConfig(Section):
    """The prompt data set and the size of a rollout."""

    prompt_data: Annotated[str | None, Metavar("FILE")] = None
    """JSONL or Parquet file of prompts, of which `FILE@[a:b]` takes rows a to b − 1; required."""

    input_key: str = "input"
    """Column with the prompt: text, or a list of chat messages."""

    label_key: str | None = None
    """Column with the reference answer, for rewards."""

    metadata_key: str = "metadata"
    """Column with an object that is passed to the reward."""

    tool_key: str = "tools"
    """Column with tool descriptions, for the chat template."""

    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template."""

    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, a JSON object."""

    chat_template_path: Annotated[str | None, Metavar("FILE")] = None
    """Jinja file to use as chat template instead of the tokenizer's."""

    num_rollout: Annotated[NonNegative | None, Derived("num_epoch and the size of the data set")] = None
    """Number of rollouts, which is the number of training steps; 0 only evaluates."""

    num_epoch: Positive | None = None
    """Number of passes over the data set, instead of num_rollout."""

    rollout_batch_size: Annotated[
        Positive, Derived("global_batch_size × num_steps_per_rollout / n_samples_per_prompt; 32 without these two")
    ] = derived()
    """Number of prompts per rollout."""

    n_samples_per_prompt: Annotated[
        Positive, Derived("8 to train by an estimator that compares the responses to a prompt, else 1")
    ] = derived()
    """Number of responses per prompt."""
