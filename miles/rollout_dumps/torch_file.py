"""Reads rollouts that other systems have saved with torch.save: `{"samples": [{field: value, …}, …]}`.

Fields of a sample have the names of `miles.types.Sample`; arrays may be lists, numpy arrays or tensors. Only plain
values are read: a file that needs a class to be unpickled is refused, as whoever wrote it would run code here.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.types import MalformedMessage, Sample, SampleGroup, SampleStatus, VersionSpan, narrow_experts
from miles.types.validate import check_group

_NOT_TRAINABLE = ("multimodal_inputs", "multimodal_train_inputs", "rollout_indexer_topk", "adapter")
"""Fields that change what is trained on, and that samples do not have here."""
_MOST_EXPERTS = 1 << 16
"""What 16 bits hold: the file does not say how many experts the model has."""


def read_torch_file(path: pathlib.Path, samples_per_group: int, version: int) -> list[SampleGroup]:
    """Read a file; see `files.read_rollout`."""
    found = _load(path)
    rows = found.get("samples") if isinstance(found, Mapping) else None
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path} holds no list of samples under the key samples, each with its fields by name")
    groups = []
    for number, members in enumerate(_grouped(path, rows, samples_per_group)):
        group = SampleGroup("", number)
        for index, (place, row) in enumerate(members):
            try:
                group.samples.append(_sample(row, number, index, version))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"sample {place} of {path} cannot be read: {_words(error)}") from error
        try:
            check_group(group)
        except MalformedMessage as error:
            raise ValueError(f"group {number} of {path} cannot be trained on: {error}") from error
        groups.append(group)
    return groups


def _load(path: pathlib.Path) -> Any:
    try:
        import torch
        from torch.serialization import safe_globals
    except ImportError as error:
        raise ValueError(f"{path} was written by torch.save; install torch where the controller runs") from error
    array = np.empty(0, np.int32)
    kinds = {type(np.dtype(name)) for name in ("bool", "int8", "uint8", "int16", "uint16", "int32", "int64", "float32")}
    rebuild: Any = array.__reduce__()[0]
    try:
        with safe_globals([np.ndarray, np.dtype, rebuild, *kinds]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken file can make it raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is no torch file of plain values ({reason}); save a dict of lists, numbers, texts and arrays"
        ) from error


def _grouped(
    path: pathlib.Path, rows: Sequence[Mapping[str, Any]], size: int
) -> list[list[tuple[int, Mapping[str, Any]]]]:
    """Return the samples of each group with their places: by group_index where all have one, else so many each."""
    numbered = list(enumerate(rows))
    if all(isinstance(row.get("group_index"), int) for row in rows):
        groups: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
        for place, row in numbered:
            groups.setdefault(row["group_index"], []).append((place, row))
        return list(groups.values())
    if len(rows) % size:
        raise ValueError(
            f"{path} has {len(rows)} samples without group_index, which n_samples_per_prompt = {size} does not divide; "
            "set it to that of the run that wrote them"
        )
    return [numbered[start : start + size] for start in range(0, len(rows), size)]


def _sample(row: Mapping[str, Any], group_id: int, index: int, version: int) -> Sample:
    for name in _NOT_TRAINABLE:
        if row.get(name) is not None:
            raise ValueError(f"{name} is set, and samples here have none")
    length = int(row["response_length"])
    experts = row.get("rollout_routed_experts")
    return Sample(
        group_id=group_id,
        index=index,
        prompt=row.get("prompt") or "",
        tokens=_required(row["tokens"], np.int32),
        response_length=length,
        response=row.get("response") or "",
        label=None if row.get("label") is None else _text(row["label"]),
        reward=_reward(row.get("reward")),
        loss_mask=_array(row.get("loss_mask"), np.uint8),
        status=SampleStatus(row.get("status", SampleStatus.COMPLETED.value)),
        metadata=_metadata(row.get("metadata")),
        rollout_log_probs=_array(row.get("rollout_log_probs"), np.float32),
        rollout_routed_experts=None if experts is None else narrow_experts(np.asarray(experts), _MOST_EXPERTS),
        weight_versions=(VersionSpan(version, 0, length),) if length else (),
        teacher_log_probs=_array(row.get("teacher_log_probs"), np.float32),
        remove_sample=bool(row.get("remove_sample", False)),
    )


def _array(value: Any, dtype: type[np.generic]) -> npt.NDArray[Any] | None:
    return None if value is None else _required(value, dtype)


def _required(value: Any, dtype: type[np.generic]) -> npt.NDArray[Any]:
    array = np.asarray(value)
    if array.size and not np.issubdtype(array.dtype, np.number) and array.dtype != np.bool_:
        raise ValueError(f"an array of {array.dtype} instead of numbers")
    return np.ascontiguousarray(array.astype(dtype))


def _reward(value: Any) -> float | dict[str, float] | None:
    if isinstance(value, Mapping):  # of a reward's parts, numbers alone can be trained on
        return {str(name): float(part) for name, part in value.items() if isinstance(part, int | float)}
    return None if value is None else float(value)


def _metadata(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata is not a JSON object ({error})") from error
    return plain


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _words(error: Exception) -> str:
    return f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
