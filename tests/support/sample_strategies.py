"""Valid samples of every kind, for property tests."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from miles.types import PrefixCacheStats, Sample, SampleGroup, SampleStatus, SpeculativeStats, VersionSpan

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | finite | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)
rewards = finite | st.dictionaries(st.text(max_size=5), finite, min_size=1, max_size=3)


@st.composite
def spans(draw: st.DrawFn, length: int) -> tuple[VersionSpan, ...]:
    """Contiguous spans that cover `length` response tokens."""
    if length == 0:
        return ()
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
    edges = [0, *cuts, length]
    return tuple(VersionSpan(draw(uint64), start, end) for start, end in itertools.pairwise(edges))


@st.composite
def samples(draw: st.DrawFn, group_id: int | None = None, index: int | None = None) -> Sample:
    """Pending, partial, finished and failed samples, with any subset of the optional fields."""
    prompt_length, length = draw(st.integers(0, 6)), draw(st.integers(0, 6))

    def maybe_array(dtype: Any, shape: Any, **kwargs: Any) -> Any:
        return draw(st.none() | hnp.arrays(dtype, shape, **kwargs))

    num_tokens = prompt_length + length
    expert_shape = (max(num_tokens - 1, 0), draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    log_probs = {"elements": st.floats(-(2.0**100), 0.0, width=32)}
    cached, proposed = draw(uint64), draw(uint64)
    teacher_tokens = maybe_array(np.int32, (length, draw(st.integers(0, 3))))
    return Sample(
        group_id=draw(uint64) if group_id is None else group_id,
        index=draw(uint32) if index is None else index,
        prompt=draw(st.text(max_size=8) | st.lists(json_objects, max_size=2)),
        tokens=draw(hnp.arrays(np.int32, num_tokens, elements=st.integers(0, 2**31 - 1))),
        response_length=length,
        response=draw(st.text(max_size=8)),
        label=draw(st.none() | st.text(max_size=8)),
        reward=draw(st.none() | rewards),
        loss_mask=maybe_array(np.uint8, length, elements=st.integers(0, 1)),
        status=draw(st.sampled_from(SampleStatus)),
        metadata=draw(json_objects),
        rollout_log_probs=maybe_array(np.float32, length, **log_probs),
        rollout_routed_experts=maybe_array(draw(st.sampled_from([np.uint8, np.uint16])), expert_shape),
        weight_versions=draw(spans(length)),
        speculative=draw(st.none() | st.builds(SpeculativeStats, st.integers(0, proposed), st.just(proposed), uint64)),
        prefix_cache=draw(st.none() | st.builds(PrefixCacheStats, st.integers(0, cached), st.just(cached))),
        teacher_log_probs=maybe_array(np.float32, length, **log_probs),
        teacher_tokens=teacher_tokens,
        teacher_token_log_probs=None
        if teacher_tokens is None
        else maybe_array(np.float32, teacher_tokens.shape, **log_probs),
        remove_sample=draw(st.booleans()),
    )


@st.composite
def groups(draw: st.DrawFn) -> SampleGroup:
    """Groups of up to three samples."""
    group_id = draw(uint64)
    indices = sorted(draw(st.sets(uint32, max_size=3)))
    return SampleGroup(
        draw(st.text(max_size=8)), group_id, [draw(samples(group_id=group_id, index=index)) for index in indices]
    )
