"""The weights of a model by name, swapped all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from miles.weights.base import WeightsRefused


class Parameters:
    """A model's parameters and persistent buffers by Hugging Face name; tied ones count once, by their first name."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        self._places: dict[str, list[tuple[torch.nn.Module, str]]] = {}
        self._expected: dict[str, torch.Tensor] = {}
        self._alias: dict[str, str] = {}
        first_name: dict[int, str] = {}
        for module_name, module in model.named_modules():
            for attribute, weight in _weights(module):
                name = f"{module_name}.{attribute}" if module_name else attribute
                first = first_name.setdefault(id(weight), name)
                self._alias[name] = first
                self._places.setdefault(first, []).append((module, attribute))
                self._expected[first] = weight
        self._served: dict[str, torch.Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Names of the weights, tied ones once."""
        return list(self._expected)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes by name."""
        return {name: tuple(weight.shape) for name, weight in self._expected.items()}

    @property
    def served(self) -> Mapping[str, torch.Tensor]:
        """The tensors in use, by name; empty before the first `swap`."""
        return dict(self._served)

    def check(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Check names, shapes and dtypes; return the tensors by the names used here.

        A tied parameter may come under either name or both. Raises WeightsRefused naming all faults.
        """
        faults: list[str] = []
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            first = self._alias.get(name)
            if first is None:
                faults.append(f"{name}: the model has no such parameter")
                continue
            expected = self._expected[first]
            if tensor.shape != expected.shape:
                faults.append(f"{name}: shape {tuple(tensor.shape)}, the model's is {tuple(expected.shape)}")
            # Which buffers are in float32, such as a router's correction bias, does not depend on the engine's dtype.
            if tensor.dtype != expected.dtype and isinstance(expected, torch.nn.Parameter):
                faults.append(f"{name}: dtype {tensor.dtype}, the engine serves {expected.dtype}")
            if first not in found or name == first:
                found[first] = tensor
        faults += [f"{name}: missing" for name in self._expected if name not in found]
        if faults:
            shown = "; ".join(faults[:20]) + ("; ..." if len(faults) > 20 else "")
            raise WeightsRefused(f"weights do not fit, {len(faults)} faults: {shown}")
        return found

    def swap(self, checked: Mapping[str, torch.Tensor]) -> None:
        """Serve these tensors, which `check` returned, from now on; those on the model's own device are not copied."""
        for name, tensor in checked.items():
            served = tensor.detach().to(self._device)
            is_parameter = isinstance(self._expected[name], torch.nn.Parameter)
            weight = torch.nn.Parameter(served, requires_grad=False) if is_parameter else served
            for module, attribute in self._places[name]:
                setattr(module, attribute, weight)
            self._expected[name] = weight
            self._served[name] = served


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own parameters and persistent buffers."""
    yield from module.named_parameters(recurse=False)
    passing = module._non_persistent_buffers_set
    yield from ((name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in passing)
