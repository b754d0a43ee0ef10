"""A few optimizer steps of a trainer backend over any number of ranks, and their results."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from trainer_cases import divert, job_config, random_groups, set_own_routing

from miles.services.trainer.backends.fsdp.export import local_tensor
from miles.services.trainer.backends.protocol import TrainerBackend
from miles.services.trainer.batch.rollout_batch import in_order
from miles.services.trainer.batch.rollout_schedule import RolloutSchedule
from miles.services.trainer.ranks.abandoning import Abandonment, StepAbandonedError
from miles.services.trainer.ranks.collective_calls import Ranks
from miles.services.trainer.ranks.worker import create_backend
from miles.services.trainer.step.progress import Progress
from miles.types import SampleGroup, VersionSpan

STEPS = 3


def run_case(case: dict[str, Any], out: pathlib.Path) -> None:
    """Carry out a case on every rank; rank 0 writes `NAME.json` (metrics) and `NAME.safetensors` (exported weights).

    A case has: name, model (folder), flags (changes of the configuration), routing (experts, layers, top-k) or None,
    and optionally own_routing (samples have the routing of the folder's model, but for every fifth token, or as
    divert_every says), seed (of every step's groups), steps, swap (everything is moved to host memory and back before
    each call; the JSON file has the bytes), save_at, save_in_background (until the next step was taken), save_hf,
    reward (of every sample), off_policy for samples of two versions, abandon_at: at which of rank 0's reports each
    step is left before it is taken, and on_gpus: settings of Megatron that only GPUs have, which CPU stand-ins imitate;
    see `tests/integration/test_megatron_layouts.py`; and break: in which steps the gradient that comes back through
    which module (part of its name) of rank 0 is NaN. The JSON file has the warnings of each step.
    """
    name, routing = case["name"], case.get("routing")
    config = job_config(
        pathlib.Path(case["model"]),
        **{"actor_num_gpus_per_node": dist.get_world_size(), "log_samples_per_step": 0, **case["flags"]},
    )
    config = config.model_copy(update={"megatron": config.megatron.model_copy(update=case.get("on_gpus", {}))})
    backend = create_backend(config, out / name / "checkpoints", device())
    state = backend.load()
    metrics, warnings, saving, moved = [], [], None, []
    ranks = Ranks()
    for step in range(state.step, case.get("steps", STEPS)):
        groups = random_groups(case.get("seed", step), routing=tuple(routing) if routing else None)
        if case.get("own_routing"):
            set_own_routing(pathlib.Path(case["model"]), groups)
            if every := case.get("divert_every", 5):
                divert(groups, every)
        for sample in (s for group in groups for s in group.samples):
            sample.reward = case.get("reward", sample.reward)
            sample.metadata["opd_teacher"] = "odd" if sample.index % 2 else "even"
        if case.get("off_policy"):
            exported(backend)  # as engines get each version
            for sample in (s for group in groups for s in group.samples):
                sample.weight_versions = two_versions(sample.response_length, step)
        handed, schedule = hand_out(backend, ranks, groups)
        if "abandon_at" in case:
            leave(backend, ranks, step, handed, schedule, case["abandon_at"])
        swap(case, backend, moved)
        with breaking(backend, case.get("break", {}), step):
            metrics.append(dict(backend.train(step, handed, lambda progress: None, schedule=schedule)))
        warnings.append(list(backend.warnings))
        state.finish_step({})
        if saving is not None:
            saving.finish()
            saving = None
        swap(case, backend, moved)
        if case.get("save_at") == step + 1:
            folder = out / name / "checkpoints" / f"step_{step + 1:08d}"
            if case.get("save_in_background"):
                saving = backend.begin_save(folder, state)
            else:
                backend.save(folder, state)
    swap(case, backend, moved)
    weights = exported(backend)
    by_rank: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, moved)
    swap(case, backend, moved)
    layout = [[n, str(dtype), list(shape)] for n, dtype, shape in backend.export_layout()]
    if case.get("save_hf"):
        backend.save_hf(out / name / "hf")
    gathered = [export_changes(backend, last_rank_changes=changes) for changes in (False, True, False)]
    if dist.get_rank() == 0:
        save_file(weights, out / f"{name}.safetensors")
        swaps: dict[str, Any] = {"moved": moved, "moved_by_rank": by_rank, "parameters": parameter_names(backend)}
        swaps["base"] = None if backend.lora is None else backend.lora.base_checksum.hex()
        said = {"metrics": metrics, "layout": layout, "gathered": gathered, "total": sum(map(nbytes, weights.values()))}
        (out / f"{name}.json").write_text(json.dumps(said | swaps | {"warnings": warnings}))
    backend.close()


def swap(case: dict[str, Any], backend: TrainerBackend, moved: list[int]) -> None:
    """Move everything to host memory and back, if the case asks for it, and note how many bytes."""
    if case.get("swap"):
        moved.append(backend.release_memory().nbytes)
        assert backend.restore_memory().nbytes == moved[-1]


@contextlib.contextmanager
def breaking(backend: Any, where: dict[str, Any], step: int) -> Iterator[None]:
    """In chosen steps, make NaN of the gradient that comes back through a module."""
    if step not in where.get("steps", ()) or dist.get_rank() != 0:
        yield
        return
    held = backend._loaded.roles.policy.model
    models = held.bare_chunks if hasattr(held, "bare_chunks") else [held]
    module = next(m for model in models for name, m in model.named_modules() if where["module"] in name)

    def broken(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        return (Broken.apply(output[0]), *output[1:]) if isinstance(output, tuple) else Broken.apply(output)

    handle = module.register_forward_hook(broken)
    try:
        yield
    finally:
        handle.remove()


class Broken(torch.autograd.Function):
    """What it is given, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("nan")


def hand_out(
    backend: TrainerBackend, ranks: Ranks, groups: Sequence[SampleGroup]
) -> tuple[Sequence[SampleGroup], RolloutSchedule | None]:
    """As the trainer does: rank 0 has the groups, and every rank gets the routed experts of its own samples alone."""
    if ranks.exchange is None:
        return groups, None
    handed, schedule = ranks.exchange.hand_out(groups if ranks.rank == 0 else None, backend)
    had = [sample.rollout_routed_experts is not None for sample in in_order(groups)]
    own = set(schedule.share(backend.replica))
    for i, sample in enumerate(in_order(handed)):
        experts = sample.rollout_routed_experts
        assert experts is None or i in own or ranks.rank == 0
        assert experts is not None or i not in own or not (ranks.rank and had[i])
    return handed, schedule


def leave(
    backend: TrainerBackend,
    ranks: Ranks,
    step: int,
    groups: Sequence[SampleGroup],
    schedule: RolloutSchedule | None,
    number: int,
) -> None:
    """Begin a step and have rank 0 leave it at one of its reports, and with it the others."""
    abandonment = Abandonment(ranks.share)
    reports: list[Progress] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        if ranks.rank == 0 and len(reports) == number + 1:
            assert abandonment.request()

    try:
        backend.train(step, groups, report, abandonment, schedule)
    except StepAbandonedError:
        return
    raise AssertionError(f"step {step} was taken; rank {ranks.rank} reported {len(reports)} times")


def two_versions(length: int, newest: int) -> tuple[VersionSpan, ...]:
    """The first half of a response is of an older version."""
    half = length // 2
    older = () if half == 0 else (VersionSpan(max(0, newest - 2), 0, half),)
    return (*older, VersionSpan(newest, half, length)) if newest else (VersionSpan(0, 0, length),)


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def exported(backend: TrainerBackend) -> dict[str, torch.Tensor]:
    """The exported weights by name; collective."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in backend.export()}


def export_changes(backend: Any, *, last_rank_changes: bool) -> int:
    """Have rank 0 get the weights, and compare them with those that all ranks gather; return the bytes gathered."""
    if last_rank_changes and dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            first: Any = next(iter(backend._loaded.roles.policy.model.parameters()))
            weight = first[1] if isinstance(first, tuple) else first  # Megatron's come with their names
            local_tensor(weight).view(-1)[:1] += 1.0
    at_first = {name: tensor.clone() for name, tensor in backend.export_to_first()}
    everywhere = exported(backend)
    if dist.get_rank() == 0:
        assert list(at_first) == list(everywhere)
        assert all(at_first[name].to(tensor).equal(tensor) for name, tensor in everywhere.items())
    gathered: int = backend._loaded.changed.gathered_bytes
    return gathered


def parameter_names(backend: Any) -> list[str]:
    """This rank's, where the backend names them (Megatron's does)."""
    own = list(backend._loaded.roles.policy.model.parameters())
    return [each[0] for each in own if isinstance(each, tuple)]


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes


def main(cases_file: str, out: str) -> None:
    """Run every case of a JSON file, one after the other, in this process or under torchrun."""
    torch.set_num_threads(1)
    backend = "gloo"
    if device().type == "cuda":
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        for case in json.loads(pathlib.Path(cases_file).read_text()):
            run_case(case, pathlib.Path(out))
            print("done", case["name"], flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
