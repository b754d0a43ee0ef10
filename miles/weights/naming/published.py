"""The tensors of a model as a contract wants them, made from either form."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from miles.weights.base import WeightsRefused
from miles.weights.naming.contract import WeightContract, contract_of
from miles.weights.naming.conversion import Named, Shapes
from miles.weights.naming.model_tensors import ModelTensors, read_model_tensors

if TYPE_CHECKING:
    from miles.config import JobConfig


class PublishedTensors:
    """Converts a model's tensors to what is published, as they come; see `Conversion` for what is held meanwhile."""

    def __init__(self, model: ModelTensors, contract: WeightContract) -> None:
        self.model = model
        self.contract = contract
        self._further: dict[str, list[str]] = {}
        """Further names under which a tensor is published, by its first one."""
        if contract.every_name:
            for alias, name in model.aliases.items():
                self._further.setdefault(name, []).append(alias)

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Names and shapes of all that is published."""
        module, contract = self.model.module, self.contract
        if contract.form == "module":
            return module
        shapes = {**self.model.conversion.checkpoint_shapes(module)}
        if contract.mtp:
            shapes |= self.model.mtp
        return shapes | {alias: shapes[name] for name, names in self._further.items() for alias in names}

    def from_module(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Tensors of the module form, as they are published."""
        if self.contract.form == "checkpoint":
            tensors = self.model.conversion.to_checkpoint(tensors)
        return self._under_every_name(tensors)

    def from_checkpoint(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Tensors of the checkpoint form, as they are published; without MTP layers unless the contract has them."""
        if not self.contract.mtp:
            tensors = ((name, tensor) for name, tensor in tensors if name not in self.model.mtp)
        if self.contract.form == "module":
            tensors = self.model.conversion.to_module(tensors)
        return self._under_every_name(tensors)

    def _under_every_name(self, tensors: Iterable[Named]) -> Iterator[Named]:
        for name, tensor in tensors:
            yield name, tensor
            for alias in self._further.get(name, ()):
                yield alias, tensor


def published_tensors(config: JobConfig) -> PublishedTensors:
    """What a job publishes. Raises like `read_model_tensors`."""
    return PublishedTensors(read_model_tensors(str(config.rollout.hf_checkpoint)), contract_of(config))


def misfits(expected: Shapes, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """List how tensors differ from those expected, each as one sentence; both by name."""
    faults = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in found]
    for name, shape in found.items():
        if name not in expected:
            faults.append(f"{name} {shape} is none of the model's tensors")
        elif shape != expected[name]:
            faults.append(f"{name} has shape {shape} instead of {expected[name]}")
    return faults


def refuse(faults: Sequence[str], what: str, expected: str = "") -> None:
    """Raise WeightsRefused with the first faults of weights for `what`, if there are any, and what was expected."""
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise WeightsRefused(f"the weights do not fit {what}: {'; '.join(faults[:5])}{more}{expected}")


def refuse_misfits(published: PublishedTensors, found: Shapes, source: str) -> None:
    """Raise WeightsRefused when what `source` has is not what is to be published."""
    faults = misfits(published.shapes, found)
    expected = f"; {source} other tensors than the engines take in the {published.contract.form} form"
    refuse(faults, "the engines", expected)
