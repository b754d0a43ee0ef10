"""The weights that a model computes with where one process holds all of it.

Parameters are held and updated in one type (float32 masters) and computed with in another (bfloat16). Within `in_use`
the modules hold copies in the type of the computation, cast once for all micro-batches, and gradients add up in the
masters' type; outside of it they hold the masters, which are saved, exported and updated. FSDP2 does the same layer by
layer, at a cost per layer that is larger than that of a small model's layer itself.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch

_ALIGNMENT = 128
"""Elements that copies begin at multiples of, for kernels that load many at a time."""

Place = tuple[torch.nn.Module, str, torch.nn.Parameter]
"""A module, its parameter's name, and the parameter."""


class WorkingWeights:
    """Copies of those parameters of a model whose type is not the one that it computes with; in one piece of memory."""

    def __init__(self, places: Sequence[Place], dtype: torch.dtype) -> None:
        """`places`: where those parameters are; tied ones have several."""
        self._places = places
        masters = list(dict.fromkeys(master for _, _, master in places))
        sizes = [-(-master.numel() // _ALIGNMENT) * _ALIGNMENT for master in masters]
        device = masters[0].device if masters else None
        memory = torch.empty(sum(sizes), dtype=dtype, device=device)
        self._memory = memory.untyped_storage()
        self._nbytes = self._memory.nbytes()
        starts = itertools.accumulate(sizes, initial=0)
        self._copies = {
            master: _copy(master, memory[start : start + master.numel()])
            for master, start in zip(masters, starts, strict=False)
        }
        self._memory.resize_(0)

    @classmethod
    def of(cls, model: torch.nn.Module, dtype: torch.dtype) -> WorkingWeights:
        """Of a model that is not sharded."""
        return cls(_places(model, dtype), dtype)

    @classmethod
    def none(cls, dtype: torch.dtype) -> WorkingWeights:
        """Of a model under FSDP2."""
        return cls((), dtype)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the modules hold copies of the masters' present values inside the block; gradients are the masters'
        after it. The copies have memory inside the block only."""
        copies = self._copies
        self._memory.resize_(self._nbytes)
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(list(copies.values()), list(copies))
        for master, copy in copies.items():
            copy.grad = master.grad
        self._put(copies)
        try:
            yield
        finally:
            self._put({master: master for master in copies})
            for master, copy in copies.items():
                master.grad, copy.grad = copy.grad, None
            self._memory.resize_(0)

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


def _copy(master: torch.nn.Parameter, memory: torch.Tensor) -> torch.nn.Parameter:
    copy = torch.nn.Parameter(memory.view(master.shape), requires_grad=master.requires_grad)
    if copy.requires_grad:
        copy.grad_dtype = master.dtype  # autograd casts each micro-batch's gradient and adds it to those before
    return copy
