"""Weights that are held in one type and computed with in another, where one process holds the model."""

from __future__ import annotations

import pytest
import torch

from miles.services.trainer.backends.fsdp.model import working_weights
from miles.services.trainer.backends.fsdp.model.working_weights import WorkingWeights


class Tied(torch.nn.Module):
    """An embedding whose weight is the head's too, and a layer that is held in the type of the computation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(5, 4)
        self.layer = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        self.norm = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.layer(self.embedding(ids))))
        return logits


@pytest.fixture
def model() -> Tied:
    return Tied()


@pytest.fixture
def weights(model: Tied) -> WorkingWeights:
    return WorkingWeights.of(model, torch.bfloat16)


def loss_of(model: Tied, *ids: int) -> torch.Tensor:
    return model(torch.tensor(ids)).float().square().sum()


def test_a_model_computes_in_one_type_and_holds_its_weights_in_another(model: Tied, weights: WorkingWeights) -> None:
    masters = dict(model.named_parameters())
    with weights.in_use():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.embedding.weight.equal(masters["embedding.weight"].bfloat16())
        assert model(torch.tensor([1])).dtype == torch.bfloat16
    assert all(parameter is masters[name] for name, parameter in model.named_parameters())
    assert model.embedding.weight.dtype == torch.float32


def test_tied_weights_stay_tied_in_use(model: Tied, weights: WorkingWeights) -> None:
    with weights.in_use():
        assert model.head.weight is model.embedding.weight
    assert model.head.weight is model.embedding.weight


def test_a_weight_of_the_type_of_the_computation_is_used_itself(model: Tied, weights: WorkingWeights) -> None:
    own, norm = model.layer.weight, model.norm.weight
    with weights.in_use():
        assert model.layer.weight is own
        assert model.norm.weight is not norm


def test_gradients_of_micro_batches_add_up_in_the_masters_type(model: Tied, weights: WorkingWeights) -> None:
    alone = []
    for ids in ((1, 2, 3), (0, 4)):
        with weights.in_use():
            loss_of(model, *ids).backward()
        assert model.norm.weight.grad is not None
        alone.append(model.norm.weight.grad.clone())
        model.zero_grad(set_to_none=True)
    with weights.in_use():
        loss_of(model, 1, 2, 3).backward()
        loss_of(model, 0, 4).backward()
    assert model.norm.weight.grad is not None
    assert model.norm.weight.grad.dtype == torch.float32
    assert model.norm.weight.grad.equal(alone[0] + alone[1])


def test_gradients_go_on_adding_up_in_the_next_use_until_they_are_cleared(model: Tied, weights: WorkingWeights) -> None:
    for _ in range(2):
        with weights.in_use():
            loss_of(model, 1, 2).backward()
    assert model.embedding.weight.grad is not None
    twice = model.embedding.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    with weights.in_use():
        loss_of(model, 1, 2).backward()
    assert twice.equal(2 * model.embedding.weight.grad)


def test_the_next_use_computes_with_what_the_optimizer_made_of_the_masters(
    model: Tied, weights: WorkingWeights
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with weights.in_use():
        loss_of(model, 1, 2).backward()
    before = model.embedding.weight.detach().clone()
    optimizer.step()
    assert not model.embedding.weight.equal(before)
    after = model.embedding.weight.detach().bfloat16()
    with weights.in_use():
        assert model.embedding.weight.equal(after)
        assert not model.embedding.weight.equal(before.bfloat16())


def test_frozen_weights_get_no_gradient(model: Tied) -> None:
    model.embedding.requires_grad_(False)
    weights = WorkingWeights.of(model, torch.bfloat16)
    with weights.in_use():
        loss_of(model, 1, 2).backward()
    assert model.embedding.weight.grad is None
    assert model.norm.weight.grad is not None


def test_an_error_in_use_leaves_the_masters_in_the_model(model: Tied, weights: WorkingWeights) -> None:
    master = model.embedding.weight
    with pytest.raises(IndexError), weights.in_use():
        model(torch.tensor([99]))
    assert model.embedding.weight is master


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("out of memory")


def fail_in_backward(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
    output.register_hook(fail)


def test_an_error_in_a_backward_pass_is_raised_itself_and_drops_the_gradients_that_wait(
    model: Tied, weights: WorkingWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = weights._copies[model.norm.weight]
    failing = model.layer.register_forward_hook(fail_in_backward)  # the norm behind it has its gradient by then

    def use() -> None:
        with weights.in_use():
            loss = loss_of(model, 1, 2)
            no_memory.setattr(torch, "empty_like", lambda *_, **__: pytest.fail("gradients are cast after an error"))
            loss.backward()

    with monkeypatch.context() as no_memory, pytest.raises(RuntimeError, match="out of memory"):
        use()
    assert model.norm.weight is not copy
    assert copy.untyped_storage().nbytes() == 0
    assert all(parameter.grad is None for parameter in model.parameters())

    failing.remove()
    gradients = []
    for used in (weights, WorkingWeights.of(model, torch.bfloat16)):
        with used.in_use():
            loss_of(model, 3, 4).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad(set_to_none=True)
    for after, fresh in zip(*gradients, strict=True):
        assert after is not None
        assert after.equal(fresh)


def test_gradients_that_cannot_be_cast_leave_the_masters_in_the_model(
    model: Tied, weights: WorkingWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = model.norm.weight

    def use() -> None:
        with weights.in_use():
            loss_of(model, 1, 2).backward()
            no_memory.setattr(torch, "empty_like", fail)

    with monkeypatch.context() as no_memory, pytest.raises(RuntimeError, match="out of memory"):
        use()
    assert model.norm.weight is master
    assert weights._copies[master].untyped_storage().nbytes() == 0


def test_a_model_that_computes_in_the_type_that_it_is_held_in_has_no_copies(model: Tied) -> None:
    weights = WorkingWeights.of(model.bfloat16(), torch.bfloat16)
    own = dict(model.named_parameters())
    with weights.in_use():
        assert all(parameter is own[name] for name, parameter in model.named_parameters())
        loss_of(model, 1, 2).backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.dtype == torch.bfloat16


def test_copies_hold_memory_only_while_they_are_in_use(model: Tied, weights: WorkingWeights) -> None:
    with weights.in_use():
        copy = model.embedding.weight
        assert copy.untyped_storage().nbytes() > 0
    assert copy.untyped_storage().nbytes() == 0


def test_gradients_are_cast_together_and_in_pieces_of_bounded_size(
    model: Tied, weights: WorkingWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast: list[int] = []
    foreach = torch._foreach_copy_

    def counted(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        cast.append(len(sources))
        foreach(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    gradients = []
    for limit in (2**20, 1):
        monkeypatch.setattr(working_weights, "_CAST_BYTES", limit)
        cast.clear()
        with weights.in_use():
            loss_of(model, 1, 2, 3).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad(set_to_none=True)
        masters = sum(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert cast == ([masters, masters] if limit > 1 else [masters, *[1] * masters])  # the first casts the weights
    for together, one_by_one in zip(*gradients, strict=True):
        assert together is not None
        assert together.equal(one_by_one)
