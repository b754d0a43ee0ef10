"""What an estimate of a run in low precision leaves out, in words."""

from __future__ import annotations

from collections.abc import Iterator

from miles.memory.run import Run


def precision_notes(run: Run) -> Iterator[str]:
    """Yield a sentence for each figure of the run that is a bound."""
    if run.training is not None and run.training.rounds_inputs:
        yield "activations are counted as in 16 bits, an upper bound: inputs of matrices are kept in FP8 where kernels do"
