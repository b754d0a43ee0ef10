"""Samples and groups as plain Python: dataclasses over numpy arrays.

Importing this package needs only numpy; `convert` and `wire` add protobuf. Start at `sample`.
"""

from miles.types.errors import MalformedMessage
from miles.types.experts import expert_dtype, narrow_experts
from miles.types.faults import SampleFault, sample_faults
from miles.types.rewards import RewardKeyError, reward_number
from miles.types.sample import (
    Message,
    PrefixCacheStats,
    Prompt,
    Reward,
    Sample,
    SampleGroup,
    SampleStatus,
    SpeculativeStats,
    VersionSpan,
    failed,
)
from miles.types.validate import check_group, check_sample

__all__ = [
    "MalformedMessage",
    "Message",
    "PrefixCacheStats",
    "Prompt",
    "Reward",
    "RewardKeyError",
    "Sample",
    "SampleFault",
    "SampleGroup",
    "SampleStatus",
    "SpeculativeStats",
    "VersionSpan",
    "check_group",
    "check_sample",
    "expert_dtype",
    "failed",
    "narrow_experts",
    "reward_number",
    "sample_faults",
]
