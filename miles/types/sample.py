"""The sample and the group of samples, which rollouts produce and training steps consume.

Fields carry the names and meanings of `Sample` and `SampleGroup` in protos/miles/v1/sample.proto.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Message: TypeAlias = dict[str, Any]
"""One chat message, as JSON: at least `role`, usually `content`."""

Prompt: TypeAlias = str | list[Message]
"""Plain text, or chat messages."""

Reward: TypeAlias = float | dict[str, float]
"""One finite number, or several named ones."""


class SampleStatus(enum.Enum):
    """The state of a sample."""

    PENDING = "pending"
    """Not generated yet, or partly generated and waiting to be resumed."""
    COMPLETED = "completed"
    """Ended by a stop token or a stop string."""
    TRUNCATED = "truncated"
    """Ended by the length limit."""
    ABORTED = "aborted"
    """Ended by an abort; the response so far is valid."""
    FAILED = "failed"
    """Generation or scoring failed; metadata says why. Never trained on."""


class VersionSpan(NamedTuple):
    """Policy `version` produced the response tokens [start, end)."""

    version: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class SpeculativeStats:
    """Statistics of speculative decoding for one sample."""

    accepted_draft_tokens: int = 0
    proposed_draft_tokens: int = 0
    verify_count: int = 0
    """Verification passes of the policy."""


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixCacheStats:
    """Statistics of the prefix cache for one sample."""

    cached_tokens: int = 0
    """Prompt tokens whose keys and values were reused."""
    prompt_tokens: int = 0
    """All prompt tokens."""


def _no_tokens() -> npt.NDArray[np.int32]:
    return np.empty(0, np.int32)


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """One trajectory: a prompt and one response to it.

    A new sample is PENDING with the prompt's tokens, `response_length` 0 and no spans. A preempted one is PENDING with
    a partial response, to which all per-response-token fields refer. A FAILED one may have any part of a response, and
    usually no reward. `miles.types.check_sample` enforces this.
    """

    group_id: int
    """Prompt group the sample belongs to, unique within its job."""
    index: int
    """Position within the group, from 0."""
    prompt: Prompt
    """The prompt as given by the user; `tokens` has its tokens."""
    tokens: npt.NDArray[np.int32] = dataclasses.field(default_factory=_no_tokens)
    """Prompt then response; int32, shape (tokens,)."""
    response_length: int = 0
    """Response tokens at the end of `tokens`."""
    response: str = ""
    """The response decoded to text, without the end token; `tokens` has that too."""
    label: str | None = None
    """The reference answer, given to the reward."""
    reward: Reward | None = None
    """None until scored."""
    loss_mask: npt.NDArray[np.uint8] | None = None
    """1 where a response token is trained on, 0 where not; uint8, shape (response_length,). None: all are."""
    status: SampleStatus = SampleStatus.PENDING
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    """A JSON object from the data set and from reward functions."""
    rollout_log_probs: npt.NDArray[np.float32] | None = None
    """Of each response token at the sampling temperature, before top-k and top-p, in nats; float32,
    shape (response_length,)."""
    rollout_routed_experts: npt.NDArray[np.integer[Any]] | None = None
    """Experts chosen while sampling; uint8 or uint16, shape (tokens - 1, moe_layers, top_k)."""
    weight_versions: tuple[VersionSpan, ...] = ()
    """The version that produced each response token: contiguous, ascending spans that cover the response."""
    speculative: SpeculativeStats | None = None
    prefix_cache: PrefixCacheStats | None = None
    teacher_log_probs: npt.NDArray[np.float32] | None = None
    """Of the response tokens under the teacher, in nats; float32, shape (response_length,)."""
    teacher_tokens: npt.NDArray[np.int32] | None = None
    """Tokens at each position at which distillation compares the policy with the teacher, -1 in empty places; int32,
    shape (response_length, places). Before the teacher has scored them: the policy's likeliest."""
    teacher_token_log_probs: npt.NDArray[np.float32] | None = None
    """Theirs under the teacher, in nats; float32, of the same shape. Anything finite where there is no token."""
    remove_sample: bool = False
    """True when a filter removed the sample: its loss mask counts as all zero."""

    @property
    def prompt_length(self) -> int:
        """Prompt tokens at the start of `tokens`."""
        return len(self.tokens) - self.response_length

    @property
    def prompt_tokens(self) -> npt.NDArray[np.int32]:
        """A view of the prompt's tokens; int32, shape (prompt_length,)."""
        return self.tokens[: self.prompt_length]

    @property
    def response_tokens(self) -> npt.NDArray[np.int32]:
        """A view of the response's tokens; int32, shape (response_length,)."""
        return self.tokens[self.prompt_length :]

    @property
    def oldest_version(self) -> int | None:
        """Oldest policy version that produced any token; None without a response."""
        return min((span.version for span in self.weight_versions), default=None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sample):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in _SAMPLE_FIELDS)

    __hash__ = None  # type: ignore[assignment]  # mutable


def failed(sample: Sample, why: str) -> Sample:
    """Return the sample as one that is never trained on; its metadata says why."""
    metadata = {**sample.metadata, "reward_error": why}
    return dataclasses.replace(sample, status=SampleStatus.FAILED, reward=None, metadata=metadata, remove_sample=True)


_SAMPLE_FIELDS = tuple(field.name for field in dataclasses.fields(Sample))


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and bool(np.array_equal(left, right))
    if isinstance(left, np.ndarray) or isinstance(right, np.ndarray):
        return False
    return bool(left == right)


@dataclasses.dataclass(slots=True, eq=False)
class SampleGroup:
    """The samples of one prompt, which are leased, queued, filtered and trained on together."""

    job_id: str
    """Job that owns the group."""
    group_id: int
    """Position of the prompt in the job's prompt order, from 0."""
    samples: list[Sample] = dataclasses.field(default_factory=list)
    """In order of `Sample.index`."""

    @property
    def oldest_version(self) -> int | None:
        """Oldest policy version that produced any token of the group; None without a response."""
        return min((span.version for sample in self.samples for span in sample.weight_versions), default=None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleGroup):
            return NotImplemented
        return (self.job_id, self.group_id, self.samples) == (other.job_id, other.group_id, other.samples)

    __hash__ = None  # type: ignore[assignment]  # mutable
