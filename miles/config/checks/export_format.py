"""Checks whether exports in Hugging Face format can be written in the form that is asked for."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from miles.config.checks.json_file import read_json_object
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.precision.of_run import recipes_of
from miles.precision.quantization_config import quantization_config


def export_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for exports in the engines' format where they have none, or one that folders do not have."""
    if s.save_hf_format != "rollout":
        return
    recipes = recipes_of(s, read_json_object(pathlib.Path(s.hf_checkpoint or "") / "config.json"))
    if recipes is None:
        return  # another check reports it
    if recipes.served is None:
        problem = "the engines' weights are not quantised"
        yield Fault("save_hf_format", "rollout", problem, "leave it out, or set rollout_weight_format")
        return
    try:
        quantization_config(recipes.served, ())
    except ValueError as error:
        yield Fault("save_hf_format", "rollout", str(error), "leave it out")
