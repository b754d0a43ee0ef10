import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles.services.trainer.backends.parking import _CHUNK_BYTES, Held, Parking

CPU = torch.device("cpu")


def parking(*kept: torch.Tensor, scratch: tuple[torch.Tensor, ...] = ()) -> Parking:
    return Parking(Held(lambda: kept, lambda: scratch), CPU)


def test_contents_come_back_and_nothing_is_held_between() -> None:
    tensors = [torch.randn(1000), torch.arange(7, dtype=torch.int64), torch.randn(3, 5).bfloat16()]
    before = [tensor.clone() for tensor in tensors]
    parked = parking(*tensors)

    out = parked.park()
    assert parked.is_parked
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0, 0]
    assert out.nbytes == sum(tensor.nbytes for tensor in before)

    back = parked.restore()
    assert not parked.is_parked
    assert back.nbytes == out.nbytes
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)


def test_views_share_their_storage_before_and_after() -> None:
    flat = torch.randn(64)
    first, second = flat[:32], flat[32:].view(4, 8)
    whole = flat.clone()
    parked = parking(first, second)

    assert parked.park().nbytes == whole.nbytes
    parked.restore()
    assert torch.equal(flat, whole)
    flat.add_(1)
    assert torch.equal(second, (whole + 1)[32:].view(4, 8))


def test_parameters_keep_training_as_if_nothing_had_happened() -> None:
    def trained(park_between: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

        def kept() -> list[torch.Tensor]:
            state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
            return [*model.parameters(), *state]

        parked = Parking(Held(kept), CPU)
        for step in range(3):
            model(torch.full((2, 8), float(step))).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if park_between:
                parked.park()
                parked.restore()
        return [p.detach().clone() for p in model.parameters()]

    for one, other in zip(trained(False), trained(True), strict=True):
        assert torch.equal(one, other)


def test_scratch_comes_back_as_zeros_and_takes_no_host_memory() -> None:
    gradients = torch.ones(100)
    parked = parking(scratch=(gradients,))
    assert parked.park().nbytes == 400
    assert parked.host_bytes == 0
    parked.restore()
    assert torch.equal(gradients, torch.zeros(100))


def test_a_tensor_that_is_both_kept_and_scratch_is_scratch() -> None:
    buffer = torch.ones(100)
    parked = parking(buffer[:50], scratch=(buffer,))
    assert parked.park().nbytes == 400
    assert parked.host_bytes == 0


def test_a_tensor_larger_than_a_chunk_of_host_memory() -> None:
    large = torch.arange(_CHUNK_BYTES // 4 + 1000, dtype=torch.int32)
    small = torch.arange(5)
    before = large.clone()
    parked = parking(small, large)
    parked.park()
    assert parked.host_bytes == 2 * _CHUNK_BYTES
    parked.restore()
    assert torch.equal(large, before)
    assert torch.equal(small, torch.arange(5))


def test_what_has_appeared_since_is_parked_too_in_the_same_host_memory() -> None:
    tensors = [torch.ones(10)]
    parked = Parking(Held(lambda: tensors), CPU)
    parked.park()
    parked.restore()
    tensors.append(torch.full((20,), 2.0))
    assert parked.park().nbytes == 120
    assert parked.host_bytes == _CHUNK_BYTES
    parked.restore()
    assert torch.equal(tensors[1], torch.full((20,), 2.0))


@pytest.mark.parametrize("times", [2, 3])
def test_repeats_do_nothing(times: int) -> None:
    tensor = torch.ones(4)
    parked = parking(tensor)
    assert [parked.park().nbytes for _ in range(times)] == [16, *[0] * (times - 1)]
    assert [parked.restore().nbytes for _ in range(times)] == [16, *[0] * (times - 1)]


def test_a_mapped_file_stays_where_it_is(tmp_path: pathlib.Path) -> None:
    save_file({"weight": torch.ones(8)}, tmp_path / "model.safetensors")
    weight = load_file(tmp_path / "model.safetensors")["weight"]
    parked = parking(weight)
    assert parked.park().nbytes == 0
    assert torch.equal(weight, torch.ones(8))
