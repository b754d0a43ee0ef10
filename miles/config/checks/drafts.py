"""Checks of the folder of a draft model, and of the device that it is trained on."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import Any

from miles.config.checks.architecture.hf_config import HfConfig
from miles.config.checks.device import visible_gpus
from miles.config.checks.json_file import read_json_object
from miles.config.checks.teacher_tokens import why_other_tokens
from miles.config.schema.faults import Fault, RunFault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.speculation import DraftKind, speculation_of
from miles.drafts.folders import initial_dir
from miles.drafts.recorded_layers import aux_layers

_KEY = "sglang_speculative_draft_model_path"
_FEWEST_LAYERS = 2
"""Of which a head reads hidden states."""
_WEIGHTS = ("*.safetensors", "*.bin")


def draft_model_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield what speaks against the folder of the draft model, as a draft for the policy."""
    speculation = speculation_of(s.sglang_args)
    path = speculation.draft_model_path
    policy = read_json_object(pathlib.Path(str(s.hf_checkpoint)) / "config.json")
    if path is None or not speculation.has_weights:
        return
    if path == str(initial_dir(pathlib.Path(s.run_dir))):
        yield from _new_head_faults(HfConfig(policy))
        return
    folder = pathlib.Path(path)
    if not folder.is_dir():
        remedy = "give a folder with a Hugging Face checkpoint"
        if speculation.kind is DraftKind.EAGLE3:
            remedy += ", or leave it out and set enable_draft_training, which begins a head from nothing"
        yield Fault(_KEY, path, "there is no such folder", remedy)
        return
    if not (config := read_json_object(folder / "config.json")):
        yield Fault(_KEY, path, "config.json is missing in it, or no JSON object", "give a complete draft model")
        return
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        yield RunFault(_KEY, path, "there are no weights in it (*.safetensors)", "give a complete draft model")
    if speculation.kind is DraftKind.STANDALONE:
        if (why := why_other_tokens(str(s.hf_checkpoint), path)) is not None:
            yield Fault(_KEY, path, why, "give a draft model with the tokenizer of hf_checkpoint")
    elif policy:
        yield from _head_faults(s, path, HfConfig(config), HfConfig(policy))


def draft_device_faults(s: FlatSettings) -> Iterator[Fault]:
    """Yield a fault for a device that this machine has not."""
    device = s.draft_train_device
    if s.enable_draft_training and (match := re.fullmatch(r"cuda(?::(\d+))?", device)):
        present = visible_gpus()
        if int(match[1] or 0) >= present:
            problem = f"this machine has {present} GPUs to use, numbered from 0"
            yield Fault("draft_train_device", device, problem, "name another one, or leave it out")


def _new_head_faults(policy: HfConfig) -> Iterator[Fault]:
    """Whether a head from nothing has enough of the policy's layers to read."""
    layers: Any = policy.value("num_hidden_layers")
    if isinstance(layers, int) and len(aux_layers(None, layers)) < _FEWEST_LAYERS:
        problem = f"the policy's {layers} layers are too few for a head to read the hidden states between them"
        yield Fault("enable_draft_training", True, problem, "train a small draft model instead (STANDALONE)")


def _head_faults(s: FlatSettings, path: str, head: HfConfig, policy: HfConfig) -> Iterator[Fault]:
    """Whether an EAGLE head is one for the policy."""
    remedy = "give a head that was trained for the policy"
    sizes: tuple[tuple[tuple[str, ...], str], ...] = (
        (("target_hidden_size", "hidden_size"), "hidden_size"),
        (("vocab_size",), "vocab_size"),
    )
    for names, of_policy in sizes:
        own, wanted = head.given(*names), policy.find(of_policy)
        if own is not None and wanted is not None and own[1] != wanted[1]:
            yield Fault(_KEY, path, f"its {own[0]} is {own[1]}, and the policy's {of_policy} {wanted[1]}", remedy)
            return
    layers: Any = policy.value("num_hidden_layers")
    if speculation_of(s.sglang_args).kind is DraftKind.EAGLE3 and isinstance(layers, int):
        try:
            aux_layers(path, layers)
        except ValueError as error:
            yield Fault(_KEY, path, str(error), remedy)
