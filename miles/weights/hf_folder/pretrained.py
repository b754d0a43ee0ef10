"""A causal language model of a Hugging Face folder in transformers, with ordinary matrices."""

from __future__ import annotations

import pathlib
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch

from miles.weights.hf_folder import mimo
from miles.weights.hf_folder.model_config import read_model_config
from miles.weights.hf_folder.plain_tensors import PlainTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_model(folder: str | pathlib.Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Read a model onto the CPU in `dtype`; quantised matrices are dequantised to it, one at a time.

    Args:
        options: Of transformers' `from_pretrained`.

    Raises OSError or ValueError for a folder that has no model, or whose weights cannot be read.
    """
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel
    mimo.register()
    tensors = PlainTensors(folder, dtype)
    if tensors.recipe is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        return model
    state = {name: _Unread(tensors, name) for name in tensors}
    config = read_model_config(folder)
    model = _class_of(config).from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    return model


def _class_of(config: Any) -> Any:
    """The class of the model that a configuration is of; the auto class takes no tensors in place of a folder."""
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(build(config))


class _Unread:
    """A tensor that is read when all of it is asked for, as transformers asks slices of safetensors files."""

    def __init__(self, tensors: PlainTensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return self._tensors[self._name]
