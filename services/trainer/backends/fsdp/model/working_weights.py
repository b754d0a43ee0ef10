"""The weights that a model computes with where one process holds all of it.

Parameters are held and updated in one type (float32 masters) and computed with in another (bfloat16). Within `in_use`
the modules hold copies in the type of the computation, cast once for all micro-batches, and gradients add up in the
masters' type; outside of it they hold the masters, which are saved, exported and updated. FSDP2 does the same layer by
layer, at a cost per layer that is larger than that of a small model's layer itself. Gradients are cast many at a time:
one by one they would be an eighth of the kernels that a small model's step starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import torch

from miles.precision.recipe import Recipe
from miles.precision.registry import weight_format
from miles.precision.rounding import rounded_weight

_ALIGNMENT = 128
"""Elements that copies begin at multiples of, for kernels that load many at a time."""
_CAST_BYTES = 64 * 2**20
"""Gradients that wait to be cast together, in the type of the computation."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a parameter is."""

    module: torch.nn.Module
    attribute: str
    master: torch.nn.Parameter
    name: str
    """In the model."""
    rounded: bool
    """Whether the recipe covers it."""


class WorkingWeights:
    """Copies of those parameters of a model that it does not compute with as they are held; in one piece of memory."""

    def __init__(self, places: Sequence[_Place], dtype: torch.dtype, recipe: Recipe | None = None) -> None:
        """`places`: where those parameters are; tied ones have several."""
        self._places = places
        self._format = None if recipe is None else weight_format(recipe)
        masters = list(dict.fromkeys(place.master for place in places))
        sizes = [-(-master.numel() // _ALIGNMENT) * _ALIGNMENT for master in masters]
        device = masters[0].device if masters else None
        memory = torch.empty(sum(sizes), dtype=dtype, device=device)
        self._memory = memory.untyped_storage()
        self._nbytes = self._memory.nbytes()
        starts = itertools.accumulate(sizes, initial=0)
        self._copies = {
            master: self._copy(master, memory[start : start + master.numel()])
            for master, start in zip(masters, starts, strict=False)
        }
        self._memory.resize_(0)
        self._rounded = {place.name: self._copies[place.master] for place in places if place.rounded}
        self._waiting: dict[torch.nn.Parameter, torch.Tensor] = {}
        """Gradients, by master, that are not in it yet."""
        self._waiting_bytes = 0

    @classmethod
    def of(cls, model: torch.nn.Module, dtype: torch.dtype, recipe: Recipe | None = None) -> WorkingWeights:
        """Of a model that is not sharded, which computes by `recipe`."""
        return cls(_places(model, dtype, recipe), dtype, recipe)

    @classmethod
    def none(cls, dtype: torch.dtype) -> WorkingWeights:
        """Of a model under FSDP2."""
        return cls((), dtype)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the modules hold copies of the masters' present values inside the block; gradients are the masters'
        after it. The copies have memory inside the block only. An error in the block leaves out gradients that wait."""
        copies = self._copies
        try:
            self._memory.resize_(self._nbytes)
            if copies:
                with torch.no_grad():
                    torch._foreach_copy_(list(copies.values()), list(copies))
                    self._round()
            self._put(copies)
            yield
            self._cast_waiting()  # not after an error: it needs memory, which may be what the block ran out of
        finally:
            self._waiting, self._waiting_bytes = {}, 0
            self._put({master: master for master in copies})
            self._memory.resize_(0)

    def _round(self) -> None:
        """Round the copies that the recipe covers, in place."""
        if self._format is not None:
            for name, copy in self._rounded.items():
                copy.copy_(rounded_weight(self._format, name, copy))

    def _copy(self, master: torch.nn.Parameter, memory: torch.Tensor) -> torch.nn.Parameter:
        copy = torch.nn.Parameter(memory.view(master.shape), requires_grad=master.requires_grad)
        if copy.requires_grad:
            hook = functools.partial(self._take_gradient, master)
            copy.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return copy

    def _take_gradient(self, master: torch.nn.Parameter, copy: torch.Tensor) -> None:
        """Take what a backward pass has given a copy; autograd calls it."""
        gradient, copy.grad = copy.grad, None
        assert gradient is not None, "called when there is one"
        if master in self._waiting:  # of the micro-batch before
            self._cast_waiting()
        self._waiting[master] = gradient
        self._waiting_bytes += gradient.nbytes
        if self._waiting_bytes >= _CAST_BYTES:
            self._cast_waiting()

    @torch.no_grad()
    def _cast_waiting(self) -> None:
        """Cast the gradients that wait to their masters' type, and add them to those before."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        if not waiting:
            return
        cast = [torch.empty_like(master) for master in waiting]
        torch._foreach_copy_(cast, list(waiting.values()))
        sums, added = [], []
        for master, gradient in zip(waiting, cast, strict=True):
            if master.grad is None:
                master.grad = gradient
            else:
                sums.append(master.grad)
                added.append(gradient)
        if sums:
            torch._foreach_add_(sums, added)

    def _put(self, chosen: dict[torch.nn.Parameter, torch.nn.Parameter]) -> None:
        # Not by setattr, which takes ten times as long: a model has hundreds of parameters.
        for place in self._places:
            place.module._parameters[place.attribute] = chosen[place.master]


def _places(model: torch.nn.Module, dtype: torch.dtype, recipe: Recipe | None) -> list[_Place]:
    """Where the parameters are that are of other types or rounded."""
    places = []
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{module_name}.{attribute}"
            rounded = recipe is not None and recipe.layers.cover(name, parameter.dim())
            if rounded or parameter.dtype != dtype:
                places.append(_Place(module, attribute, parameter, name, rounded))
    return places
