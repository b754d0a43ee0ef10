"""The text model of a Hugging Face folder as a folder of its own, with weights that are not quantised.

The folders of Gemma 3, Gemma 3n and Llama 4 have their text model inside of one that sees or hears. Quantised folders
are read as they are, so that this is of use for them only to look at their weights, or for other programs.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from miles.config.checks.json_file import read_json_object
from miles.precision.quantization_config import QUANTISED_BY
from miles.services.trainer.checkpoint.hf_files import copy_other_files, set_dtype
from miles.services.trainer.checkpoint.shard_writer import ShardWriter
from miles.weights.hf_folder.plain_tensors import PlainTensors
from miles.weights.naming.conversion import Shapes
from miles.weights.naming.model_tensors import read_model_tensors
from miles.weights.naming.published import misfits, refuse

_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What a text model's configuration takes from the one around it."""
_PART = "language_model"


def write_plain_model(source: pathlib.Path, directory: pathlib.Path, dtype: torch.dtype) -> None:
    """Write the text model of `source` to a new folder, a tensor at a time; what was quantised is in `dtype` then.

    Raises ValueError for weights that are quantised in an unknown way, for a text model that transformers does not
    know, and for a folder that lacks some of its tensors.
    """
    start_folder(source, directory, dtype)
    writer, written = ShardWriter(directory), {}
    for name, tensor in plain_tensors(source, dtype):
        writer.add(name, tensor)
        written[name] = tuple(tensor.shape)
    writer.finish()
    model = read_model_tensors(directory)
    refuse_missing(model.conversion.checkpoint_shapes(model.module), written, model.model_type)


def start_folder(source: pathlib.Path, directory: pathlib.Path, dtype: torch.dtype) -> None:
    """Make a folder with all of the text model's but its weights, which config.json says are plain and in `dtype`."""
    config = plain_config(read_json_object(source / "config.json"))
    directory.mkdir(parents=True)
    copy_other_files(source, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    set_dtype(directory / "config.json", dtype)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model in a folder with this one. Raises ValueError; see `write_plain_model`."""
    text = config.get("text_config")
    outer = {key: config[key] for key in _OUTER if config.get(key) is not None}
    plain = dict(config) if text is None else {**outer, **text, "architectures": [_architecture(text)]}
    return {key: value for key, value in plain.items() if key not in QUANTISED_BY}


def _architecture(text: Mapping[str, Any]) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(text.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"its text model is a {kind}, which transformers does not know as a causal language model")
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def plain_tensors(source: pathlib.Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder's text model by its own names, dequantised to `dtype`; others in the type they have.

    Holds one at a time. Raises WeightsRefused for FP8 values without scales and the like.
    """
    stored = PlainTensors(source, dtype)
    wrapped = any(_PART in name.split(".") for name in stored)
    for name in stored:
        plain = _text_name(name) if wrapped else name
        if plain is not None:
            yield plain, stored[name]


def _text_name(name: str) -> str | None:
    """A tensor's name in the text model alone; None for one of another part."""
    parts = name.split(".")
    if _PART not in parts:
        return name if parts[0] == "lm_head" else None
    parts.remove(_PART)
    return ".".join(parts)


def refuse_missing(expected: Shapes, written: Shapes, model_type: str) -> None:
    """Raise WeightsRefused unless all tensors of a model were written, each in its shape."""
    found = {name: written[name] for name in expected if name in written}
    refuse(misfits(expected, found), model_type)
