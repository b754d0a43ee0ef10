"""From what a generate function returned to a sample: checked, with a weight version for each token (pure)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.extensions.loading import ExtensionError
from miles.extensions.samples import metadata_of
from miles.services.rollout.engines.base import SamplingParams
from miles.services.rollout.functions.calls import MadeCall
from miles.types import Sample, SampleStatus, VersionSpan, failed
from miles.utils import types as users

_STATUS = {
    users.Sample.Status.PENDING: SampleStatus.COMPLETED,
    users.Sample.Status.COMPLETED: SampleStatus.COMPLETED,
    users.Sample.Status.TRUNCATED: SampleStatus.TRUNCATED,
}


def finished_sample(
    leased: Sample, returned: Any, calls: Sequence[MadeCall], *, trained_as: SamplingParams | None, version: int
) -> Sample:
    """Return the leased sample with the trajectory that its function returned.

    A sample that the function gave up (ABORTED or FAILED), or without a response, is FAILED and never trained on.

    Args:
        leased: the sample before the function was called.
        returned: what the function returned: a sample, or a list with one.
        calls: its requests to the engine.
        trained_as: how tokens that are trained on must have been drawn; None for an evaluation.
        version: the weight version of a trajectory without any request.

    Raises ExtensionError that names the field when parts of the trajectory do not fit each other.
    """
    seen = _one_sample(returned)
    tokens = _array(seen.tokens, np.int32, "tokens")
    length = seen.response_length
    if not isinstance(length, int) or not 0 <= length < max(len(tokens), 1):
        raise ExtensionError(
            f"response_length is {length!r} of {len(tokens)} tokens; tokens are the prompt and the response"
        )
    if seen.status not in _STATUS or not length:
        why = f"its function returned it as {seen.status.name}" if seen.status not in _STATUS else "it has no response"
        reason = seen.metadata.get("abort_reason") or why
        return failed(dataclasses.replace(leased, metadata=metadata_of(seen)), str(reason))
    mask = None if seen.loss_mask is None else _array(seen.loss_mask, np.uint8, "loss_mask", length)
    trained = np.ones(length, bool) if mask is None else mask.astype(bool)
    drawn = Drawn(tokens, length, calls)
    if trained_as is not None:
        drawn.check_sampling(trained, trained_as)
    return dataclasses.replace(
        leased,
        tokens=tokens,
        response_length=length,
        response=seen.response,
        loss_mask=mask,
        status=_STATUS[seen.status],
        reward=seen.reward,
        metadata=metadata_of(seen),
        rollout_log_probs=_log_probs(seen, length, drawn, trained),
        weight_versions=drawn.spans(version),
        remove_sample=bool(seen.remove_sample),
    )


class Drawn:
    """Which request drew which response token of a trajectory."""

    def __init__(self, tokens: npt.NDArray[np.int32], length: int, calls: Sequence[MadeCall]) -> None:
        self._calls = calls
        self._of = np.full(length, -1, np.int64)
        """The call of each response token, by its place in `calls`; -1 for those of no call."""
        self.log_probs = np.zeros(length, np.float32)
        self._versions = np.full(length, -1, np.int64)
        prompt = len(tokens) - length
        after = prompt
        for number, call in enumerate(calls):
            output = np.asarray(call.token_ids, np.int32)
            start, count = _place(tokens, call.input_ids, output, after)
            first = max(start, prompt)
            if start + count <= first:
                continue
            part, of_call = slice(first - prompt, start + count - prompt), slice(first - start, count)
            self._of[part] = number
            self.log_probs[part] = np.asarray(call.log_probs, np.float32)[of_call]
            versions = np.concatenate([np.full(s.end - s.start, s.version) for s in call.weight_versions])
            self._versions[part] = versions[of_call]
            after = start + count

    def check_sampling(self, trained: npt.NDArray[np.bool_], wanted: SamplingParams) -> None:
        """Raise ExtensionError when a token that is trained on was drawn from another distribution."""
        for number, call in enumerate(self._calls):
            sampling = call.sampling
            how = (sampling.temperature, sampling.top_p, sampling.top_k)
            if how != (wanted.temperature, 1.0, -1) and bool((trained & (self._of == number)).any()):
                temperature, top_p, top_k = how
                raise ExtensionError(
                    f"tokens with loss mask 1 were drawn at temperature {temperature:g}, top_p {top_p:g} and top_k "
                    f"{top_k}, but are trained on at {wanted.temperature:g}, 1 and -1; pass the sampling_params that "
                    "the function gets, or give those tokens loss mask 0"
                )

    def covers(self, trained: npt.NDArray[np.bool_]) -> bool:
        """Return whether a request drew every token that is trained on."""
        return bool((self._of[trained] >= 0).all())

    def spans(self, version: int) -> tuple[VersionSpan, ...]:
        """Return the weight versions of the response.

        Tokens of no call count as of the token before; those that no call accounts for at all, as of the oldest version
        that was asked. `version` counts without any call. No version comes after a later one.
        """
        asked = [span.version for call in self._calls for span in call.weight_versions]
        versions, last = self._versions.copy(), min(asked, default=version)
        for i in range(len(versions)):
            last = versions[i] = versions[i] if versions[i] >= 0 else last
        versions = np.minimum.accumulate(versions[::-1])[::-1]
        starts = [0, *(np.flatnonzero(np.diff(versions)) + 1).tolist()]
        ends = [*starts[1:], len(versions)]
        return tuple(VersionSpan(int(versions[start]), start, end) for start, end in zip(starts, ends, strict=True))


def _place(
    tokens: npt.NDArray[np.int32], input_ids: Sequence[int], output: npt.NDArray[np.int32], after: int
) -> tuple[int, int]:
    """Return where a call's output begins among the tokens, and how much of it is there; a count of 0 for nowhere."""
    start = len(input_ids)
    if start <= len(tokens) and np.array_equal(tokens[:start], np.asarray(input_ids, np.int32)):
        same = tokens[start : start + len(output)]
        differ = np.flatnonzero(same != output[: len(same)])
        return start, int(differ[0]) if len(differ) else len(same)
    for wanted in (output, output[:-1]):  # functions may leave out the token that ended a turn
        if len(wanted):
            candidates = np.flatnonzero(tokens[after:] == wanted[0]) + after
            for at in candidates.tolist():
                if np.array_equal(tokens[at : at + len(wanted)], wanted):
                    return at, len(wanted)
    return 0, 0


def _one_sample(returned: Any) -> users.Sample:
    if isinstance(returned, list | tuple) and len(returned) == 1:
        returned = returned[0]
    if isinstance(returned, list | tuple):
        raise ExtensionError(
            f"it returned {len(returned)} samples; each sample of a group is one trajectory here: return one, or join "
            "them with loss mask 0 where nothing is trained on"
        )
    if not isinstance(returned, users.Sample):
        kind = f"{type(returned).__module__}.{type(returned).__qualname__}"
        raise ExtensionError(f"it returned a {kind}; return the Sample (of miles.utils.types) that it got")
    return returned


def _log_probs(
    seen: users.Sample, length: int, drawn: Drawn, trained: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32] | None:
    """Return the log-probs that the function returned, else those of its requests if they drew all that is trained."""
    if seen.rollout_log_probs is not None:
        return _array(seen.rollout_log_probs, np.float32, "rollout_log_probs", length)
    return drawn.log_probs if drawn.covers(trained) else None


def _array(values: Any, dtype: Any, name: str, length: int | None = None) -> npt.NDArray[Any]:
    try:
        found = np.asarray(values, np.float64 if dtype is np.float32 else np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ExtensionError(f"{name} is no list of numbers: {error}") from error
    if found.ndim != 1 or (length is not None and len(found) != length):
        raise ExtensionError(f"{name} has shape {found.shape}, but response_length is {length}")
    if not np.isfinite(found).all():
        raise ExtensionError(f"{name} has a value that is not finite")
    if dtype is np.uint8 and ((found != 0) & (found != 1)).any():
        raise ExtensionError(f"{name} has another value than 0 and 1")
    return found.astype(dtype)
