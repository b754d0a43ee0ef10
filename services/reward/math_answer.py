"""The reward `math`: whether math-verify finds the response's answer equal to the label."""

from __future__ import annotations

import threading

from math_verify import parse, verify

from miles.services.reward.label import label_of
from miles.types import Sample

_TIMEOUT_S = 5


def math_answer(sample: Sample) -> float:
    """1.0 if the answer that math-verify finds in the response equals the label's, else 0.0.

    An answer that cannot be parsed, or takes math-verify longer than 5 s, scores 0.0. The label is LaTeX, with or
    without dollar signs, or a plain expression; `ValueError` when math-verify finds none in it.
    """
    # math-verify's own timeouts use signals, which only the main thread may set; elsewhere the pool's deadline holds.
    timeout_s = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    label = label_of(sample)
    bare = "$" not in label and "\\boxed" not in label
    wanted = parse(f"${label}$" if bare else label, parsing_timeout=timeout_s)
    if not wanted:
        raise ValueError(f"math-verify finds no expression in the label {label!r:.200}")
    found = parse(sample.response, parsing_timeout=timeout_s)
    return float(verify(wanted, found, timeout_seconds=timeout_s))
