from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from broadcast_kit import publish, transport

from miles.precision.recipe import Recipe
from miles.precision.tensors import QuantisedTensors
from miles.rpc.gen import weightsync_pb2
from miles.services.rollout.engines.sglang.weights.remote import RemoteTransport, contents
from miles.weights import flat as flats
from miles.weights.base import Endpoint
from miles.weights.manifest import ManifestError
from miles.weights.transports.collective.transport import CollectiveTransport

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def ranks() -> Iterator[list[CollectiveTransport]]:
    """Two ranks of a trainer."""
    made = [transport(), transport()]
    yield made
    for each in made:
        each.close()


def tensors() -> dict[str, torch.Tensor]:
    """Some that leave gaps between them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed": (7, 3),
        f"{EXPERTS}.gate_up_proj": (4, 6, 5),
        "odd": (3,),
        f"{EXPERTS}.down_proj": (4, 5, 3),
        "none": (0, 2),
    }
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def quantised(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Parts of experts and whole tensors, by turns."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{EXPERTS}.{i}.{name}_proj.weight": (64, 160) for i in range(2) for name in ("gate", "up")}
    plain = {"norm": (160,), **shapes, "model.layers.0.mlp.gate.weight": (3, 160)}
    published = QuantisedTensors(recipe)
    whole = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in plain.items()}
    return {part: tensor for name, value in whole.items() for part, tensor in published.convert(name, value)}


@pytest.mark.parametrize(
    "sent", [tensors(), quantised(Recipe(format="fp8_block")), quantised(Recipe(format="int4", group_size=32))]
)
def test_what_is_announced_is_what_the_sources_send(
    ranks: list[CollectiveTransport], sent: dict[str, torch.Tensor]
) -> None:
    handle, manifest = publish(ranks, 1, sent, bucket_bytes=256)
    announced = contents(handle, manifest)
    assert set(announced) == {rank.source.address for rank in ranks}
    found = set()
    for rank in ranks:
        staged = rank.source.staged.of(1)
        assert len(staged) == len(announced[rank.source.address])
        for bucket, promised in zip(staged, announced[rank.source.address], strict=True):
            data, start = flats.packed(bucket.flat, bucket.descriptors), 0
            for name, dtype, shape in zip(promised.names, promised.dtypes, promised.shapes, strict=True):
                expected = sent[name]
                part = data[start : start + expected.nbytes].view(getattr(torch, dtype)).view(tuple(shape))
                assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8)), name
                start += expected.nbytes
                found.add(name)
            assert start == data.numel()
    assert found == set(sent)


def test_the_version_is_known_by_shapes_alone_and_can_still_be_fetched(ranks: list[CollectiveTransport]) -> None:
    sent = tensors()
    published = publish(ranks, 1, sent, bucket_bytes=256)
    weights = RemoteTransport(Endpoint()).receive(*published)
    assert {name: (t.shape, t.dtype, t.device.type) for name, t in weights.items()} == {
        name: (t.shape, t.dtype, "meta") for name, t in sent.items()
    }
    assert weights.release()
    fetched = weights.fetch().tensors
    assert all(torch.equal(fetched[name], tensor) for name, tensor in sent.items())


def test_types_that_would_not_be_aligned_without_gaps_are_refused(ranks: list[CollectiveTransport]) -> None:
    mixed = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(2)}
    published = publish(ranks[:1], 1, mixed, bucket_bytes=1024)
    with pytest.raises(ManifestError, match="'b' begins at byte 6 without gaps"):
        RemoteTransport(Endpoint()).receive(*published)


def test_a_source_that_is_gone_and_another_backend_are_found_before_the_load() -> None:
    rank = transport()
    handle, manifest = publish([rank], 1, tensors(), bucket_bytes=1024)
    with pytest.raises(ManifestError, match="come by gloo"):
        RemoteTransport(Endpoint(device=torch.device("cuda"))).receive(handle, manifest)
    rank.close()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        RemoteTransport(Endpoint()).receive(handle, manifest)
    other = weightsync_pb2.TransportHandle.FromString(handle.SerializeToString())
    del other.collective.buckets[0]
    with pytest.raises(ManifestError):
        contents(other, manifest)
