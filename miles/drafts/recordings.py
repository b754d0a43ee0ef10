"""Recordings of training steps, as the draft trainer reads them. How they are written: `recording_files.py`.

Dims: S samples, T tokens of a sample, R of them its response, N rows of a part, D hidden size, K likeliest tokens.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.drafts import recording_files as files
from miles.drafts.recording import RecordedSample

if TYPE_CHECKING:
    import torch

    from miles.config import JobConfig


class RecordingGone(FileNotFoundError):
    """A recording was removed, as only the newest are kept."""


class RecordingDamaged(ValueError):
    """A recording cannot be read; the message says why."""


def root_of(config: JobConfig, run_dir: pathlib.Path) -> pathlib.Path:
    """The folder of a job's recordings. Jobs may share one that is given, so theirs have their run folders' names."""
    folder = config.drafts.draft_recordings_dir
    if folder is None:
        return run_dir / "drafts" / "recordings"
    return pathlib.Path(folder) / run_dir.absolute().name


def steps(root: pathlib.Path) -> list[int]:
    """Training steps with a complete recording, ascending; none while there is no folder."""
    if not root.is_dir():
        return []
    return sorted(step for path in root.iterdir() if (step := files.step_of(path)) is not None)


def read(root: pathlib.Path, step: int) -> list[RecordedSample]:
    """The samples of a step, on the CPU, without those that have values that are not finite.

    Raises RecordingGone when it is not there any more, and RecordingDamaged when it lacks something.
    """
    folder = files.step_folder(root, step)
    try:
        return [sample for sample in _read(folder) if _is_finite(sample)]
    except Exception as error:
        if not folder.is_dir():
            raise RecordingGone(f"the recording of step {step} in {root} was removed") from error
        if isinstance(error, RecordingDamaged):
            raise
        raise RecordingDamaged(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def _read(folder: pathlib.Path) -> Iterator[RecordedSample]:
    import torch

    found, metadata = _load(folder / files.SAMPLES)
    facts = files.facts_of(metadata)
    lengths = found["lengths"].tolist()
    prompts = found["prompt_lengths"].tolist()
    responses = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
    hidden = _Joined(folder, "rows", [length - 1 for length in lengths])
    top = _Joined(folder, "response positions", responses)
    for name in facts.parts:
        tensors, _ = _load(folder / name)
        if len(tensors["rows"]):
            layers = {key.removeprefix("hidden."): each for key, each in tensors.items() if key.startswith("hidden.")}
            hidden.add(name, tensors["rows"], layers)
        if len(tensors["top_rows"]):
            top.add(name, tensors["top_rows"], {key: tensors[key] for key in ("top_tokens", "top_log_probs")})
    hidden_by_layer = {layer: hidden.samples(str(layer)) for layer in facts.layers}
    tokens, log_probs = top.samples("top_tokens"), top.samples("top_log_probs")
    own_tokens = torch.split(found["tokens"].long(), lengths)
    masks = torch.split(found["loss_mask"].bool(), responses)
    for number, prompt in enumerate(prompts):
        yield RecordedSample(
            tokens_T=own_tokens[number],
            prompt_length=prompt,
            hidden_TD={layer: rows[number] for layer, rows in hidden_by_layer.items()},
            top_tokens_RK=tokens[number].long(),
            top_log_probs_RK=log_probs[number],
            loss_mask_R=masks[number],
        )


class _Joined:
    """Rows of all samples, put together from parts."""

    def __init__(self, folder: pathlib.Path, what: str, lengths: Sequence[int]) -> None:
        import torch

        self._folder = folder
        self._what = what
        self._lengths = torch.tensor(lengths)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._values: dict[str, torch.Tensor] = {}
        self._present: dict[str, torch.Tensor] = {}

    def add(self, name: str, rows_N2: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Put in rows [N, X] of some kinds of numbers."""
        import torch

        sample_N, position_N = rows_N2.long().unbind(1)
        inside_N = (sample_N >= 0) & (sample_N < len(self._lengths)) & (position_N >= 0)
        if not bool(inside_N.all()) or not bool((position_N < self._lengths[sample_N]).all()):
            raise RecordingDamaged(f"{self._folder / name} has {self._what} of samples that are not there")
        where_N = self._starts[sample_N] + position_N
        for kind, value_NX in values.items():
            if kind not in self._values:
                total = int(self._lengths.sum())
                self._values[kind] = value_NX.new_empty(total, *value_NX.shape[1:])
                self._present[kind] = torch.zeros(total, dtype=torch.bool)
            self._values[kind][where_N] = value_NX
            self._present[kind][where_N] = True

    def samples(self, kind: str) -> Sequence[torch.Tensor]:
        """The rows of each sample."""
        import torch

        present = self._present.get(kind)
        total = int(self._lengths.sum())
        if present is None or not bool(present.all()):
            count = 0 if present is None else int(present.sum())
            raise RecordingDamaged(f"{self._folder} has {count} of {total} {self._what} of {kind}")
        return torch.split(self._values[kind], self._lengths.tolist())


def _load(path: pathlib.Path) -> tuple[dict[str, torch.Tensor], Mapping[str, Any] | None]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def _is_finite(sample: RecordedSample) -> bool:
    """Likeliest tokens that a small vocabulary lacks have the log-probability −inf."""
    return all(map(_all_finite, (*sample.hidden_TD.values(), sample.top_log_probs_RK[:, :1])))


def _all_finite(values: torch.Tensor) -> bool:
    """By the smallest and the largest, which are NaN where one is: a tenth of the time of looking at each by itself."""
    return not values.numel() or all(math.isfinite(bound) for bound in map(float, values.aminmax()))
