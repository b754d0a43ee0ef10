"""What can go wrong between trainer and engine, over every transport that needs no GPU.

Whatever it is: no engine serves bytes that are not those of one version, and every activation ends within its deadline.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
import grpc.aio
import pytest
import torch
from cutting_proxy import CuttingProxy
from weight_host import DEADLINE_S, JOB, POLICY, GatedEngine, Host, raw
from weightsync_processes import Engine, Service, digest

from miles.rpc.gen import policy_pb2, sample_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import PublishResult, SubscriberState, WeightPublisher, WeightSubscriber
from miles.weights import manifest as manifests
from miles.weights.manifest import ManifestError
from miles.weights.transports.grpc_chunks.transport import GrpcChunksTransport

TRANSPORTS = ["SHARED_MEMORY", "DISK_DELTA", "GRPC_CHUNKS"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
async def host(tmp_path: pathlib.Path) -> AsyncIterator[Host]:
    """A service with storage."""
    made = Host(tmp_path, disk_dir=tmp_path / "shared")
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def subscribe(host: Host) -> AsyncIterator[Callable[..., WeightSubscriber]]:
    """Starts subscribers, which are closed at the end."""
    made: list[WeightSubscriber] = []

    async def start(engine: GatedEngine, name: str = "engine") -> WeightSubscriber:
        made.append(WeightSubscriber(host.address, JOB, name, POLICY, engine))
        await made[-1].start()
        return made[-1]

    yield start
    for subscriber in made:
        await subscriber.close()


def weights(version: int) -> Tensors:
    """Mostly the same from one version to the next."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        "experts": torch.randn(8, 64, 32, generator=random).bfloat16(),
        "embed": torch.randn(400, 32, generator=random),
        "scale": torch.tensor(1.0),
    }
    tensors["experts"][:, version % 64] += version
    tensors["embed"][version % 400] += version
    return tensors


def damage(result: PublishResult, host: Host) -> None:
    """Flip a bit of what the trainer left."""
    handle = result.handle
    if handle.HasField("disk_delta"):
        (file,) = pathlib.Path(handle.disk_delta.path).glob("part-*")
        place = file.stat().st_size - 30
    else:
        (file,) = host.folder.glob(f"miles-weights-*-v{result.manifest.version.version}-*")
        place = 5000
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 16]))


async def fails(host: Host, version: int, deadline_s: float = 2.0) -> str:
    """An activation that must fail, and in time; returns why."""
    began = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await host.activate(version, deadline_s)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < DEADLINE_S, "an outcome, and not only the caller's own deadline"
    return str(failure.value.details())


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_corrupted_bucket_is_never_served(
    host: Host, subscribe: Callable[..., WeightSubscriber], transport: str
) -> None:
    subscriber = await subscribe(engine := GatedEngine())
    await host.publish(0, weights(0), transport)
    await host.activate(0)
    everywhere = {name: tensor + 3 for name, tensor in weights(1).items()}  # so that no engine makes it of what it has
    damage(await host.publish(1, everywhere, transport), host)
    # Time enough to read it on a busy machine too: what is not known to be damaged is the base of the next version.
    assert "0 of 1 engines" in await fails(host, 1, deadline_s=8.0)
    assert 1 not in engine.loads
    await host.publish(2, weights(2), transport)
    await host.activate(2, check_equal=True)
    await subscriber.wait_for_version(2, DEADLINE_S)
    assert raw(engine.tensors) == raw(weights(2))


@pytest.mark.parametrize("fault", ["truncated", "removed", "base missing", "base replaced"])
async def test_a_change_that_cannot_be_applied_fails_and_the_next_full_version_heals(
    host: Host, subscribe: Callable[..., WeightSubscriber], fault: str
) -> None:
    await host.publish(0, weights(0), "DISK_DELTA")
    await host.activate(0, min_engines=0)
    result = await host.publish(1, weights(1), "DISK_DELTA")
    assert result.manifest.base_version == 0
    folder, base = pathlib.Path(result.handle.disk_delta.path), pathlib.Path(result.handle.disk_delta.base_path)
    if fault == "truncated":
        (file,) = folder.glob("part-*")
        os.truncate(file, file.stat().st_size // 2)
    elif fault == "removed":
        shutil.rmtree(folder)
    elif fault == "base missing":
        shutil.rmtree(base)
    else:
        index = json.loads((base / "index.json").read_text())
        (base / "index.json").write_text(json.dumps(index | {"publication_id": 77}))
    engine = GatedEngine()
    await subscribe(engine)  # it comes without a base at hand, so it needs both folders
    why = await fails(host, 1)
    assert {"truncated": "truncated", "removed": "No such file", "base missing": "No such file"}.get(
        fault, "is a change to publication 1"
    ) in why
    assert engine.loads == []
    host._publishers.pop("DISK_DELTA").close()  # a trainer that starts anew has no base, so it writes everything
    await host.publish(2, weights(2), "DISK_DELTA")
    await host.activate(2, check_equal=True)
    assert raw(engine.tensors) == raw(weights(2))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_engine_that_joins_while_a_version_is_published_ends_up_with_one_whole_version(
    host: Host, subscribe: Callable[..., WeightSubscriber], transport: str
) -> None:
    first, late = GatedEngine(), GatedEngine()
    beginner = await subscribe(first, "first")
    await host.publish(0, weights(0), transport)
    await host.activate(0)
    await host.publish(1, weights(1), transport)
    activation = asyncio.create_task(host.activate(1, min_engines=2))
    async with asyncio.timeout(DEADLINE_S):
        while beginner.state is not SubscriberState.PREFETCHED:  # noqa: ASYNC110 — the state is what is waited for
            await asyncio.sleep(0.01)
    joined = await subscribe(late, "late")
    assert (await activation).engines == 2
    await joined.wait_for_version(1, DEADLINE_S)
    assert raw(late.tensors) == raw(first.tensors) == raw(weights(1))
    assert late.loads == [1]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_service_that_ends_between_prepared_and_active_carries_on(
    host: Host, subscribe: Callable[..., WeightSubscriber], transport: str
) -> None:
    await subscribe(engine := GatedEngine())
    await host.publish(0, weights(0), transport)
    await host.activate(0)
    await host.publish(1, weights(1), transport)
    await host.stop()
    await host.start()
    assert {v.version.version for v in (await host.list()).versions} == {0, 1}
    await host.activate(1, check_equal=True)
    assert engine.loads == [0, 1]
    late = GatedEngine()
    await (await subscribe(late, "late")).wait_for_version(1, DEADLINE_S)
    assert raw(late.tensors) == raw(weights(1))


@pytest.mark.chaos
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_killed_in_any_state_costs_nobody_else_anything(tmp_path: pathlib.Path, transport: str) -> None:
    service = Service(tmp_path / "state", tmp_path, options=["--disk-dir", str(tmp_path / "shared")])
    started = [survivor := Engine(service, "survivor")]
    try:
        service.publish(0, weights(0), transport=transport)
        service.activate(0, min_engines=1)
        for version, state in enumerate(["serving", "prefetching", "prefetched", "swapping"], start=1):
            options = ["--hang-at", str(version)] if state == "swapping" else []
            started.append(victim := Engine(service, f"killed while {state}", *options))
            victim.wait_for_state("serving", version - 1)
            if state == "prefetching":
                victim.process.send_signal(signal.SIGSTOP)
            if state == "prefetched":
                survivor.process.send_signal(signal.SIGSTOP)  # nobody swaps before it has the bytes too
            service.publish(version, weights(version), transport=transport)
            if state == "serving":
                victim.kill()
            done = _activate_and_kill(service, version, victim, survivor, state)
            assert done.engines == 1
            assert done.total_s < 40
            survivor.wait_for_state("serving", version)
            assert survivor.digest() == digest(weights(version))
    finally:
        for process in (*started, service):
            process.kill()


def _activate_and_kill(
    service: Service, version: int, victim: Engine, survivor: Engine, state: str
) -> weightsync_pb2.ActivateDone:
    """Kill the victim when it is in that state of the activation."""
    reached = {
        "prefetching": lambda e: True,
        "prefetched": lambda e: e.state == weightsync_pb2.ENGINE_STATE_PREFETCHED,
        "swapping": lambda e: e.state == weightsync_pb2.ENGINE_STATE_PREFETCHED,
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        activation = pool.submit(service.activate, version, 1, 40.0)
        if state in reached:
            service.wait_until(
                lambda answer: any(e.engine_id == victim.engine_id and reached[state](e) for e in answer.engines), state
            )
            if state == "swapping":
                service.wait_until(
                    lambda answer: any(e.engine_id == "survivor" and e.version == version for e in answer.engines),
                    "the survivor's swap",
                )
            victim.kill()
            survivor.process.send_signal(signal.SIGCONT)
        return activation.result(60)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 600 kB, which only root may mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_disk_fails_the_publication_and_leaves_the_active_version_alone(
    tmp_path: pathlib.Path, small_disk: pathlib.Path
) -> None:
    host = Host(tmp_path, disk_dir=small_disk)
    await host.start()
    engine = GatedEngine()
    subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine)
    await subscriber.start()
    try:
        small = {"w": torch.randn(50_000)}
        await host.publish(0, small, "DISK_DELTA")
        await host.activate(0)
        with pytest.raises(OSError, match="No space left") as failure:
            await host.publish(1, {"w": torch.randn(120_000)}, "DISK_DELTA")
        assert failure.value.errno == errno.ENOSPC
        assert not list(small_disk.glob("**/.partial-*")), "what was written is gone"
        assert subscriber.version == 0
        small["w"] = small["w"] + 0.0
        small["w"][3] = 1.0
        await host.publish(2, small, "DISK_DELTA")
        await host.activate(2, check_equal=True)
        assert raw(engine.tensors) == raw(small)
    finally:
        await subscriber.close()
        await host.close()


async def test_full_shared_memory_refuses_the_allocation_and_leaves_the_active_version_alone(
    tmp_path: pathlib.Path, small_disk: pathlib.Path
) -> None:
    host = Host(small_disk)
    await host.start()
    subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine := GatedEngine())
    await subscriber.start()
    try:
        for transport in ("SHARED_MEMORY", "GRPC_CHUNKS"):
            await host.publish(0, {"w": torch.zeros(1000)}, transport)
            await host.activate(0)
            with pytest.raises(grpc.RpcError, match="--shm-size"):
                await host.publish(1, {"w": torch.zeros(200_000)}, transport)
            assert subscriber.version == 0
            assert engine.tensors["w"].sum() == 0
    finally:
        await subscriber.close()
        await host.close()


async def test_a_transfer_goes_on_where_its_connection_was_cut(host: Host) -> None:
    tensors = {"w": torch.randn(20_000_000)}
    with CuttingProxy(host.address, cut_after=25_000_000, cuts=3) as proxy:  # 80 MB; a busy service may lose two chunks
        sender = GrpcChunksTransport(proxy.address, silence_s=20)
        receiver = GrpcChunksTransport(proxy.address, silence_s=20)
        host._publishers["GRPC_CHUNKS"] = publisher = _publisher(host, sender)
        result = await host.publish(0, tensors, "GRPC_CHUNKS")
        assert proxy.cuts_made == 3
        assert result.written_bytes < 140_000_000, "chunks that had arrived did not travel again"
        proxy.restart(cuts=2)
        received = await asyncio.to_thread(receiver.receive, result.handle, result.manifest)
        assert proxy.cuts_made == 2
        assert proxy.bytes_to_client < 125_000_000
        assert raw(dict(received.tensors)) == raw(tensors)
        receiver.close()
        publisher.close()
        await host.activate(0, min_engines=0)


def _publisher(host: Host, sender: GrpcChunksTransport) -> WeightPublisher:
    kind = weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS
    publisher = WeightPublisher(weightsync_pb2_grpc.WeightSyncServiceStub(host._channel), JOB, POLICY, kind)
    publisher.sender._transports[kind] = sender
    return publisher


async def test_a_receiver_cut_off_for_good_gives_up_and_says_so(host: Host) -> None:
    result = await host.publish(0, weights(0), "GRPC_CHUNKS")
    await host.stop()
    receiver = GrpcChunksTransport(host.address, silence_s=1)
    with pytest.raises(TimeoutError, match=r"could not list the chunks of policy version 0 .*UNAVAILABLE"):
        await asyncio.to_thread(receiver.receive, result.handle, result.manifest)
    receiver.close()


async def test_an_upload_that_is_not_complete_cannot_be_prepared(host: Host) -> None:
    name = policy_pb2.WeightVersion(job_id=JOB, stream=POLICY, version=0)
    stub = weightsync_pb2_grpc.WeightSyncServiceStub(host._channel)
    request = weightsync_pb2.AllocateRequest(
        version=name, nbytes=4000, transport=weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS, usable=[3]
    )
    allocated = await asyncio.to_thread(stub.Allocate, request, timeout=DEADLINE_S)
    descriptors, total = manifests.plan([("w", sample_pb2.DTYPE_FLOAT32, (1000,))])
    descriptors[0].checksum = bytes(16)
    manifest = manifests.build(name, descriptors, total, 0)
    prepare = weightsync_pb2.PrepareRequest(manifest=manifest, handle=allocated.handle)
    with pytest.raises(grpc.RpcError, match="not every chunk"):
        await asyncio.to_thread(stub.Prepare, prepare, timeout=DEADLINE_S)
    with pytest.raises(ManifestError, match=r"FAILED_PRECONDITION.*its bytes are not complete"):
        await asyncio.to_thread(GrpcChunksTransport(host.address).receive, allocated.handle, manifest)


async def test_an_engine_that_hears_nothing_stops_serving_until_it_has_loaded_the_current_version(
    tmp_path: pathlib.Path,
) -> None:
    host = Host(tmp_path, lease_s=1.0)
    await host.start()
    subscriber = WeightSubscriber(host.address, JOB, "engine", POLICY, engine := GatedEngine())
    await subscriber.start()
    try:
        await host.publish(0)
        await host.activate(0)
        await asyncio.sleep(1.5)
        assert subscriber.state is SubscriberState.SERVING, "a service that is there renews the lease"
        await host.stop()
        async with asyncio.timeout(DEADLINE_S):
            while subscriber.version is not None:  # noqa: ASYNC110 — the state is what is tested
                await asyncio.sleep(0.05)
        assert subscriber.state is SubscriberState.QUARANTINED
        await host.start()
        await subscriber.wait_for_version(0, DEADLINE_S)
        assert engine.loads == [0, 0], "it came back by a full load"
    finally:
        await subscriber.close()
        await host.close()


@pytest.mark.chaos
def test_a_service_that_hangs_is_as_good_as_none(tmp_path: pathlib.Path) -> None:
    service = Service(tmp_path / "state", tmp_path, options=["--serving-lease-s", "2"])
    engine = Engine(service, "engine")
    try:
        service.publish(0, weights(0))
        service.activate(0, min_engines=1)
        engine.wait_for_state("serving", 0)
        service.process.send_signal(signal.SIGSTOP)
        said = engine.wait_for_state("quarantined", None)
        assert "nothing was heard from the weightsync service" in said["error"]
        service.process.send_signal(signal.SIGCONT)
        engine.wait_for_state("serving", 0)
        assert engine.digest() == digest(weights(0))
    finally:
        engine.kill()
        service.process.send_signal(signal.SIGCONT)
        service.kill()


@pytest.mark.chaos
def test_an_engine_that_does_not_see_the_shared_memory_gets_chunks_beside_one_that_maps(tmp_path: pathlib.Path) -> None:
    """A mount namespace of its own is what a container has; an empty file system hides the service's folder."""
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"needs user namespaces: {probe.stderr.decode().strip()}")
    directory = tmp_path / "memory"
    directory.mkdir()
    service = Service(tmp_path / "state", directory)
    hidden = f'mount -t tmpfs none "{directory}" && exec "$@"'
    started = [near := Engine(service, "near")]
    try:
        started.append(far := Engine(service, "far", wrapper=("unshare", "-rm", "sh", "-c", hidden, "sh")))
        service.wait_until(lambda answer: sum(e.attached for e in answer.engines) == 2, "both engines")
        service.publish(0, weights(0))
        service.activate(0, min_engines=2, check_equal=True)
        used = {e.engine_id: weightsync_pb2.TransportKind.Name(e.transport) for e in service.list().engines}
        assert used == {"near": "TRANSPORT_KIND_SHARED_MEMORY", "far": "TRANSPORT_KIND_GRPC_CHUNKS"}
        for engine in (near, far):
            engine.wait_for_state("serving", 0)
            assert engine.digest() == digest(weights(0))
    finally:
        for process in (*started, service):
            process.kill()
