"""The data source of a run: a prompt set, its order, and the run's position in it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import xxhash

from miles.config.eval_sets import eval_sets
from miles.data.errors import DataError
from miles.data.order import PromptOrder
from miles.data.prompts import PromptFields, PromptRecord, PromptSet, load_prompts
from miles.data.row_rewards import check_reward
from miles.data.template import PromptTemplate, load_tokenizer
from miles.types import Sample, SampleGroup

if TYPE_CHECKING:
    from miles.config import JobConfig


class PromptSource:
    """Returns prompt groups in order. `prompt` and `group` are pure; only the cursor changes."""

    def __init__(self, prompts: PromptSet, *, seed: int = 0, shuffle: bool = False) -> None:
        self.prompts = prompts
        self.order = PromptOrder(len(prompts), seed=seed, shuffle=shuffle)
        self.cursor = 0
        """The next group id."""
        self.first_group = 0
        """The group that has the first prompt of the order."""

    def __len__(self) -> int:
        return len(self.prompts)

    def prompt(self, group_id: int) -> PromptRecord:
        """Return the prompt of a group."""
        return self.prompts[self.order.index(group_id - self.first_group)]

    def group(self, job_id: str, group_id: int, n_samples: int) -> SampleGroup:
        """Return a group before generation: PENDING samples with prompt, prompt tokens, label and metadata."""
        record = self.prompt(group_id)
        samples = [
            Sample(
                group_id=group_id,
                index=index,
                prompt=record.prompt if isinstance(record.prompt, str) else copy.deepcopy(record.prompt),
                tokens=record.tokens,
                label=record.label,
                metadata=copy.deepcopy(record.metadata) if record.metadata else {},
            )
            for index in range(n_samples)
        ]
        return SampleGroup(job_id, group_id, samples)

    def num_groups(self, num_epoch: int) -> int:
        """Return the number of groups in `num_epoch` passes over the prompts."""
        return self.order.num_groups(num_epoch)

    def take(self, count: int) -> range:
        """Return the next `count` group ids, and move the cursor past them."""
        if count < 0:
            raise ValueError(f"count = {count}; cannot take fewer than 0 groups")
        taken = range(self.cursor, self.cursor + count)
        self.cursor += count
        return taken

    def begin_at(self, group_id: int) -> None:
        """Give the first prompt of the order to this group; earlier groups have none. The cursor moves there."""
        self.first_group = self.cursor = group_id

    def identity(self) -> dict[str, Any]:
        """Return what the prompt of a group depends on, and the name of the source, as JSON."""
        return {
            "source": self.prompts.source,
            "rows": self.prompts.num_rows,
            "prompts": len(self.prompts),
            "digest": _digest(record.prompt for record in self.prompts),
            "answers": _digest((record.label, record.metadata) for record in self.prompts),
            "rollout_seed": self.order.seed,
            "rollout_shuffle": self.order.shuffle,
        }


def train_source(config: JobConfig, tokenizer: Any | None = None) -> PromptSource:
    """Build the training data source of a configuration. Raises DataError when its prompts cannot be used.

    Without `tokenizer`, that of hf_checkpoint is loaded.
    """
    if config.data.prompt_data is None:
        raise DataError("prompt_data is not set; give a .jsonl or .parquet file")
    rollout = config.rollout
    prompts = load_prompts(
        config.data.prompt_data,
        prompt_template(config, tokenizer),
        _fields(config, config.data.input_key, config.data.label_key),
        max_prompt_len=_prompt_limit(rollout.rollout_max_prompt_len, rollout.rollout_max_context_len),
        check=functools.partial(check_reward, config=config.reward),
    )
    return PromptSource(prompts, seed=rollout.rollout_seed, shuffle=rollout.rollout_shuffle)


def eval_sources(config: JobConfig, tokenizer: Any | None = None) -> dict[str, PromptSource]:
    """Build the evaluation sets by name, each in file order; empty when none is configured."""
    sets = eval_sets(config.to_flat())
    if not sets:
        return {}
    template = prompt_template(config, tokenizer)
    limit = _prompt_limit(config.eval.eval_max_prompt_len, config.rollout.rollout_max_context_len)
    check = functools.partial(check_reward, config=config.reward)
    return {
        each.name: PromptSource(
            load_prompts(
                each.path,
                template,
                PromptFields(each.input_key, each.label_key, each.metadata_key, each.tool_key),
                max_prompt_len=limit,
                check=check,
                metadata=each.metadata,
            )
        )
        for each in sets
    }


def prompt_template(config: JobConfig, tokenizer: Any | None = None) -> PromptTemplate:
    """Build the template that turns the job's prompts into tokens."""
    if tokenizer is None:
        if config.rollout.hf_checkpoint is None:
            raise DataError("hf_checkpoint is not set; its tokenizer is needed to read prompts")
        tokenizer = load_tokenizer(config.rollout.hf_checkpoint, config.data.chat_template_path)
    return PromptTemplate(tokenizer, config.data.apply_chat_template, config.data.apply_chat_template_kwargs)


def _fields(config: JobConfig, input_key: str, label_key: str | None) -> PromptFields:
    return PromptFields(input_key, label_key, config.data.metadata_key, config.data.tool_key)


def _prompt_limit(max_prompt_len: int | None, max_context_len: int | None) -> int | None:
    """Return the maximum prompt length, which leaves room in the context for at least one token."""
    limits = [max_prompt_len, None if max_context_len is None else max_context_len - 1]
    return min((limit for limit in limits if limit is not None), default=None)


def _digest(parts: Iterable[Any]) -> str:
    """XXH3-128 of a sequence of JSON values, in hex."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
