"""The weights that a model computes with where one process holds all of it.

Parameters are held and updated in one type (float32 masters) and computed with in another (bfloat16). Within `in_use`
the modules hold copies in the type of the computation, cast once for all micro-batches, and gradients add up in the
masters' type; outside of it they hold the masters, which are saved, exported and updated. Under FSDP2, which does the
same layer by layer, there is nothing to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

Place = tuple[torch.nn.Module, str, torch.nn.Parameter]
"""A module, its parameter's name, and the parameter."""


class WorkingWeights:
    """Copies of those parameters of a model whose type is not the one that it computes with."""

    def __init__(self, places: Sequence[Place], dtype: torch.dtype) -> None:
        """`places`: where those parameters are; tied ones have several."""
        self._places = places
        self._copies = {master: _copy(master, dtype) for _, _, master in places}

    @classmethod
    def of(cls, model: torch.nn.Module, dtype: torch.dtype) -> WorkingWeights:
        """Of a model that is not sharded."""
        return cls(_places(model, dtype), dtype)

    @classmethod
    def none(cls, dtype: torch.dtype) -> WorkingWeights:
        """Of a model under FSDP2."""
        return cls((), dtype)

    def up_to_date(self) -> dict[torch.nn.Parameter, torch.nn.Parameter]:
        """Each master's copy, with its present values. None is listed that the model computes with as it is."""
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(list(self._copies.values()), list(self._copies))
        return self._copies

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the modules hold the copies inside the block; gradients are the masters' after it."""
        copies = self.up_to_date()
        for master, copy in copies.items():
            copy.grad = master.grad
        self._put(copies)
        try:
            yield
        finally:
            self._put({master: master for master in copies})
            for master, copy in copies.items():
                master.grad, copy.grad = copy.grad, None

    def _put(self, chosen: dict[torch.nn.Parameter, torch.nn.Parameter]) -> None:
        # Not by setattr, which takes ten times as long: a model has hundreds of parameters.
        for module, name, master in self._places:
            module._parameters[name] = chosen[master]


def _places(model: torch.nn.Module, dtype: torch.dtype) -> list[Place]:
    """Where the parameters of other types are."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dtype != dtype
    ]


def _copy(master: torch.nn.Parameter, dtype: torch.dtype) -> torch.nn.Parameter:
    copy = torch.nn.Parameter(torch.empty_like(master, dtype=dtype), requires_grad=master.requires_grad)
    if copy.requires_grad:
        copy.grad_dtype = master.dtype  # autograd casts each micro-batch's gradient and adds it to those before
    return copy
