"""TensorBoard event files."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping


class TensorBoardTracker:
    """Writes scalars with the step as their axis."""

    def __init__(self, folder: pathlib.Path) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(folder))

    def write(self, step: int, unix_s: float, values: Mapping[str, float]) -> None:
        """Write metrics of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
