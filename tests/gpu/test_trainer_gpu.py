"""The FSDP backend on a GPU: variable-length kernels, 16-bit training, NCCL."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trainer_cases import job_config, random_groups, write_dense_model, write_moe_model

from miles.services.trainer.backends.fsdp.attention.packed_attention import AttentionPlan, packed_attention
from miles.services.trainer.backends.fsdp.backend import FsdpBackend
from miles.services.trainer.batch.packing import pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=CUDA)
    yield
    dist.destroy_process_group()


def weights_after_one_step(model: pathlib.Path, groups: list[Any], **changes: Any) -> dict[str, torch.Tensor]:
    """A step of Adam with a large epsilon, which is proportional to the gradient."""
    config = job_config(model, device="cuda", distributed_backend="nccl", adam_eps=1.0, lr=1.0, clip_grad=0, **changes)
    backend = FsdpBackend(config, model / "checkpoints", CUDA)
    backend.load()
    metrics = backend.train(0, groups, lambda progress: None)
    assert metrics["train/ppo_kl"] == 0
    return {name: tensor.float().cpu() for name, tensor in backend.export()}


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("share", [False, True])
def test_variable_length_kernels_attend_as_tiles_do(share: bool, window: int | None) -> None:
    samples = [sample for group in random_groups(5, range(5)) for sample in group.samples]
    micro_batch = pack(samples, range(len(samples)), share_prompts=share)
    torch.manual_seed(0)
    shapes = [(1, heads, micro_batch.num_rows, 32) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    results = []
    for varlen in (True, False):
        plan = AttentionPlan(micro_batch.segments, CUDA, torch.bfloat16, varlen=varlen)
        assert plan.use_varlen is varlen
        out, _ = packed_attention(torch.nn.Identity(), *inputs, None, sliding_window=window, attention_plan=plan)
        weight = torch.linspace(-1, 1, out.numel(), device=CUDA).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for fast, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast.float(), exact.float(), rtol=0.05, atol=0.05)


def test_float32_gives_the_gradient_of_the_cpu(tmp_path: pathlib.Path) -> None:
    model, groups = write_dense_model(tmp_path / "model"), random_groups(2)
    on_gpu = weights_after_one_step(model, groups)
    config = job_config(model, adam_eps=1.0, lr=1.0, clip_grad=0)
    backend = FsdpBackend(config, model / "checkpoints", torch.device("cpu"))
    backend.load()
    backend.train(0, groups, lambda progress: None)
    assert_close(on_gpu, dict(backend.export()), 1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": True},
        {"attn_implementation": "sdpa"},
        {"torch_compile": True},
        {"torch_compile": True, "gradient_checkpointing": True},
    ],
)
@pytest.mark.parametrize("share", [False, True])
def test_bfloat16_stays_near_float32(tmp_path: pathlib.Path, share: bool, changes: dict[str, Any]) -> None:
    model, groups = write_dense_model(tmp_path / "model"), random_groups(2)
    exact = weights_after_one_step(model, groups)
    assert_close(
        weights_after_one_step(model, groups, train_dtype="bfloat16", share_prompts=share, **changes), exact, 0.02
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routing_is_replayed(tmp_path: pathlib.Path, checkpointing: bool) -> None:
    model, groups = write_moe_model(tmp_path / "model"), random_groups(8, routing=(8, 2, 2))
    changes = {"use_rollout_routing_replay": True, "share_prompts": False}
    exact = weights_after_one_step(model, groups, **changes)
    half = weights_after_one_step(
        model, groups, train_dtype="bfloat16", gradient_checkpointing=checkpointing, **changes
    )
    assert_close(half, exact, 0.02)
    free = weights_after_one_step(model, groups, share_prompts=False)
    assert any((free[name] - exact[name]).abs().max() > 1e-3 for name in free if "gate" in name)


def test_a_checkpoint_resumes_on_the_gpu(tmp_path: pathlib.Path) -> None:
    config = job_config(write_dense_model(tmp_path / "model"), device="cuda", distributed_backend="nccl")
    first = FsdpBackend(config, tmp_path / "checkpoints", CUDA)
    state = first.load()
    state.finish_step(first.train(0, random_groups(0), lambda progress: None))
    first.save(tmp_path / "checkpoints" / "step_00000001", state)
    second = FsdpBackend(config, tmp_path / "checkpoints", CUDA)
    assert second.load() == state
    for backend in (first, second):
        backend.train(1, random_groups(1), lambda progress: None)
    assert_close(dict(first.export()), dict(second.export()), 1e-5)


@pytest.mark.parametrize("changes", [{}, {"torch_compile": True}, {"lora_rank": 2}], ids=["plain", "compiled", "lora"])
def test_a_trainer_that_has_left_the_gpu_goes_on_as_if_it_had_not(
    tmp_path: pathlib.Path, changes: dict[str, Any]
) -> None:
    model = write_dense_model(tmp_path / "model", hidden_size=1024, intermediate_size=4096)
    config = job_config(
        model, device="cuda", distributed_backend="nccl", train_dtype="bfloat16", rollout_dtype="bfloat16", **changes
    )
    results = []
    for leaves in (False, True):
        gc.collect()
        others = torch.cuda.memory_allocated()
        backend = FsdpBackend(config, tmp_path / "checkpoints", CUDA)
        backend.load()
        for step in range(3):
            backend.train(step, random_groups(step), lambda progress: None)
            if leaves:
                held = torch.cuda.memory_allocated() - others
                moved = backend.release_memory()
                assert torch.cuda.memory_allocated() - others < 0.05 * held
                assert moved.nbytes > 0.95 * held
                assert backend.restore_memory().nbytes == moved.nbytes
        results.append({name: tensor.float().cpu() for name, tensor in backend.export()})
        backend.close()
    for name, tensor in results[0].items():
        assert tensor.equal(results[1][name]), name


def test_old_actors_resume_in_host_memory(tmp_path: pathlib.Path) -> None:
    keep = {"keep_old_actor": True, "max_weight_staleness": 1}
    config = job_config(write_dense_model(tmp_path / "model"), device="cuda", distributed_backend="nccl", **keep)
    first, second = (FsdpBackend(config, tmp_path / "checkpoints", CUDA) for _ in range(2))
    state = first.load()
    state.finish_step(first.train(0, random_groups(0), lambda progress: None))
    first.save(tmp_path / "checkpoints" / "step_00000001", state)
    second.load()
    kept, resumed = (backend._loaded.roles.old_policies.copies[0].tensors for backend in (first, second))
    assert all(tensor.is_cpu and tensor.equal(resumed[name]) for name, tensor in kept.items())
