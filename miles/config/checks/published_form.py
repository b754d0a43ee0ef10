"""Checks whether a Hugging Face folder holds a text model by itself, with weights in a form that is read.

Weights in blocks of FP8 and groups of INT4 are read as they are. Text models inside of others are not;
`miles convert hf-to-hf` writes them by themselves.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from miles.config.checks.json_file import read_json_object
from miles.config.schema.faults import Fault, RunFault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.distillation import named
from miles.precision.quantization_config import UnknownQuantisation, recipe_of

_FOLDERS = ("hf_checkpoint", "ref_load", "critic_load")


def form_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for each folder in another form; nothing for one that cannot be read."""
    seen: set[str] = set()
    teachers = [("opd_teacher_load", folder) for folder in named(s.opd_teacher_load or ()).values()]
    for key, folder in (*((key, getattr(s, key)) for key in _FOLDERS), *teachers):
        if not folder or folder in seen:
            continue
        seen.add(folder)
        model = read_json_object(pathlib.Path(folder) / "config.json")
        if (problem := why_not_read(model)) is not None:
            yield RunFault(key, folder, problem, _way_out(model, folder))


def why_not_read(model: Mapping[str, Any]) -> str | None:
    """What is wrong with the form of a model with this config.json; None when nothing is."""
    try:
        recipe_of(model)
    except UnknownQuantisation as error:
        return str(error)
    text = model.get("text_config")
    if isinstance(text, Mapping):
        return (
            f"it is a {model.get('model_type')}, of which the text model ({text.get('model_type')}) is a part, and "
            "only text models are trained"
        )
    return None


def _way_out(model: Mapping[str, Any], folder: str) -> str:
    try:
        recipe_of(model)
    except UnknownQuantisation:
        return "give a folder with weights in 16 or 32 bits, in FP8 blocks of 128 x 128, or in INT4 groups"
    plain = pathlib.Path(folder).name + "-plain"
    return f"`miles convert hf-to-hf --hf-checkpoint {folder} --save {plain}` and give {plain}"
