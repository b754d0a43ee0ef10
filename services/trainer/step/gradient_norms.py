"""Gradient norms in files, to compare two runs: a small number that tells whether they have the same gradients."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from miles.config.sections.debug import DebugConfig

_TOLERANCE = 0.03
"""Relative, and absolute: layouts of parallel ranks add numbers in other orders."""


@dataclasses.dataclass(frozen=True, slots=True)
class GradientNorm:
    """The norm of one optimizer step's gradient, before clipping."""

    role: str
    """actor or critic."""
    step: int
    """Number of the optimizer step in its rollout, from 0."""
    value: float


class GradientNormError(RuntimeError):
    """A gradient norm is another one than in the file."""


def save_and_compare(config: DebugConfig, rollout_id: int, norms: Sequence[GradientNorm]) -> None:
    """Write the norms of a rollout, and compare them with those of another run, as the configuration asks.

    Raises GradientNormError, and OSError or ValueError for a file that cannot be used.
    """
    for norm in norms:
        names = {"role": norm.role, "rollout_id": rollout_id, "step_id": norm.step}
        if config.ci_load_grad_norm is not None:
            path = pathlib.Path(config.ci_load_grad_norm.format(**names))
            _compare(path, norm, rollout_id)
        if config.ci_save_grad_norm is not None:
            path = pathlib.Path(config.ci_save_grad_norm.format(**names))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(norm.value, path)


def _compare(path: pathlib.Path, norm: GradientNorm, rollout_id: int) -> None:
    try:
        expected = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken file can make it raise anything
        raise ValueError(f"ci_load_grad_norm: {path} is no file that torch.save wrote of a number") from error
    if not isinstance(expected, int | float):
        raise ValueError(f"ci_load_grad_norm: {path} holds a {type(expected).__name__} instead of a number")
    if not math.isclose(norm.value, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        raise GradientNormError(
            f"the {norm.role}'s gradient norm in optimizer step {norm.step} of rollout {rollout_id} is "
            f"{norm.value:.6g}, and {expected:.6g} in {path}: the runs differ by more than {_TOLERANCE:.0%}"
        )
