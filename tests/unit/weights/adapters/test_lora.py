"""Merging adapters: the arithmetic, names, the identity of a base, and what an engine makes of an adapter that came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pytest
import torch

from miles.rpc.gen import policy_pb2
from miles.weights import manifest as manifests
from miles.weights.adapters import lora
from miles.weights.adapters.merging import AdapterBase
from miles.weights.dtypes import wire_dtype
from miles.weights.manifest import ChecksumMismatch, ManifestError

RANK = 4
LAYERS = ("model.layers.0.q_proj", "model.layers.1.up_proj")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    weights = {f"{layer}.weight": random(6, 10, seed=i) for i, layer in enumerate(LAYERS)}
    return {name: t.to(dtype) for name, t in {**weights, "model.norm.weight": random(10)}.items()}


def adapter(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    tensors = {}
    for i, layer in enumerate(LAYERS):
        a_name, b_name = lora.adapter_names(f"{layer}.weight")
        tensors[a_name] = random(RANK, 10, seed=seed + i).to(dtype)
        tensors[b_name] = random(6, RANK, seed=seed - i).to(dtype)
    return tensors


def manifest_of(tensors: Mapping[str, torch.Tensor], identity: bytes, alpha: float = 8.0) -> policy_pb2.Manifest:
    descriptors, total = manifests.plan((n, wire_dtype(t.dtype), tuple(t.shape)) for n, t in tensors.items())
    for descriptor in descriptors:
        data = tensors[descriptor.name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        descriptor.checksum = manifests.checksum(data)
    version = policy_pb2.WeightVersion(job_id="job", stream=policy_pb2.WEIGHT_STREAM_POLICY, version=3)
    described = policy_pb2.LoraAdapter(rank=RANK, alpha=alpha, base_checksum=identity)
    return manifests.build(version, descriptors, total, 3, described)


class Received:
    """Tensors at hand."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.released = False

    def release(self) -> bool:
        self.released = True
        return True


def identity(weights: Mapping[str, torch.Tensor]) -> bytes:
    return lora.base_checksum(weights.items(), torch.bfloat16)


@pytest.mark.parametrize("rank", [1, 4, 200])
def test_merging_rounds_the_exact_sum_once(rank: int) -> None:
    weight_OI, a_RI, b_OR = random(33, 47), random(rank, 47, seed=1), random(33, rank, seed=2)
    exact = weight_OI.double() + 0.3 * (b_OR.double() @ a_RI.double())
    torch.testing.assert_close(lora.merged(weight_OI, a_RI, b_OR, 0.3).double(), exact, rtol=1e-5, atol=1e-5)
    low = [x.bfloat16() for x in (weight_OI, a_RI, b_OR)]
    exact = low[0].double() + 0.3 * (low[2].double() @ low[1].double())
    rounded = lora.merged(low[0], low[1], low[2], 0.3)
    assert rounded.dtype == torch.bfloat16
    # A sum in float32 may fall on the other side of the middle between two numbers, but seldom.
    assert (rounded != exact.bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(100, 37, 256), (64, 64, 4), (576, 192, 33)])
def test_merging_does_not_depend_on_the_number_of_threads(shape: tuple[int, int, int]) -> None:
    outputs, inputs, rank = shape
    parts = random(outputs, inputs), random(rank, inputs, seed=1), random(outputs, rank, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(lora.merged(*parts, 0.3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_an_adapter_of_zeros_changes_nothing() -> None:
    weight_OI = random(8, 8).bfloat16()
    assert torch.equal(lora.merged(weight_OI, random(2, 8), torch.zeros(8, 2), 3.0), weight_OI)


def test_an_a_without_its_b_is_named() -> None:
    tensors = adapter(5)
    a_name, b_name = lora.adapter_names("model.layers.0.q_proj.weight")
    assert a_name == "base_model.model.model.layers.0.q_proj.lora_A.weight"
    assert lora.adapted_weights(tensors) == [f"{layer}.weight" for layer in LAYERS]
    del tensors[b_name]
    with pytest.raises(ManifestError, match="lora_B"):
        lora.adapted_weights(tensors)


def test_the_identity_of_a_base_is_of_its_names_shapes_and_bytes_in_any_order() -> None:
    weights = base()
    known = identity(weights)
    assert identity(dict(reversed(weights.items()))) == known
    assert lora.base_checksum(((n, t.float()) for n, t in weights.items()), torch.bfloat16) == known
    changed = {**weights, "model.norm.weight": weights["model.norm.weight"] + 1}
    renamed = {("x" if n == "model.norm.weight" else n): t for n, t in weights.items()}
    reshaped = {n: t.reshape(-1, 5) for n, t in weights.items()}
    others = [identity(other) for other in (changed, renamed, reshaped)]
    others.append(lora.base_checksum(weights.items(), torch.float32))
    assert len({known, *others}) == 5


def test_alpha_rank_and_base_are_part_of_a_versions_identity() -> None:
    tensors = adapter(5)
    one = manifest_of(tensors, b"\1" * 16)
    manifests.validate(one)
    assert (
        len({one.checksum, manifest_of(tensors, b"\2" * 16).checksum, manifest_of(tensors, b"\1" * 16, 9).checksum})
        == 3
    )


def test_an_engine_serves_its_base_with_the_adapter_merged_in() -> None:
    weights = base()
    merging = AdapterBase(weights, torch.device("cpu"))
    for seed in (5, 6):
        tensors = adapter(seed)
        received = merging.merge(Received(tensors), manifest_of(tensors, identity(weights)))
        assert received.tensors.keys() == weights.keys()
        for layer in LAYERS:
            a_RI, b_OR = (tensors[name] for name in lora.adapter_names(f"{layer}.weight"))
            expected = lora.merged(weights[f"{layer}.weight"], a_RI, b_OR, 8.0 / RANK)
            assert torch.equal(received.tensors[f"{layer}.weight"], expected)
        assert received.tensors["model.norm.weight"] is weights["model.norm.weight"]


def test_merged_weights_are_served_and_checked_in_the_form_that_the_engine_takes() -> None:
    def publish(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            yield from ((f"{part}.{name}", half) for part, half in enumerate(tensor.chunk(2)))

    weights, tensors = base(), adapter(5)
    manifest = manifest_of(tensors, identity(weights))
    whole = AdapterBase(weights, torch.device("cpu")).merge(Received(tensors), manifest).tensors
    merging = AdapterBase(weights, torch.device("cpu"), publish)
    received = merging.merge(Received(tensors), manifest)
    assert received.tensors.keys() == {f"{part}.{name}" for name in weights for part in (0, 1)}
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([received.tensors[f"{part}.{name}"] for part in (0, 1)]), tensor)
    served = {name: tensor.clone() for name, tensor in received.tensors.items()}
    merging.check(manifest, received, served)
    served[f"1.{LAYERS[0]}.weight"].view(-1)[0] += 1
    with pytest.raises(ChecksumMismatch, match=f"1\\.{LAYERS[0]}\\.weight has other bytes"):
        merging.check(manifest, received, served)


def test_an_adapter_for_another_base_is_refused() -> None:
    merging = AdapterBase(base(), torch.device("cpu"))
    tensors = adapter(5)
    other = {**base(), "model.norm.weight": torch.zeros(10).bfloat16()}
    with pytest.raises(ChecksumMismatch, match="hf_checkpoint"):
        merging.merge(Received(tensors), manifest_of(tensors, identity(other)))


def test_every_tensor_that_does_not_fit_is_named() -> None:
    merging = AdapterBase(base(), torch.device("cpu"))
    tensors = adapter(5)
    a_name, b_name = lora.adapter_names("model.layers.0.q_proj.weight")
    tensors[a_name], tensors[b_name] = tensors[a_name][:, :3], tensors[b_name].float()
    tensors |= dict(zip(lora.adapter_names("model.x.weight"), (tensors[a_name], tensors[b_name]), strict=True))
    with pytest.raises(ManifestError) as error:
        merging.merge(Received(tensors), manifest_of(tensors, identity(base())))
    for part in (f"{a_name} has shape", f"{b_name} is torch.float32", "model.x.weight is no weight"):
        assert part in str(error.value)


@pytest.mark.parametrize("damaged", ["adapted", "unadapted", "base", "adapter"])
def test_a_check_finds_what_differs_from_base_and_adapter(damaged: str) -> None:
    weights, tensors = base(), adapter(5)
    manifest = manifest_of(tensors, identity(weights))
    merging = AdapterBase(weights, torch.device("cpu"))
    received = merging.merge(Received(tensors), manifest)
    served = {name: tensor.clone() for name, tensor in received.tensors.items()}
    merging.check(manifest, received, served)
    spoiled = {
        "adapted": served["model.layers.0.q_proj.weight"],
        "unadapted": served["model.norm.weight"],
        "base": weights["model.norm.weight"],
        "adapter": tensors[lora.adapter_names("model.layers.0.q_proj.weight")[0]],
    }[damaged]
    spoiled.view(-1)[0] += 1
    with pytest.raises(ChecksumMismatch):
        merging.check(manifest, received, served)
