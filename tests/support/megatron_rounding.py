"""Compares, on every rank of a layout, what Megatron's layers multiply with what engines are sent."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from backend_cases import exported, hand_out
from trainer_cases import job_config, random_groups

from miles.precision.of_run import training_recipe
from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors, restored
from miles.services.trainer.backends.megatron.precision.rounding import ParameterRounding
from miles.services.trainer.ranks.collective_calls import Ranks
from miles.services.trainer.ranks.worker import create_backend


def run_case(case: dict[str, Any], out: pathlib.Path) -> None:
    """Train with layers that round, and with ones that hold rounded weights; rank 0 writes `NAME.json`.

    A case has name, model, flags and routing as those of `backend_cases`. The file has "covered": the exported weights
    that the recipe covers, "rounded": those that layers change, "other": those, and ones that it does not cover, that
    are not what engines make of the exported parts, "metrics" of both steps, "gradients": their largest difference, and
    "gradient": the largest number in one; or "refused": why the model was not built.
    """
    flags = {"lr": 0.0, "weight_decay": 0.0, "clip_grad": 0.0, "log_samples_per_step": 0, **case["flags"]}
    folder = pathlib.Path(case["model"])
    config = job_config(folder, actor_num_gpus_per_node=dist.get_world_size(), **flags)
    backend: Any = create_backend(config, out / case["name"], torch.device("cpu"))
    try:
        backend.load()
    except ValueError as error:
        backend.close()
        write(case, out, {"refused": str(error)})
        return
    held = exported(backend)
    metrics, gradients = train(backend, case)
    round_parameters(backend)
    served = exported(backend)
    recipe = training_recipe(config)
    assert recipe is not None
    expected = as_engines_have(recipe, held)
    other = [name for name, tensor in served.items() if not tensor.equal(expected[name])]
    unrounded, again = train(backend, case)
    said = {
        "covered": sorted(name for name, tensor in held.items() if recipe.layers.cover(name, tensor.dim())),
        "other": other,
        "rounded": sorted(name for name, tensor in served.items() if not tensor.equal(held[name])),
        "metrics": [metrics, unrounded],
        "gradients": largest((a - b for a, b in zip(gradients, again, strict=True))),
        "gradient": largest(gradients),
    }
    backend.close()
    write(case, out, said)


def write(case: dict[str, Any], out: pathlib.Path, said: dict[str, Any]) -> None:
    """Rank 0 writes the case's file."""
    if dist.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(said))


def train(backend: Any, case: dict[str, Any]) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics and gradients of a step that moves nothing."""
    routing = case.get("routing")
    handed, schedule = hand_out(backend, Ranks(), random_groups(0, routing=tuple(routing) if routing else None))
    found = backend.train(0, handed, lambda progress: None, schedule=schedule)
    metrics = {name: value for name, value in found.items() if name.startswith("train/")}
    return metrics, [part.clone() for part in backend._loaded.roles.policy.model.gradient_buffers()]


def largest(parts: Iterable[torch.Tensor]) -> float:
    """The largest magnitude in them on any rank."""
    found = torch.stack([part.abs().max() for part in parts]).max()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def round_parameters(backend: Any) -> None:
    """Give each parameter the values that its layer multiplies, and have layers round inputs alone."""
    with torch.no_grad():
        for module in _layers(backend):
            for name, rounding in module.roundings.items():
                parameter = getattr(module, name)
                parameter.copy_(rounding.weight(parameter))
                module.roundings[name] = InputsAlone(rounding)


class InputsAlone(ParameterRounding):
    """Leaves weights as they are."""

    def __init__(self, rounding: ParameterRounding) -> None:
        self._format = rounding._format

    def weight(self, weight_OI: torch.Tensor) -> torch.Tensor:
        return weight_OI


def as_engines_have(recipe: Recipe, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What engines make of the exported parts."""
    quantised = QuantisedTensors(recipe)
    sent = {part: tensor for name, weight in held.items() for part, tensor in quantised.convert(name, weight)}
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    return restored(recipe, shapes, sent, next(iter(held.values())).dtype)


def _layers(backend: Any) -> Iterator[Any]:
    for chunk in backend._loaded.roles.policy.model.bare_chunks:
        yield from (module for module in chunk.modules() if hasattr(module, "roundings"))


def main(cases_file: str, out: str) -> None:
    """Run every case of a JSON file under torchrun."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for case in json.loads(pathlib.Path(cases_file).read_text()):
            run_case(case, pathlib.Path(out))
            print("done", case["name"], flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
