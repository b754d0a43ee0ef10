"""The tensors of a checkpoint's model as SGLang takes them, to refuse others before a server loads them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import torch

from miles.config.checks.engine_model import misbuilt
from miles.config.checks.json_file import read_json_object
from miles.engine_spec import engine_spec
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.weights.naming.contract import WeightContract
from miles.weights.naming.conversion import Shapes
from miles.weights.naming.model_tensors import read_model_tensors
from miles.weights.naming.published import PublishedTensors, misfits, refuse


@dataclasses.dataclass(frozen=True, slots=True)
class ModelLayout:
    """Tensors and sizes of a checkpoint's model."""

    shapes: Shapes
    """Shape of every tensor of a version, by name."""
    vocabulary: int
    max_positions: int
    form: str = "checkpoint"
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Further names of tied tensors, each with the one in `shapes`. SGLang ties them only for some model types, and
    otherwise needs the weights under every name."""
    recipe: Recipe | None = None
    """By which matrices are quantised; None: as the others."""

    def refuse_misfits(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Raise WeightsRefused unless this is a full set of weights that were made for servers of `dtype`.

        SGLang ignores unknown names and keeps old weights where none are sent: both would go unnoticed.
        """
        shapes, parts = self._expected(dtype)
        faults = misfits(shapes, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            wanted = parts.get(name, dtype)
            others = (wanted,) if name in parts else (wanted, torch.float32)
            if tensor.dtype not in others and (name in parts or tensor.is_floating_point()):
                faults.append(f"{name} is {tensor.dtype} instead of {wanted}")
        quantised = "" if self.recipe is None else f", quantised to {self.recipe.format}"
        refuse(faults, "the model", f"; SGLang takes its tensors in the {self.form} form{quantised}")

    def _expected(self, dtype: torch.dtype) -> tuple[Shapes, Mapping[str, torch.dtype]]:
        """Shape of every tensor of a version by name, and the types of those that are parts of a quantised matrix."""
        if self.recipe is None:
            return self.shapes, {}
        quantised = QuantisedTensors(self.recipe)
        shapes: dict[str, tuple[int, ...]] = {}
        parts: dict[str, torch.dtype] = {}
        for name, shape in self.shapes.items():
            layout = quantised.layout(name, dtype, shape)
            shapes |= {part: size for part, _, size in layout}
            if quantised.covers(name, dtype, len(shape)):
                parts |= {part: kind for part, kind, _ in layout}
        return shapes, parts


def read_layout(hf_checkpoint: str, contract: WeightContract, recipe: Recipe | None = None) -> ModelLayout:
    """Read the layout of a checkpoint's model, but no weights.

    Raises OSError or ValueError when transformers has no causal language model of the checkpoint's type, or SGLang
    builds another one.
    """
    problem = misbuilt(engine_spec("sglang"), read_json_object(pathlib.Path(hf_checkpoint) / "config.json"))
    if problem is not None:
        raise ValueError(f"{hf_checkpoint}: {problem}; set rollout_backend to torch")
    model = read_model_tensors(hf_checkpoint)
    config = model.config
    return ModelLayout(
        PublishedTensors(model, contract).shapes,
        int(config.vocab_size),
        int(getattr(config, "max_position_embeddings", 0) or 0),
        contract.form,
        model.aliases,
        recipe,
    )
