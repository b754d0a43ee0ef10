"""What a generate function of the class form gets and returns."""

from __future__ import annotations

import dataclasses
from typing import Any

from miles.rollout.sglang_rollout import GenerateState
from miles.utils.types import Sample


@dataclasses.dataclass(frozen=True)
class GenerateFnInput:
    """One sample to generate."""

    state: GenerateState
    sample: Sample
    sampling_params: dict[str, Any]
    evaluation: bool

    @property
    def args(self) -> Any:
        """All settings by name."""
        return self.state.args


@dataclasses.dataclass(frozen=True)
class GenerateFnOutput:
    """The trajectory of a sample."""

    samples: Sample | list[Sample]
