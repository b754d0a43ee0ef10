"""`miles plan memory`: what a model takes of each GPU in a precision and a layout, from its config.json alone."""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Sequence

from miles.config.command.flags import parse_command_line
from miles.config.command.reference_page import wrapped
from miles.config.schema.faults import ConfigError, Fault
from miles.launcher.console import RunConsole, help_width
from miles.launcher.memory_plan import PRECISIONS, memory_plan
from miles.launcher.memory_table import as_json, as_text
from miles.launcher.memory_view import Estimate, estimate, warnings
from miles.launcher.program import print_error
from miles.launcher.run_plan import RunPlan
from miles.memory.low_precision import notes as precision_notes
from miles.rpc.exit_codes import ExitCode

_PRECISION = "--precision"
_BACKENDS = ("train_backend", "rollout_backend")
"""Choices that memory depends on."""
_USAGE = (
    "usage: miles plan memory --hf-checkpoint DIR|config.json [--precision NAME] [--json] [--assume-gpus N,N,...] "
    "[--config FILE] [FLAGS]",
    "Says what weights, gradients, optimizer, activations and KV caches take on each GPU of trainer and engines, and "
    "how large the whole model is in each format. Of train.py's flags it needs the model alone: layouts "
    "(--tensor-model-parallel-size, --train-backend, --colocate, ...) are those that are given.",
    f"{_PRECISION} is {', '.join(PRECISIONS)}, in place of the flags of low precision: FP8 for trainer and engines or "
    "engines alone, INT4 of routed experts (of a model without any, of every matrix of its layers), or INT4 of every "
    "matrix of its layers.",
    "Without --assume-gpus there are as many nodes of 8 GPUs with 141GB as are asked for. Exit codes are those of "
    "`miles plan`.",
)


def main(arguments: Sequence[str]) -> int:
    """Estimate and print; return the exit code."""
    words = [word for word in arguments if word != "--json"]
    console = RunConsole()
    try:
        precision, words = _precision(words)
        line = parse_command_line(words, starts_nothing=True)
        if line.help:
            console.print("\n\n".join(wrapped(paragraph, help_width()) for paragraph in _USAGE), markup=False)
            return ExitCode.OK
        with tempfile.TemporaryDirectory() as scratch:
            plan = memory_plan(line, precision, pathlib.Path(scratch))
            found = estimate(plan)
    except ConfigError as error:
        print_error(console, error)
        return ExitCode.BAD_CONFIG
    assert found is not None, "a model without a shape is refused"
    notes = _notes(plan, found)
    if "--json" in arguments:
        console.print(json.dumps(as_json(found, notes), ensure_ascii=False), markup=False)
    else:
        console.print("\n".join(as_text(found, notes)), markup=False)
    return ExitCode.OK if found.fits else ExitCode.MACHINE_UNSUITABLE


def _precision(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the value of --precision, and the words without it. Raises ConfigError."""
    left: list[str] = []
    name: str | None = None
    given = iter(words)
    for word in given:
        flag, equals, value = word.partition("=")
        if flag != _PRECISION:
            left.append(word)
            continue
        name = value if equals else next(given, "")
        if name not in PRECISIONS:
            raise ConfigError([Fault(_PRECISION, name, "there is no such precision", f"use {', '.join(PRECISIONS)}")])
    return name, left


def _notes(plan: RunPlan, found: Estimate) -> list[str]:
    return [
        *(text for text in plan.chosen if text.startswith(_BACKENDS)),
        *(f"note: {note}" for note in precision_notes(found.run)),
        *(f"warning: {text}" for text in warnings(found)),
        *(f"before it can run: {fault}" for fault in plan.missing),
    ]
