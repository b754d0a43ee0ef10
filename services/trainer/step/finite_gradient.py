"""The error for a gradient that is not finite, the same for every backend."""

from __future__ import annotations


def not_finite(norm: float) -> FloatingPointError:
    """The error to raise, before anything has changed."""
    return FloatingPointError(
        f"the gradient's norm is {norm}; the weights were left as they were. A lower lr, a smaller clip range "
        "or train_dtype float32 may help; rewards and log-probabilities of this step are worth a look"
    )
