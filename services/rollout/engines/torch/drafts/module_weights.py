"""The weights of the torch engine's draft model: what its folder holds at first, then what the draft stream brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from miles.services.rollout.engines.torch.model.parameters import Parameters
from miles.weights.base import WeightsRefused


class ModuleWeights:
    """The weights of a module; implements DraftWeights.

    Args:
        module: The draft model.
        stored: Its folder's tensors, with which it proposes until a version comes.
        module_name: The name in the module of a tensor of the folder's.
        unused: Whether a tensor of the folder's is none of the module's, as embeddings that it shares with the policy.

    Raises ValueError when the folder's tensors are not those of the module.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        stored: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
        module_name: Callable[[str], str] = lambda name: name,
        unused: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._parameters = Parameters(module, device)
        self._name = module_name
        self._served: Mapping[str, torch.Tensor] = {}
        self._version: int | None = None
        used = {name: each for name, each in stored.items() if not unused(name)}
        cast = {name: each.to(dtype) if each.is_floating_point() else each for name, each in used.items()}
        try:
            self._parameters.swap(self.check(cast))
        except WeightsRefused as error:
            raise ValueError(f"the draft model's folder does not hold what its configuration says: {error}") from error

    @property
    def version(self) -> int | None:
        """Version that proposes now; None before the first `load`."""
        return self._version

    def check(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Check names, shapes and dtypes; return what `load` takes. Raises WeightsRefused."""
        return self._parameters.check({self._name(name): tensor for name, tensor in tensors.items()})

    def load(self, version: int, checked: Mapping[str, torch.Tensor]) -> None:
        """Propose with these weights from now on."""
        self._parameters.swap(checked)
        self._version, self._served = version, checked

    def served(self) -> Mapping[str, torch.Tensor]:
        """The tensors of the last `load`; empty before it."""
        return self._served
