"""Names and shapes of all tensors that a Hugging Face model has, from its config.json alone."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import torch

from miles.weights.hf_folder import mimo
from miles.weights.hf_folder.model_config import read_model_config
from miles.weights.naming.conversion import Conversion, Shapes
from miles.weights.naming.rules import conversion_of


@dataclasses.dataclass(frozen=True, slots=True)
class ModelTensors:
    """A model's parameters and persistent buffers."""

    model_type: str
    module: Shapes
    """Shapes by name in the module form, tied tensors once."""
    aliases: Mapping[str, str]
    """Further names of tied tensors, each with the one in `module`; the same in both forms."""
    mtp: Shapes
    """Those of MTP layers, in the checkpoint form: transformers leaves them out of its models. Without the embeddings
    and the head, which such layers share with the model."""
    conversion: Conversion
    """Between the forms."""
    float32: frozenset[str]
    """Parts of names of tensors that are in float32 whatever the type of the others: what routers add to scores."""
    config: Any
    """transformers' configuration of the text model."""

    def exported_dtype(self, name: str, held: torch.dtype, asked: torch.dtype) -> torch.dtype:
        """The type in which a tensor is exported that the trainer holds as `held`, when `asked` is that of weights."""
        if not held.is_floating_point:
            return held
        return torch.float32 if self.float32.intersection(name.split(".")) else asked


def read_model_tensors(folder: str | pathlib.Path) -> ModelTensors:
    """Read the tensors of the causal language model in a Hugging Face folder; its weights need not be there.

    Raises FileNotFoundError for a folder without config.json, and OSError or ValueError when transformers has no such
    model of the folder's type, or cannot save it.
    """
    from transformers import AutoModelForCausalLM

    if not (pathlib.Path(folder) / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: there is no config.json; set hf_checkpoint to a Hugging Face folder"
        )
    config = read_model_config(folder)
    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build(config)
    model.tie_weights()
    state = model.state_dict(keep_vars=True)
    tensors = once(state)
    first = {id(tensor): name for name, tensor in tensors.items()}
    aliases = {name: first[id(tensor)] for name, tensor in state.items() if name not in tensors}
    conversion = conversion_of(model, tensors)
    module = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    text = config.get_text_config()
    mtp = _prediction_layers(conversion.checkpoint_shapes(module), text)
    float32 = frozenset(model._keep_in_fp32_modules_strict or ())
    return ModelTensors(str(config.model_type), module, aliases, mtp, conversion, float32, text)


def once(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's `state_dict(keep_vars=True)`, with each tied tensor under its first name alone."""
    first: dict[int, str] = {}
    return {name: tensor for name, tensor in state.items() if first.setdefault(id(tensor), name) == name}


_SHARED_BY_MTP = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


def shared_by_mtp(name: str) -> str | None:
    """The model's tensor that an MTP layer shares under another name; None for a tensor of its own."""
    match = _SHARED_BY_MTP.fullmatch(name)
    if match is None:
        return None
    return "lm_head.weight" if match[1] == "shared_head.head" else "model.embed_tokens.weight"


def _prediction_layers(checkpoint: Shapes, config: Any) -> Shapes:
    """Those of MTP layers as DeepSeek-V3, GLM-4.5 and MiMo have them: a layer like the last, and what feeds it."""
    count = int(getattr(config, "num_nextn_predict_layers", None) or 0)
    layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    place, start, projection, norms = "model.layers", layers, "eh_proj", ("enorm", "hnorm", "shared_head.norm")
    if config.model_type == mimo.MODEL_TYPE:
        place, start, projection = "model.mtp_layers", 0, "input_proj"
        norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    last = f"model.layers.{layers - 1}."
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(start, start + count):
        own = f"{place}.{number}."
        shapes |= {own + name.removeprefix(last): s for name, s in checkpoint.items() if name.startswith(last)}
        shapes |= {f"{own}{name}.weight": (width,) for name in norms}
        shapes[f"{own}{projection}.weight"] = (width, 2 * width)
    return shapes
