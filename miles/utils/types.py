"""The sample that functions of users get and return: fields of plain Python types, under the names recipes use.

Inside the system a sample is a `miles.types.Sample`, with arrays; `miles.extensions.samples` converts between the two.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass
class Sample:
    """One trajectory: a prompt and a response, with what is known of each response token."""

    group_index: int | None = None
    """Number of the prompt group."""
    index: int | None = None
    """Number of the sample: those of a group follow each other."""
    rollout_id: int | None = None
    prompt: str | list[dict[str, Any]] = ""
    """With apply_chat_template the rendered text."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Prompt, then response; empty before anything was generated."""
    multimodal_inputs: dict[str, Any] | None = None
    """Always None: prompts are text."""
    multimodal_train_inputs: dict[str, Any] | None = None
    response: str = ""
    response_length: int = 0
    """Response tokens at the end of `tokens`."""
    label: Any = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    """1 where a response token is trained on, 0 where not; None: all are."""
    weight_versions: list[str] = dataclasses.field(default_factory=list)
    """Of each request that contributed."""
    rollout_log_probs: list[float] | None = None
    """Of each response token, in nats."""
    rollout_routed_experts: Any = None
    remove_sample: bool = False
    """True: the sample counts for its group's advantages and is not trained on."""
    teacher_log_probs: list[float] | None = None

    class Status(enum.Enum):
        """The state of a sample."""

        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    status: Status = Status.PENDING
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of the prompt's row; must stay JSON."""
    generate_function_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0
    """Seconds spent outside of generation."""

    @dataclasses.dataclass
    class SpecInfo:
        """Counters of speculative decoding."""

        spec_accept_token_num: int = 0
        spec_draft_token_num: int = 0
        spec_verify_ct: int = 0
        completion_token_num: int = 0

        def add(self, meta_info: Mapping[str, Any]) -> None:
            """Add the counters of an answer of /generate."""
            self.spec_accept_token_num += meta_info.get("spec_accept_token_num", 0)
            self.spec_draft_token_num += meta_info.get("spec_draft_token_num", 0)
            self.spec_verify_ct += meta_info.get("spec_verify_ct", 0)
            self.completion_token_num += meta_info.get("completion_tokens", 0)

    @dataclasses.dataclass
    class PrefixCacheInfo:
        """Counters of the prefix cache."""

        cached_tokens: int = 0
        total_prompt_tokens: int = 0

        def add(self, meta_info: Mapping[str, Any]) -> None:
            """Add the counters of an answer of /generate."""
            self.cached_tokens += meta_info.get("cached_tokens", 0)
            self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)

    spec_info: SpecInfo = dataclasses.field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = dataclasses.field(default_factory=PrefixCacheInfo)

    @property
    def effective_response_length(self) -> int:
        """Response tokens that are trained on."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def get_reward_value(self, args: Any) -> Any:
        """Return the reward, or the part of it that `args.reward_key` names."""
        key = getattr(args, "reward_key", None)
        return self.reward[key] if key and isinstance(self.reward, Mapping) else self.reward

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes, with the status as text and the counters as dictionaries."""
        counters = {name: dataclasses.asdict(getattr(self, name)) for name in ("spec_info", "prefix_cache_info")}
        return {**vars(self), "status": self.status.value, **counters}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Sample:
        """Return the sample of `to_dict`; keys that are no fields become attributes."""
        values = dict(data)
        values["status"] = Sample.Status(values["status"])
        values["spec_info"] = Sample.SpecInfo(**values.get("spec_info", {}))
        values["prefix_cache_info"] = Sample.PrefixCacheInfo(**values.get("prefix_cache_info", {}))
        sample = Sample(**{name: values.pop(name) for name in FIELDS if name in values})
        for name, value in values.items():
            setattr(sample, name, value)
        return sample

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Sequence[int] | None = None,
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Append what the model wrote, or with `trainable` False what a tool did, with loss mask 0.

        Raises ValueError when the log-probabilities are missing, too many, or those of a tool.
        """
        new = [int(token) for token in ([] if tokens is None else tokens)]
        new_log_probs = None if log_probs is None else [float(value) for value in log_probs]
        if new_log_probs is not None and len(new_log_probs) != len(new):
            raise ValueError(f"{len(new_log_probs)} log_probs for {len(new)} tokens")
        if new and trainable == (new_log_probs is None):
            raise ValueError("log_probs are needed of trainable tokens, and there are none of others")
        self.response += text or ""
        if new:
            before = self.response_length
            self.loss_mask = [
                *([1] * before if self.loss_mask is None else self.loss_mask),
                *[int(trainable)] * len(new),
            ]
            if self.rollout_log_probs is None and before and trainable:
                raise ValueError("the response so far has no rollout_log_probs to append to")
            earlier = [0.0] * before if self.rollout_log_probs is None else self.rollout_log_probs
            self.rollout_log_probs = [*earlier, *(new_log_probs or [0.0] * len(new))]
            self.tokens = [*self.tokens, *new]
            self.response_length += len(new)
        if meta_info is not None and update_terminal_info and "finish_reason" in meta_info:
            self.update_from_meta_info(args, meta_info)

    def update_from_meta_info(self, args: Any, meta_info: Mapping[str, Any]) -> None:
        """Take counters, weight version and status from an answer of /generate."""
        self.spec_info.add(meta_info)
        self.prefix_cache_info.add(meta_info)
        if "weight_version" in meta_info:
            self.weight_versions.append(meta_info["weight_version"])
        self.status = _STATUS[meta_info["finish_reason"]["type"]]


_STATUS = {"stop": Sample.Status.COMPLETED, "length": Sample.Status.TRUNCATED, "abort": Sample.Status.ABORTED}
FIELDS = tuple(field.name for field in dataclasses.fields(Sample))
"""Names of the fields; a function may set other attributes too."""
