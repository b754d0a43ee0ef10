"""The text model of a Hugging Face folder as a folder of its own, with weights that are not quantised.

The folders of DeepSeek-V3 and MiniMax-M2 are published with FP8 weights, and those of Gemma 3, Gemma 3n and Llama 4
have their text model inside of one that sees or hears. Trainers and engines take the weights of a text model in a type
that they compute in.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from miles.config.checks.json_file import read_json_object
from miles.config.checks.published_form import FP8_BLOCKS
from miles.precision.fp8_block import SCALE_SUFFIX, Fp8Block
from miles.precision.small_floats import E4M3
from miles.services.trainer.checkpoint.hf_files import ShardWriter, copy_other_files, set_dtype
from miles.weights.base import WeightsRefused
from miles.weights.naming.conversion import Shapes
from miles.weights.naming.model_tensors import read_model_tensors
from miles.weights.naming.published import misfits, refuse

_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What a text model's configuration takes from the one around it."""
_PART = "language_model"


def write_plain_model(source: pathlib.Path, directory: pathlib.Path, dtype: torch.dtype) -> None:
    """Write the text model of `source` to a new folder, a tensor at a time; what was quantised is in `dtype` then.

    Raises ValueError for weights that are quantised otherwise than in blocks of FP8, for a text model that transformers
    does not know, and for a folder that lacks some of its tensors.
    """
    config = plain_config(read_json_object(source / "config.json"))
    directory.mkdir(parents=True)
    copy_other_files(source, directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    set_dtype(directory / "config.json", dtype)
    writer, written = ShardWriter(directory), {}
    for name, tensor in plain_tensors(source, dtype):
        writer.add(name, tensor)
        written[name] = tuple(tensor.shape)
    writer.finish()
    _check(directory, written)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model in a folder with this one. Raises ValueError; see `write_plain_model`."""
    quantised = config.get("quantization_config")
    if quantised is not None and any(quantised.get(key) != value for key, value in FP8_BLOCKS.items()):
        raise ValueError(
            f"its weights are quantised by {quantised.get('quant_method')}, from which this cannot convert; give a "
            "folder with weights in 16 or 32 bits"
        )
    text = config.get("text_config")
    outer = {key: config[key] for key in _OUTER if config.get(key) is not None}
    plain = dict(config) if text is None else {**outer, **text, "architectures": [_architecture(text)]}
    plain.pop("quantization_config", None)
    return plain


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
    from safetensors import safe_open

    files: list[Any] = [safe_open(path, framework="pt") for path in sorted(source.glob("*.safetensors"))]
    places = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (not a dict)
    wrapped = any(_PART in name.split(".") for name in places)
    for name, file in places.items():
        plain = _text_name(name) if wrapped else name
        if plain is None or name.endswith(SCALE_SUFFIX):
            continue
        tensor, scales = file.get_tensor(name), name + SCALE_SUFFIX
        if tensor.dtype == E4M3:
            if scales not in places:
                raise WeightsRefused(f"{name} has FP8 values, and there are no scales {scales}")
            parts = {"": tensor, SCALE_SUFFIX: places[scales].get_tensor(scales)}
            tensor = Fp8Block().dequantise(parts, dtype)
        yield plain, tensor


def _text_name(name: str) -> str | None:
    """A tensor's name in the text model alone; None for one of another part."""
    parts = name.split(".")
    if _PART not in parts:
        return name if parts[0] == "lm_head" else None
    parts.remove(_PART)
    return ".".join(parts)


def _check(directory: pathlib.Path, written: Shapes) -> None:
    """Raise WeightsRefused unless all tensors of the folder's model were written, each in its shape."""
    model = read_model_tensors(directory)
    expected = model.conversion.checkpoint_shapes(model.module)
    found = {name: written[name] for name in expected if name in written}
    refuse(misfits(expected, found), str(model.model_type))
