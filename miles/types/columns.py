"""The samples of a group as `SampleColumns`, which are written and read several times faster than one message a sample.

Nothing is checked here: `wire` checks what is written, and by the checksum that nothing else is read.
"""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from miles.rpc.gen import sample_pb2 as pb
from miles.types.convert import STATUS_FROM_PROTO, STATUS_TO_PROTO, json_from_text, json_to_text
from miles.types.errors import prefixed
from miles.types.sample import PrefixCacheStats, Prompt, Reward, Sample, SpeculativeStats, VersionSpan

_T = TypeVar("_T")

LABEL, METADATA, CHAT_PROMPT, REWARD, NAMED_REWARDS, SPECULATIVE, PREFIX_CACHE, REMOVED = (1 << bit for bit in range(8))
LOG_PROBS, TEACHER_LOG_PROBS, LOSS_MASK, EXPERTS, WIDE_EXPERTS = (1 << bit for bit in range(8, 13))
TEACHER_TOKENS, TEACHER_TOKEN_LOG_PROBS = (1 << bit for bit in range(13, 15))
"""What a sample has, as `SampleColumns.has` says it: REMOVED is remove_sample, WIDE_EXPERTS are of two bytes."""

_LITTLE_ENDIAN = sys.byteorder == "little"
_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")
_UINT8, _UINT16 = np.dtype("<u1"), np.dtype("<u2")


def columns_of(samples: Sequence[Sample]) -> pb.SampleColumns:
    """Encode everything of checked samples but their arrays. MalformedMessage for what JSON cannot represent."""
    named = [pb.NamedRewards(values=s.reward) for s in samples if isinstance(s.reward, dict)]
    spans = [span for sample in samples for span in sample.weight_versions]
    experts = [sample.rollout_routed_experts for sample in samples]
    speculative = [sample.speculative for sample in samples if sample.speculative is not None]
    caches = [sample.prefix_cache for sample in samples if sample.prefix_cache is not None]
    return pb.SampleColumns(
        index=[sample.index for sample in samples],
        tokens=[len(sample.tokens) for sample in samples],
        response_length=[sample.response_length for sample in samples],
        status=[STATUS_TO_PROTO[sample.status] for sample in samples],
        has=[_has(sample) for sample in samples],
        prompt=_once([_prompt_text(i, sample.prompt) for i, sample in enumerate(samples)]),
        response=[sample.response for sample in samples],
        label=_once([sample.label for sample in samples if sample.label is not None]),
        metadata_json=_once([_json(i, s.metadata, "metadata") for i, s in enumerate(samples) if s.metadata]),
        reward=[s.reward for s in samples if s.reward is not None and not isinstance(s.reward, dict)],
        named_rewards=named,
        spans=[len(sample.weight_versions) for sample in samples],
        span_version=[span.version for span in spans],
        span_end=[span.end for span in spans],
        experts=[size for array in experts if array is not None for size in array.shape[1:]],
        speculative=[
            n for s in speculative for n in (s.accepted_draft_tokens, s.proposed_draft_tokens, s.verify_count)
        ],
        prefix_cache=[number for stats in caches for number in (stats.cached_tokens, stats.prompt_tokens)],
        teacher_places=[s.teacher_tokens.shape[1] for s in samples if s.teacher_tokens is not None],
    )


def arrays_of(samples: Sequence[Sample]) -> list[npt.NDArray[Any]]:
    """Return the arrays of samples in the order of `SampleGroup.arrays`, as they lie there."""
    arrays: list[npt.NDArray[Any]] = [sample.tokens for sample in samples]
    for column in (
        [sample.rollout_log_probs for sample in samples],
        [sample.teacher_log_probs for sample in samples],
        [sample.teacher_tokens for sample in samples],
        [sample.teacher_token_log_probs for sample in samples],
        [sample.rollout_routed_experts for sample in samples],
        [sample.loss_mask for sample in samples],
    ):
        arrays += [array for array in column if array is not None]
    return [
        array if _LITTLE_ENDIAN and array.flags.c_contiguous else array.astype(array.dtype.newbyteorder("<"), order="C")
        for array in arrays
    ]


def samples_from(group_id: int, columns: pb.SampleColumns, data: memoryview) -> list[Sample]:
    """Decode samples from columns and arrays that `columns_of` and `arrays_of` made. Arrays are read-only."""
    of, arrays = _Optional(columns.has[:]), _Arrays(data)
    counts, lengths = columns.tokens[:], columns.response_length[:]
    spans = zip(columns.span_version[:], columns.span_end[:], strict=True)
    rows = zip(
        columns.index[:],
        _prompts(of, columns.prompt),
        lengths,
        columns.response[:],
        of.column(LABEL, _each(columns.label)),
        _rewards(of, columns),
        columns.status[:],
        of.column(METADATA, _each(columns.metadata_json)),
        columns.spans[:],
        of.column(SPECULATIVE, [SpeculativeStats(*three) for three in _tuples(columns.speculative, 3)]),
        of.column(PREFIX_CACHE, [PrefixCacheStats(*two) for two in _tuples(columns.prefix_cache, 2)]),
        of.column(REMOVED, itertools.repeat(True)),
        # In the order in which they lie in the data.
        arrays.take(_INT32, counts),
        of.column(LOG_PROBS, arrays.take(_FLOAT32, of.those_with(LOG_PROBS, lengths))),
        of.column(TEACHER_LOG_PROBS, arrays.take(_FLOAT32, of.those_with(TEACHER_LOG_PROBS, lengths))),
        of.column(TEACHER_TOKENS, _sets(of, TEACHER_TOKENS, arrays, _INT32, lengths, columns.teacher_places)),
        of.column(
            TEACHER_TOKEN_LOG_PROBS,
            _sets(of, TEACHER_TOKEN_LOG_PROBS, arrays, _FLOAT32, lengths, columns.teacher_places),
        ),
        of.column(EXPERTS, _experts(of, arrays, counts, columns.experts)),
        of.column(LOSS_MASK, arrays.take(_UINT8, of.those_with(LOSS_MASK, lengths))),
        strict=False,  # some repeat without end
    )
    return [
        Sample(
            group_id=group_id,
            index=index,
            prompt=prompt,
            tokens=tokens,
            response_length=length,
            response=response,
            label=label,
            reward=reward,
            loss_mask=mask,
            status=STATUS_FROM_PROTO[status],
            metadata={} if metadata is None else json_from_text(metadata, "metadata"),
            rollout_log_probs=log_probs,
            rollout_routed_experts=experts,
            weight_versions=_take_spans(spans, count),
            speculative=speculative,
            prefix_cache=cache,
            teacher_log_probs=teacher,
            teacher_tokens=teacher_tokens,
            teacher_token_log_probs=teacher_sets,
            remove_sample=removed is not None,
        )
        for index, prompt, length, response, label, reward, status, metadata, count, speculative, cache, removed,
            tokens, log_probs, teacher, teacher_tokens, teacher_sets, experts, mask in rows
    ]  # fmt: skip


class _Optional:
    """Spreads what only some samples have over all of them."""

    def __init__(self, has: Sequence[int]) -> None:
        self.has = has
        self._some = functools.reduce(operator.or_, has, 0)
        self._every = functools.reduce(operator.and_, has, self._some)

    def some(self, flag: int) -> bool:
        """Return whether any sample has it."""
        return bool(self._some & flag)

    def column(self, flag: int, values: Iterable[_T]) -> Iterable[_T | None]:
        """One entry a sample: the next value for each that has it, None for the others."""
        if not self._some & flag:
            return itertools.repeat(None)
        if self._every & flag:
            return values
        each = iter(values)
        return [next(each) if has & flag else None for has in self.has]

    def those_with(self, flag: int, values: Sequence[_T]) -> Sequence[_T]:
        """Of one value a sample those of the samples that have something."""
        if not self._some & flag:
            return ()
        return [value for has, value in zip(self.has, values, strict=True) if has & flag]


class _Arrays:
    """Takes arrays from the bytes of all of them, one after the other."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, dtype: np.dtype[Any], lengths: Sequence[int]) -> list[npt.NDArray[Any]]:
        """Take one-dimensional arrays: views of one copy, which begins at an aligned address."""
        if not lengths:
            return []
        joined = np.frombuffer(bytes(self._next(sum(lengths) * dtype.itemsize)), dtype)
        ends = itertools.accumulate(lengths)
        return [joined[end - length : end] for length, end in zip(lengths, ends, strict=True)]

    def take_experts(self, dtype: np.dtype[Any], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
        """Take an array of up to megabytes: a view of the data where its address allows it."""
        data = self._next(shape[0] * shape[1] * shape[2] * dtype.itemsize)
        array = np.frombuffer(data, dtype)
        return (array if array.flags.aligned else np.frombuffer(bytes(data), dtype)).reshape(shape)

    def _next(self, nbytes: int) -> memoryview:
        begin, self._at = self._at, self._at + nbytes
        return self._data[begin : self._at]


def _prompts(of: _Optional, texts: Sequence[str]) -> Iterable[Prompt]:
    each = _each(texts)
    if not of.some(CHAT_PROMPT):
        return each
    return [json_from_text(next(each), "prompt") if has & CHAT_PROMPT else next(each) for has in of.has]


def _rewards(of: _Optional, columns: pb.SampleColumns) -> Iterable[Reward | None]:
    if not of.some(NAMED_REWARDS):
        return of.column(REWARD, columns.reward[:])
    named = of.column(NAMED_REWARDS, [dict(rewards.values) for rewards in columns.named_rewards])
    single = of.column(REWARD, columns.reward[:])
    return [one if many is None else many for one, many in zip(single, named, strict=False)]


def _experts(of: _Optional, arrays: _Arrays, counts: Sequence[int], sizes: Sequence[int]) -> list[npt.NDArray[Any]]:
    if not of.some(EXPERTS):
        return []
    forms = zip(of.those_with(EXPERTS, of.has), of.those_with(EXPERTS, counts), _tuples(sizes, 2), strict=True)
    return [
        arrays.take_experts(_UINT16 if has & WIDE_EXPERTS else _UINT8, (max(count - 1, 0), layers, top_k))
        for has, count, (layers, top_k) in forms
    ]


def _sets(
    of: _Optional, flag: int, arrays: _Arrays, dtype: np.dtype[Any], lengths: Sequence[int], places: Sequence[int]
) -> list[npt.NDArray[Any]]:
    """Take the arrays of shape (response_length, places) of those that have one."""
    if not of.some(flag):
        return []
    width = iter(places[:])
    widths = [next(width) if has & TEACHER_TOKENS else 0 for has in of.has]
    sizes = list(zip(of.those_with(flag, lengths), of.those_with(flag, widths), strict=True))
    taken = arrays.take(dtype, [length * wide for length, wide in sizes])
    return [array.reshape(size) for array, size in zip(taken, sizes, strict=True)]


def _has(sample: Sample) -> int:
    """Return what a sample has, as a sum of the numbers above."""
    has = REMOVED if sample.remove_sample else 0
    if sample.label is not None:
        has |= LABEL
    if sample.metadata:
        has |= METADATA
    if not isinstance(sample.prompt, str):
        has |= CHAT_PROMPT
    if sample.reward is not None:
        has |= NAMED_REWARDS if isinstance(sample.reward, dict) else REWARD
    if sample.speculative is not None:
        has |= SPECULATIVE
    if sample.prefix_cache is not None:
        has |= PREFIX_CACHE
    if sample.rollout_log_probs is not None:
        has |= LOG_PROBS
    if sample.teacher_log_probs is not None:
        has |= TEACHER_LOG_PROBS
    if sample.teacher_tokens is not None:
        has |= TEACHER_TOKENS
    if sample.teacher_token_log_probs is not None:
        has |= TEACHER_TOKEN_LOG_PROBS
    if sample.loss_mask is not None:
        has |= LOSS_MASK
    if sample.rollout_routed_experts is not None:
        has |= EXPERTS | (WIDE_EXPERTS if sample.rollout_routed_experts.itemsize > 1 else 0)
    return has


def _prompt_text(i: int, prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else _json(i, prompt, "prompt")


def _json(i: int, value: Any, field: str) -> str:
    with prefixed(f"samples[{i}]."):
        return json_to_text(value, field)


def _once(texts: list[str]) -> list[str]:
    """Leave out repetitions when all texts are the same."""
    return texts[:1] if texts and texts.count(texts[0]) == len(texts) else texts


def _each(texts: Sequence[str]) -> Iterator[str]:
    """Repeat a single text for every sample."""
    return itertools.repeat(texts[0]) if len(texts) == 1 else iter(texts[:])


def _tuples(numbers: Sequence[int], size: int) -> Iterable[tuple[int, ...]]:
    """Group numbers."""
    each = iter(numbers[:])
    return zip(*[each] * size, strict=True)


def _take_spans(spans: Iterator[tuple[int, int]], count: int) -> tuple[VersionSpan, ...]:
    """Take the spans of one sample, each of which begins where the one before it ends."""
    if count == 1:
        version, end = next(spans)
        return (VersionSpan(version, 0, end),)
    start = 0
    taken = []
    for version, end in itertools.islice(spans, count):
        taken.append(VersionSpan(version, start, end))
        start = end
    return tuple(taken)
