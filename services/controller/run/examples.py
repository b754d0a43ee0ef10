"""Shows people a scored sample, cut short."""

from __future__ import annotations

from collections.abc import Sequence

from miles.rpc.gen import rollout_pb2

_TEXT_LENGTH = 160
_REWARDS = 8


def describe_example(example: rollout_pb2.ScoredExample) -> str:
    """Say which rewards a group got, and for what prompt and response."""
    rewards = f"rewards {_numbers(example.rewards)}" if example.rewards else "no reward"
    label = f", label {_cut(example.label)}" if example.label else ", no label"
    return f"{rewards} for prompt {_cut(example.prompt)}, response {_cut(example.response)}{label}"


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:_REWARDS])
    return f"{shown}, …" if len(values) > _REWARDS else shown


def _cut(text: str) -> str:
    return repr(text if len(text) <= _TEXT_LENGTH else f"…{text[-_TEXT_LENGTH:]}")  # question and answer come last
