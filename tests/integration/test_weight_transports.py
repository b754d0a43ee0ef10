"""Byte equality from trainer to engine, over every transport that needs no GPU, with models in the torch engine."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import AsyncIterator

import pytest
import torch
from cutting_proxy import CuttingProxy
from torch_engine_models import running_engine, save_checkpoint, weights_of
from weight_host import DEADLINE_S, JOB, POLICY, GatedEngine, Host, raw

from miles.rpc.gen import weightsync_pb2
from miles.weights import WeightSubscriber
from miles.weights.publisher import DeltaSettings
from miles.weights.transports.grpc_chunks.transport import GrpcChunksTransport

OVERWRITE = DeltaSettings(weightsync_pb2.DELTA_ENCODING_OVERWRITE, full_every=2)


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    """A service with storage."""
    made = Host(tmp_path, disk_dir=tmp_path / "shared")
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3_moe"], ids=["dense", "tied", "moe"])
async def test_the_engine_holds_what_was_sent_bit_for_bit(
    host: Host, tmp_path: pathlib.Path, family: str, dtype: torch.dtype
) -> None:
    model = save_checkpoint(tmp_path / "model", family)
    async with running_engine(tmp_path / "model", None, dtype=str(dtype).removeprefix("torch.")) as engine:
        subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
        await subscriber.start()
        transports = ["UNSPECIFIED", "GRPC_CHUNKS", "DISK_DELTA", "DISK_DELTA", "DISK_DELTA", "SHARED_MEMORY"]
        for version, transport in enumerate(transports):
            weights = weights_of(model, dtype)
            settings = {"delta": OVERWRITE} if version % 2 else {}
            await host.publish(version, weights, transport, bucket_bytes=100_000, **settings)
            await host.activate(version, check_equal=True)
            assert raw(await engine.weight_bytes()) == raw(weights), transport
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter[..., : parameter.shape[-1] // 8] += 0.01
        await subscriber.close()


async def test_changes_take_fewer_bytes_and_a_full_version_comes_now_and_then(host: Host) -> None:
    async def written(version: int, tensors: dict[str, torch.Tensor]) -> int:
        return (await host.publish(version, tensors, "DISK_DELTA", delta=DeltaSettings(full_every=3))).written_bytes

    weights = {"w": torch.randn(50_000).bfloat16()}
    sizes = []
    for version in range(7):
        sizes.append(await written(version, weights))
        await host.activate(version, min_engines=0)
        weights = {"w": weights["w"].clone()}
        weights["w"][version::50] += 1
    assert [size > 100_000 for size in sizes] == [True, False, False, True, False, False, True]
    assert max(size for size in sizes if size < 100_000) < 8_000, "2 % of the values changed"


async def test_folders_that_no_version_needs_are_removed(host: Host) -> None:
    assert host.disk_dir is not None
    for version in range(5):
        await host.publish(version, {"w": torch.full((1000,), float(version))}, "DISK_DELTA")
        await host.activate(version, min_engines=0)
        folders = sorted(path.name for path in host.disk_dir.glob("*-versions/*/weight_v*"))
        assert folders[-1] == f"weight_v{version:06d}"
    kept = {v.version.version for v in (await host.list()).versions}
    assert kept == {4}
    await host.publish(5, {"other": torch.ones(3)}, "DISK_DELTA")
    await host.activate(5, min_engines=0)
    folders = sorted(path.name for path in host.disk_dir.glob("*-versions/*/*"))
    assert folders == ["weight_v000005"], "it is whole, so nothing that it is based on is kept"


async def test_chunks_that_a_side_has_already_are_not_sent_again(host: Host) -> None:
    weights = {"frozen": torch.randn(4_000_000), "trained": torch.randn(1000)}
    first = await host.publish(0, weights, "GRPC_CHUNKS", bucket_bytes=1)
    await host.activate(0, min_engines=0)
    second = await host.publish(1, {**weights, "trained": torch.randn(1000)}, "GRPC_CHUNKS")
    assert first.written_bytes >= 16_004_000
    assert second.written_bytes < 6_000_000


async def test_changed_chunks_travel_as_changes_to_the_service_and_to_engines_that_have_their_base(host: Host) -> None:
    weights = {"w": torch.randn(6_000_000).bfloat16(), "norm": torch.ones(33)}
    total = sum(tensor.nbytes for tensor in weights.values())
    # The second engine comes with version 1; after version 2 the first one writes to its memory.
    gets_much = [[True], [False, True], [False, False], [True, False]]
    with CuttingProxy(host.address, cut_after=1 << 40, cuts=0) as proxy:
        receivers = [GrpcChunksTransport(proxy.address) for _ in range(2)]
        for version in range(4):
            result = await host.publish(version, weights, "GRPC_CHUNKS", bucket_bytes=8_000_000)
            assert result.written_bytes < 0.03 * total or version == 0
            taken, held = [], []
            for receiver in receivers[: 1 + version]:
                proxy.restart(0)
                received = await asyncio.to_thread(receiver.receive, result.handle, result.manifest)
                assert raw(dict(received.tensors)) == raw(weights)
                taken.append(proxy.bytes_to_client)
                held.append(received)
            assert [nbytes > 0.3 * total for nbytes in taken] == gets_much[version]
            assert all(nbytes < 0.04 * total or nbytes > 0.3 * total for nbytes in taken)
            if version == 2:
                held[0].tensors["w"][:3_000_000] += 1
            await host.activate(version, min_engines=0)
            moved = torch.rand(6_000_000) < 0.01
            weights = {**weights, "w": torch.where(moved, weights["w"] * 1.5, weights["w"])}
        for receiver in receivers:
            receiver.close()


async def test_the_status_says_which_engine_holds_what_since_when_and_how_it_came(host: Host) -> None:
    subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, GatedEngine())
    await subscriber.start()
    await host.publish(0, transport="DISK_DELTA")
    await host.activate(0, check_equal=True)
    answer = await host.list()
    (version,), (engine,) = answer.versions, answer.engines
    assert list(version.transports) == [weightsync_pb2.TRANSPORT_KIND_DISK_DELTA]
    assert version.written_bytes > 4000
    assert set(version.stage_s) == {"allocate", "copy", "checksum"}
    assert (engine.engine_id, engine.version, engine.total_bytes, engine.attached) == ("engine", 0, 4000, True)
    assert engine.transport == weightsync_pb2.TRANSPORT_KIND_DISK_DELTA
    assert set(engine.stage_s) == {"prefetch", "swap", "check"}
    assert engine.since_unix_ns >= version.active_unix_ns - DEADLINE_S * 1e9
    assert engine.last_error == ""
    await subscriber.close()
