"""The weights of a Hugging Face checkpoint: for engines without a weight-sync service, and as the base of adapters."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from miles.config import JobConfig
    from miles.weights.naming.model_tensors import ModelTensors


def read_weights(hf_checkpoint: str, dtype: str) -> dict[str, torch.Tensor]:
    """Read all parameters and persistent buffers by name in the module form, tied ones once, to the CPU.

    They have `dtype` ("float32" or "bfloat16"), quantised ones too, but for the few that are always in float32. Uses
    transformers, because a checkpoint's files may name and split parameters differently from the model. Raises OSError or ValueError when the
    folder has no weights that fit.
    """
    import torch

    from miles.weights.hf_folder.pretrained import read_model
    from miles.weights.naming.model_tensors import once, read_model_tensors

    kind = getattr(torch, dtype)
    model = read_model(hf_checkpoint, kind)
    weights = once(model.state_dict(keep_vars=True))
    tensors = read_model_tensors(hf_checkpoint)
    return {name: w.detach().to(tensors.exported_dtype(name, w.dtype, kind)) for name, w in weights.items()}


def read_published(config: JobConfig) -> dict[str, torch.Tensor]:
    """Read the weights of a job's hf_checkpoint as its trainer would publish them. Raises like `read_weights`."""
    import torch

    from miles.precision.of_run import rollout_recipe
    from miles.weights.naming.published import published_tensors

    published, rollout = published_tensors(config), config.rollout
    weights = read_weights(str(rollout.hf_checkpoint), rollout.rollout_dtype)
    found = dict(published.from_module(weights.items()))
    if published.contract.mtp:
        dtype = getattr(torch, rollout.rollout_dtype)
        found |= _mtp_weights(pathlib.Path(str(rollout.hf_checkpoint)), published.model, dtype)
    recipe = rollout_recipe(config)
    if recipe is not None:
        from miles.precision.tensors import QuantisedTensors
        from miles.weights.export_format import formatted

        found = dict(formatted(QuantisedTensors(recipe), found.items()))
    return found


def _mtp_weights(folder: pathlib.Path, model: ModelTensors, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The MTP layers of a folder, which transformers does not read."""
    from miles.weights.hf_folder.plain_tensors import PlainTensors

    stored = PlainTensors(folder, dtype)
    for name in stored:
        if name in model.mtp:
            tensor = stored[name]
            yield name, tensor.to(model.exported_dtype(name, tensor.dtype, dtype))
