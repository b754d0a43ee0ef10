"""The files of dumped rollouts: writing them, and reading them whatever their format.

A run writes groups as the sample queue stores them (`miles.types.stored`). Files that `torch.save` wrote are read too
when they hold plain values (`torch_file`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from miles.types import SampleGroup
from miles.types.stored import read_groups, write_groups

_ZIP = b"PK\x03\x04"
"""The first bytes of a file that `torch.save` wrote."""


def write_rollout(path: pathlib.Path, groups: Sequence[SampleGroup]) -> None:
    """Write the groups of a rollout; a file is complete or not there. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write_groups(partial, groups)
    partial.replace(path)


def read_rollout(path: pathlib.Path, samples_per_group: int, version: int) -> list[SampleGroup]:
    """Read a rollout of either format.

    Args:
        path: the file.
        samples_per_group: how many consecutive samples of a file without groups make up one.
        version: policy version that is taken to have generated samples of which the file does not say it.

    Raises OSError, and ValueError with what is wrong with the file.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            from miles.rollout_dumps.torch_file import read_torch_file

            return read_torch_file(path, samples_per_group, version)
    return list(read_groups(path))


def subsample(groups: Sequence[SampleGroup], share: float) -> list[SampleGroup]:
    """Return that share of the groups, rounded down: half of them from the beginning, half from the end."""
    count = int(len(groups) * share)
    first = count // 2
    return [*groups[:first], *groups[len(groups) - (count - first) :]] if count else []
