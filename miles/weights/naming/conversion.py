"""Conversion of a model's tensors between its two forms, one group of tensors at a time.

| form | names and shapes | who uses it |
|---|---|---|
| module | as transformers' modelling code holds them: a layer's experts in one three-dimensional tensor | the fsdp backend, the torch engine |
| checkpoint | as the files of Hugging Face folders have them: each expert's matrices by themselves | SGLang, megatron-bridge, `save_hf` |

The rules are transformers' own, those by which it loads and saves checkpoints.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Named = tuple[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One group of tensors in one direction."""

    sources: Mapping[str, Sequence[str]]
    """Names of the tensors that it needs, by pattern, in order."""
    targets: Sequence[str]
    """Names of those that it makes, in order."""
    transform: Any | None
    """transformers' WeightConverter of the direction; None for a tensor that is only renamed."""
    model: PreTrainedModel
    """On the meta device; some operations look up a parameter's shape."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors that it needs."""
        return [name for names in self.sources.values() for name in names]

    @property
    def size(self) -> int:
        """How many tensors it needs."""
        return sum(map(len, self.sources.values()))

    def apply(self, parts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """The tensors of `targets`, views of those in `parts` where that is possible. Takes them out of `parts`."""
        if self.transform is None:
            return [parts.pop(name) for name in self.names]
        tensors: Any = {pattern: [parts.pop(name) for name in names] for pattern, names in self.sources.items()}
        for operation in self.transform.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=self.transform.source_patterns,
                target_patterns=self.transform.target_patterns,
                full_layer_name=self.targets[0],
                model=self.model,
                config=self.model.config,
            )
        return [made[0] if isinstance(made, list) else made for made in tensors.values()]


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Tensors that one form has instead of others of the other form."""

    split: Step
    """From the module form to the checkpoint form."""
    join: Step
    """Back."""


class Conversion:
    """The groups of one model. Tensors that are in none have the same name and shape in both forms."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self._splits: dict[str, Step] = {}
        self._joins: dict[str, Step] = {}
        for group in groups:
            self._splits |= dict.fromkeys(group.split.names, group.split)
            self._joins |= dict.fromkeys(group.join.names, group.join)

    def to_checkpoint(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """The tensors of the module form in the checkpoint form; see `_converted`."""
        return _converted(tensors, self._splits)

    def to_module(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """The tensors of the checkpoint form in the module form; see `_converted`."""
        return _converted(tensors, self._joins)

    def checkpoint_shapes(self, module: Shapes) -> Shapes:
        """Names and shapes in the checkpoint form of tensors of the module form."""
        return _shapes(self.to_checkpoint(_without_memory(module)))

    def module_shapes(self, checkpoint: Shapes) -> Shapes:
        """Names and shapes in the module form of tensors of the checkpoint form."""
        return _shapes(self.to_module(_without_memory(checkpoint)))


def _converted(tensors: Iterable[Named], steps: Mapping[str, Step]) -> Iterator[Named]:
    """Convert tensors as they come; what a group makes comes where its last tensor was.

    Holds the tensors of groups that are not complete, and nothing else beyond the tensor that is read next. Raises
    ValueError for a group that stays incomplete.
    """
    waiting: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        step = steps.get(name)
        if step is None:
            yield name, tensor
            continue
        parts = waiting.setdefault(id(step), {})
        parts[name] = tensor
        if len(parts) == step.size:
            del waiting[id(step)], tensor
            yield from zip(step.targets, step.apply(parts), strict=True)
        del parts  # keep no tensor while others are read
    for parts in waiting.values():
        step = steps[next(iter(parts))]
        missing = [name for name in step.names if name not in parts]
        raise ValueError(f"{step.targets[0]} cannot be made: {len(missing)} tensors are missing, e.g. {missing[0]}")


def _without_memory(shapes: Shapes) -> Iterator[Named]:
    return ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())


def _shapes(tensors: Iterable[Named]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors}
