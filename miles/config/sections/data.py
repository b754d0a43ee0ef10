"""Where prompts come from and how many make a rollout."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from miles.config.schema.section import Derived, Metavar, NonNegative, Positive, Section, derived


class DataConfig(Section):
    """The prompt data set and the size of a rollout."""

    prompt_data: Annotated[str | None, Metavar("FILE")] = None
    """JSONL or Parquet file of prompts; `FILE@[a:b]` takes rows a up to b. Required."""

    input_key: str = "input"
    """Column of the prompt: text, or a list of chat messages."""

    label_key: str | None = None
    """Column of the reference answer, for rewards."""

    metadata_key: str = "metadata"
    """Column of an object that goes with the sample to its reward."""

    tool_key: str = "tools"
    """Column of tool descriptions, for the chat template."""

    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template."""

    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, a JSON object."""

    chat_template_path: Annotated[str | None, Metavar("FILE")] = None
    """Jinja file to use as chat template in place of the tokenizer's."""

    num_rollout: Annotated[NonNegative | None, Derived("num_epoch and the size of the data set")] = None
    """Rollouts of the run, which are its training steps; 0 only evaluates."""

    num_epoch: Positive | None = None
    """Passes over the data set, in place of num_rollout."""

    rollout_batch_size: Annotated[
        Positive, Derived("global_batch_size × num_steps_per_rollout / n_samples_per_prompt")
    ] = derived()
    """Prompts per rollout. Required unless the other three batch sizes give it."""

    n_samples_per_prompt: Positive = 1
    """Responses per prompt."""
