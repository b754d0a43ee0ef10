"""Checks the folders that a run writes: that they are its own, and hold nothing that it reads or that others wrote."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.distillation import named
from miles.ownership.overlap import OUTPUTS, Output, outputs_of
from miles.ownership.owner_file import FolderTakenError
from miles.ownership.place import STEP, Place, locate
from miles.ownership.rules import Refusal, export_refusal, refusal

_INPUT_FOLDERS = ("hf_checkpoint", "ref_load", "critic_load", "lora_adapter_path")
_INPUT_FILES = (
    *("chat_template_path", "rollout_engine_python", "gateway_keys_file"),
    *("tls_cert", "tls_key", "tls_ca"),
)
_OWN_FOLDERS = ("checkpoints", "drafts", "logs", "mlflow", "redis", "samples", "tensorboard", "wandb", "weightsync")
"""What a run keeps in its run folder, and an export would replace."""


def output_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for each output that is not the run's to write, at most one a setting."""
    if not s.is_valid("run_dir"):
        return
    outputs = outputs_of({key: getattr(s, key) for key in OUTPUTS if s.is_valid(key)})
    inputs = list(_inputs(s))
    for output in outputs:
        value = getattr(s, output.key)
        problem = _unusable(output.place) or _reads(output, inputs) or _writes(output, outputs)
        if problem:
            yield Fault(output.key, value, problem, "choose another folder")
        elif (found := _not_own(output, s)) is not None:
            yield Fault(output.key, value, found.problem, found.remedy)


def _inputs(s: FlatSettings) -> Iterator[tuple[str, Place, bool]]:
    """Yield key and place of everything that the run reads, and whether it is a folder that must stay as it is."""
    for key in (*_INPUT_FOLDERS, "load", *_INPUT_FILES, "prompt_data"):
        if s.is_valid(key) and (path := getattr(s, key)) is not None:
            yield key, locate(path.partition("@[")[0]), key in _INPUT_FOLDERS
    for path in named(s.opd_teacher_load or ()).values() if s.is_valid("opd_teacher_load") else ():
        yield "opd_teacher_load", locate(path), True
    for path in (s.eval_prompt_data or ())[1::2] if s.is_valid("eval_prompt_data") else ():
        yield "eval_prompt_data", locate(path.partition("@[")[0]), False


def _reads(output: Output, inputs: list[tuple[str, Place, bool]]) -> str:
    """Say which input the output would write over."""
    for key, place, is_kept in inputs:
        if key == "load" and output.key != "save_hf":
            continue  # a run may go on in the folder that it loads from
        if output.place.is_same(place):
            return f"{key} is read from there"
        if is_kept and output.place.lies_in(place):
            return f"it lies in {place}, from which {key} is read"
        if output.key == "run_dir" and is_kept and place.lies_in(locate(output.place.path / "hf")):
            return f"{key} = {place} is an export in it, which the run would replace"
        if output.key == "save_hf" and place.lies_in(output.place):
            return f"{key} = {place} lies in it, and an export replaces the whole folder"
    return ""


def _writes(output: Output, outputs: list[Output]) -> str:
    """Say which other output of the run is in the way."""
    run_dir, *others = (other.place for other in outputs)
    if output.key == "run_dir":
        return ""
    kept = [locate(run_dir.path / name) for name in _OWN_FOLDERS]
    if output.key == "save":
        if run_dir.lies_in(output.place) and not run_dir.is_same(output.place):
            return f"run_dir = {run_dir} lies in it"
        inside = next((place for place in kept[1:] if output.place.lies_in(place)), None)
        return f"{inside} holds other files of the run" if inside else ""
    for place in (run_dir, *(place for place in others if place is not output.place)):
        if place.lies_in(output.place):
            return f"{place} lies in it, and an export replaces the whole folder"
    inside = next((place for place in kept if output.place.meets(place)), None)
    if inside is None and any(place is not output.place and output.place.is_same(place) for place in others):
        inside = run_dir
    return f"{inside} holds other files of the run" if inside else ""


def _unusable(place: Place) -> str:
    """Say why no folder can be made at a place."""
    path = pathlib.Path(str(place.path).replace(STEP, "0"))
    if any(len(os.fsencode(part)) > 255 for part in path.parts) or len(os.fsencode(path)) > 4000:
        return "its name is too long"
    if path == path.parent:
        return "it is the root of the file system"
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if not above.is_dir():
        return f"{above} is not a folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{above} is not writable"
    return ""


def _not_own(output: Output, s: FlatSettings) -> Refusal | None:
    run_dir, load = locate(s.run_dir).path, s.load if s.is_valid("load") else None
    try:
        if output.key == "save_hf":
            return export_refusal(s.save_hf, run_dir)
        if output.key == "save":
            return None if output.place.path == run_dir else refusal("checkpoints", output.place.path, run_dir, load)
        return refusal("run", run_dir, run_dir)
    except FolderTakenError as error:
        return Refusal(str(error), "choose another folder")
    except OSError as error:
        return Refusal(f"it cannot be read ({error.strerror})", "check its permissions, or choose another folder")
