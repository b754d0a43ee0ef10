"""Metrics of low precision by decoder layer: what a person looks at when a run in few bits becomes unstable."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from miles.precision.of_run import rollout_recipe, training_recipe
from miles.precision.registry import weight_format
from miles.precision.statistics import InputStatistics, WeightStatistics, input_metrics, merged, weight_metrics

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.precision.recipe import Recipe
    from miles.precision.statistics import LayerStatistics

Inputs = Iterable[tuple[int, torch.nn.Module]]
"""Number of the decoder layer and module, whose first argument is multiplied by a matrix that is rounded."""


class PrecisionMetrics:
    """Looks at the inputs and the weights of every so many rollouts."""

    def __init__(self, config: JobConfig) -> None:
        self._interval = config.precision.precision_metrics_interval
        self._training, self._rollout = training_recipe(config), rollout_recipe(config)
        self._inputs: InputStatistics | None = None

    def due(self, number: int) -> bool:
        """Whether this rollout is looked at; it is the same on every rank."""
        return self._interval > 0 and number % self._interval == 0

    @contextlib.contextmanager
    def observing(self, modules_of: Callable[[Recipe], Inputs]) -> Iterator[None]:
        """Look at the inputs of modules that a recipe covers inside the block, in passes with gradient alone.

        Others may be of a reference that takes the policy's place.
        """
        recipe = next((each for each in (self._training, self._rollout) if each and each.rounds_inputs), None)
        if recipe is None:  # weights alone are rounded
            yield
            return
        statistics = self._inputs = InputStatistics(weight_format(recipe))
        handles = [module.register_forward_pre_hook(_looker(statistics, layer)) for layer, module in modules_of(recipe)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def metrics(self, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Of the inputs that were observed and of complete weights in the type of the engines, the same on every rank;
        collective: each rank looks at a share of the tensors that all of them are given."""
        own = WeightStatistics(self._training, self._rollout)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for index, (name, weight) in enumerate(weights):
            if index % ranks == rank:
                own.add(name, weight)
        inputs = {} if self._inputs is None else self._inputs.layers
        self._inputs = None
        found: list[tuple[dict[int, LayerStatistics], dict[int, LayerStatistics]]] = [({}, {}) for _ in range(ranks)]
        dist.all_gather_object(found, (own.layers, inputs))
        by_weight, by_input = zip(*found, strict=True)
        return weight_metrics(merged(by_weight)) | input_metrics(merged(by_input))


def _looker(statistics: InputStatistics, layer: int) -> Any:
    def look(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            statistics.add(layer, arguments[0].detach())

    return look
