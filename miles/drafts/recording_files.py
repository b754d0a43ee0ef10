"""The files of a recording: what was recorded in one training step, in a folder of its own.

    ROOT/step-00000012/
        samples.safetensors      all samples: tokens, lengths, loss masks; metadata say what the other files are
        part-00003.safetensors   what rank 3 has computed: rows of some layers, and likeliest tokens of some positions

Each kind of number is one tensor over all samples. Ranks write their parts into `step-00000012.partial`; when all have,
rank 0 adds the samples and gives the folder its name, so a folder of that name is complete.

Dims: S samples, T tokens and R response tokens of all of them, N rows of a part, M response positions of a part,
D hidden size, K likeliest tokens.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FORMAT = 1
SAMPLES = "samples.safetensors"
_PARTIAL = ".partial"
_DOOMED = ".deleted"
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(rf"step-\d{{8,}}({_PARTIAL}|{_DOOMED})+".replace(".", r"\."))


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """What one rank has of the samples."""

    rows_N2: torch.Tensor
    """Number of the sample and position of the token in it, int32."""
    hidden_ND: Mapping[int, torch.Tensor]
    """By layer, as in `RecordedSample.hidden_TD`."""
    top_rows_M2: torch.Tensor
    """Number of the sample and number of the response token in it, int32."""
    top_tokens_MK: torch.Tensor
    """int32."""
    top_log_probs_MK: torch.Tensor
    """float32."""


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """What all ranks know."""

    tokens_T: torch.Tensor
    """int32, sample after sample."""
    lengths_S: torch.Tensor
    """Tokens of each, int64."""
    prompt_lengths_S: torch.Tensor
    """int64."""
    loss_mask_R: torch.Tensor
    """uint8, sample after sample."""


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What the files of a recording hold."""

    step: int
    """Also the version of the policy that was recorded."""
    layers: tuple[int, ...]
    top_tokens: int
    """K."""
    parts: tuple[str, ...]
    """Names of the files of the ranks that have written some."""


def step_folder(root: pathlib.Path, step: int) -> pathlib.Path:
    """The folder of a complete recording."""
    return root / f"step-{step:08d}"


def step_of(path: pathlib.Path) -> int | None:
    """The step of a complete recording's folder; None for other names."""
    match = _NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def partial_folder(root: pathlib.Path, step: int) -> pathlib.Path:
    """The folder in which ranks write their parts."""
    complete = step_folder(root, step)
    return complete.with_name(complete.name + _PARTIAL)


def part_name(rank: int) -> str:
    """The file of a rank."""
    return f"part-{rank:05d}.safetensors"


def write_part(folder: pathlib.Path, rank: int, part: Part) -> None:
    """Write a rank's file. Raises OSError."""
    tensors = {
        "rows": part.rows_N2,
        "top_rows": part.top_rows_M2,
        "top_tokens": part.top_tokens_MK,
        "top_log_probs": part.top_log_probs_MK,
        **{f"hidden.{layer}": hidden_ND for layer, hidden_ND in part.hidden_ND.items()},
    }
    _write(folder / part_name(rank), tensors, {})


def complete(root: pathlib.Path, facts: Facts, samples: Samples) -> None:
    """Make a recording of what the ranks have written; replaces one of the same step. Raises OSError."""
    partial = partial_folder(root, facts.step)
    tensors = {
        "tokens": samples.tokens_T,
        "lengths": samples.lengths_S,
        "prompt_lengths": samples.prompt_lengths_S,
        "loss_mask": samples.loss_mask_R,
    }
    _write(partial / SAMPLES, tensors, {"recording": json.dumps({"format": FORMAT, **dataclasses.asdict(facts)})})
    discard(step_folder(root, facts.step))
    partial.rename(step_folder(root, facts.step))


def keep_newest(root: pathlib.Path, count: int) -> None:
    """Delete all complete recordings but the newest. Raises OSError."""
    for path in sorted(_complete(root), key=lambda each: step_of(each) or 0)[:-count]:
        discard(path)


def discard_from(root: pathlib.Path, step: int) -> None:
    """Delete recordings of this step and later ones, and what crashes have left. Raises OSError."""
    for path in _complete(root):
        if (step_of(path) or 0) >= step:
            discard(path)
    for path in root.glob("step-*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def discard(folder: pathlib.Path) -> None:
    """Delete a recording, which loses its name first, so that nobody takes what is left for one. Raises OSError."""
    if not folder.is_dir():
        return
    doomed = folder.with_name(folder.name + _DOOMED)
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _complete(root: pathlib.Path) -> Sequence[pathlib.Path]:
    """What is certainly a recording, and may be deleted, whatever else is in a folder that a user has given."""
    return [path for path in root.glob("step-*") if step_of(path) is not None and (path / SAMPLES).is_file()]


def _write(path: pathlib.Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:  # what the library makes of an error of the file system
        raise OSError(f"{path} cannot be written: {error}") from error


def facts_of(metadata: Mapping[str, Any] | None) -> Facts:
    """Read the metadata of `SAMPLES`. Raises ValueError for others."""
    try:
        found = json.loads((metadata or {})["recording"])
        if found.pop("format") != FORMAT:
            raise ValueError("it is of another version of this program")
        found = {**found, "layers": tuple(found["layers"]), "parts": tuple(found["parts"])}
        return Facts(**found)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its metadata are not those of a recording: {error!r}") from error
