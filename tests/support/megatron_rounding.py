"""Compares, on every rank of a layout, what Megatron's layers multiply with what engines are sent."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from backend_cases import exported, hand_out
from trainer_cases import job_config, random_groups

from miles.config import JobConfig
from miles.precision.of_run import training_recipe
from miles.precision.tensors import QuantisedTensors, restored
from miles.services.trainer.ranks.collective_calls import Ranks
from miles.services.trainer.ranks.worker import create_backend


def run_case(case: dict[str, Any], out: pathlib.Path) -> None:
    """Rank 0 writes `NAME.json`: names of weights that layers round otherwise, and the largest difference of gradients.

    A case has name, model, flags and routing as those of `backend_cases`.
    """
    flags = {"lr": 0.0, "weight_decay": 0.0, "clip_grad": 0.0, "log_samples_per_step": 0, **case["flags"]}
    folder = pathlib.Path(case["model"])
    config = job_config(folder, actor_num_gpus_per_node=dist.get_world_size(), **flags)
    backend: Any = create_backend(config, out / case["name"], torch.device("cpu"))
    backend.load()
    held = exported(backend)
    metrics, gradients = train(backend, case)
    covered = round_parameters(backend)
    served = {name: tensor for name, tensor in exported(backend).items() if not _is_buffer(tensor)}
    expected = as_engines_have(config, held)
    other = [name for name, tensor in served.items() if not tensor.equal(expected[name])]
    unrounded, again = train(backend, case)
    said = {
        "other": other,
        "parameters": covered,
        "rounded": sorted(name for name, tensor in served.items() if not tensor.equal(held[name])),
        "metrics": [metrics, unrounded],
        "gradients": max(float((a - b).abs().max()) for a, b in zip(gradients, again, strict=True)),
        "gradient": max(float(a.abs().max()) for a in gradients),
    }
    if dist.get_rank() == 0:
        (out / f"{case['name']}.json").write_text(json.dumps(said))
    backend.close()


def train(backend: Any, case: dict[str, Any]) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics and gradients of a step that moves nothing."""
    routing = case.get("routing")
    handed, schedule = hand_out(backend, Ranks(), random_groups(0, routing=tuple(routing) if routing else None))
    metrics = dict(backend.train(0, handed, lambda progress: None, schedule=schedule))
    return metrics, [part.clone() for part in backend._loaded.roles.policy.model.gradient_buffers()]


def round_parameters(backend: Any) -> int:
    """Put in the place of each parameter what its layer multiplies instead of it, and have layers round no more.

    Returns how many there are on this rank. Inputs are rounded no more either.
    """
    count = 0
    with torch.no_grad():
        for module in _layers(backend):
            for name, rounding in module.roundings.items():
                parameter = getattr(module, name)
                parameter.copy_(rounding.weight(parameter))
                count += 1
            module.roundings.clear()
    return count


def as_engines_have(config: JobConfig, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What engines make of the exported parts."""
    recipe = training_recipe(config)
    assert recipe is not None
    quantised = QuantisedTensors(recipe)
    sent = {part: tensor for name, weight in held.items() for part, tensor in quantised.convert(name, weight)}
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    return restored(recipe, shapes, sent, next(iter(held.values())).dtype)


def _layers(backend: Any) -> Iterator[Any]:
    for chunk in backend._loaded.roles.policy.model.bare_chunks:
        yield from (module for module in chunk.modules() if hasattr(module, "roundings"))


def _is_buffer(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 0


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
