"""Publishing weights with real processes: the service, engines, and this one as trainer and controller."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

import grpc
import pytest
import torch
from weightsync_processes import JOB, Engine, Service, digest

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.weightsync.segments import default_directory

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def directory() -> Iterator[pathlib.Path]:
    """A folder for weights, in shared memory where there is some."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="weightsync-test-", dir=default_directory()))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start(directory: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Callable[..., Service]]:
    """Starts services that share one state; they are killed at the end."""
    started: list[Service] = []

    def make(listen: str = "127.0.0.1:0", keep: bool = True, options: Sequence[str] = ()) -> Service:
        started.append(Service(tmp_path / "state" if keep else None, directory, listen, options))
        return started[-1]

    yield make
    for service in started:
        service.kill()


@pytest.fixture
def service(start: Callable[..., Service]) -> Service:
    """One running service."""
    return start()


@pytest.fixture
def engine(service: Service) -> Iterator[Callable[..., Engine]]:
    """Starts engines of that service; they are killed at the end."""
    started: list[Engine] = []

    def make(engine_id: str, *options: str, job: str = JOB) -> Engine:
        started.append(Engine(service, engine_id, *options, job=job))
        return started[-1]

    yield make
    for process in started:
        process.kill()


def weights(seed: int) -> Tensors:
    """Tensors as models have them: mixed dtypes, a scalar, nothing, an odd size, and a stack of experts."""
    random = torch.Generator().manual_seed(seed)
    embedding = torch.randn(97, 16, generator=random)
    return {
        "embed.weight": embedding,
        "lm_head.weight": embedding,
        "norm.weight": torch.randn(16, generator=random).bfloat16(),
        "experts.gate_up": torch.randn(8, 32, 16, generator=random).bfloat16(),
        "experts.bias": torch.randn(8, 3, generator=random).half(),
        "scale": torch.tensor(float(seed)),
        "none": torch.empty(0, 4),
        "counts": torch.arange(7, dtype=torch.int64),
        "fp8": torch.randn(5, 5, generator=random).to(torch.float8_e4m3fn),
    }


def test_every_engine_holds_every_version_bit_for_bit(service: Service, engine: Callable[..., Engine]) -> None:
    engines = [engine("a"), engine("b", "--copy")]
    for version in range(3):
        tensors = weights(version)
        result = service.publish(version, tensors)
        assert result.manifest.train_step == version
        done = service.activate(version, min_engines=2, check_equal=True)
        assert (done.engines, done.quarantined) == (2, 0)
        assert service.states()[version] == "ACTIVE"
        for process in engines:
            process.wait_for_state("serving", version)
            assert process.digest() == digest(tensors)


def test_engines_let_go_of_old_bytes_and_memory_is_reused(service: Service, engine: Callable[..., Engine]) -> None:
    process = engine("a")
    inodes = []
    for version in range(5):
        inodes.append(os.stat(service.publish(version, weights(version)).handle.shared_memory.path).st_ino)
        service.activate(version, min_engines=1)
        service.wait_until(lambda answer: len(answer.versions) == 1, "the old version to be freed")
    mapped = pathlib.Path(f"/proc/{process.process.pid}/maps").read_text()
    assert len({line.split()[-1] for line in mapped.splitlines() if "miles-weights-" in line}) == 1
    assert len(set(inodes)) == 2, "two files take turns"


def test_a_tensor_kept_by_an_engine_keeps_its_bytes(service: Service, engine: Callable[..., Engine]) -> None:
    process = engine("a", "--keep-first")
    tensors = weights(0)
    for version in range(4):
        service.publish(version, weights(version))
        service.activate(version, min_engines=1)
        service.wait_until(lambda answer: len(answer.versions) == 1, "the old version to be freed")
    process.send("first")
    kept = json.loads(process.wait_for(lambda line: "first" in line, "the kept tensors"))["first"]
    assert kept == digest(tensors), "bytes that somebody maps are never rewritten"


@pytest.mark.parametrize("check", [False, True])
def test_wrong_bytes_quarantine_and_the_next_good_version_readmits(
    service: Service, engine: Callable[..., Engine], check: bool
) -> None:
    process = engine("a", *(["--corrupt-at", "1"] if check else []))
    service.publish(0, weights(0))
    service.activate(0, min_engines=1)
    path = pathlib.Path(service.publish(1, weights(1)).handle.shared_memory.path)
    if not check:
        with path.open("r+b") as file:
            file.seek(5)
            file.write(bytes([file.read(1)[0] ^ 1]))
    with pytest.raises(grpc.RpcError) as failure:
        service.activate(1, min_engines=1, deadline_s=3, check_equal=check)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "embed.weight" in failure.value.details()
    assert "0 of 1 engines" in failure.value.details()
    process.wait_for_state("quarantined", None)
    service.publish(2, weights(2))
    service.activate(2, min_engines=1)
    process.wait_for_state("serving", 2)
    assert process.digest() == digest(weights(2))
    if not check:
        assert not any('"version": 1' in line for line in process.seen), "it never served the wrong bytes"


def test_a_failed_swap_quarantines_one_engine_and_not_the_other(
    service: Service, engine: Callable[..., Engine]
) -> None:
    bad, good = engine("bad", "--fail-at", "1"), engine("good")
    service.publish(0, weights(0))
    service.activate(0, min_engines=2)
    service.publish(1, weights(1))
    done = service.activate(1, min_engines=1)
    assert (done.engines, done.quarantined) == (1, 1)
    good.wait_for_state("serving", 1)
    assert "out of memory while swapping" in bad.wait_for_state("quarantined", None)["error"]
    bad.wait_for_state("serving", 1)
    assert bad.digest() == digest(weights(1)), "a full load brings it back"


def test_an_engine_killed_during_an_update_does_not_hold_it_up(service: Service, engine: Callable[..., Engine]) -> None:
    engine("good")
    stuck = engine("stuck", "--hang-at", "1")
    service.publish(0, weights(0))
    service.activate(0, min_engines=2)
    service.publish(1, weights(1))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        activation = pool.submit(service.activate, 1, 1, 50.0)
        service.wait_until(
            lambda answer: sum(e.HasField("version") and e.version == 1 for e in answer.engines) == 1, "the first swap"
        )
        stuck.kill()
        done = activation.result(40)
    assert (done.engines, done.quarantined) == (1, 1)
    assert done.total_s < 50


def test_an_engine_that_hangs_is_quarantined_at_the_deadline(service: Service, engine: Callable[..., Engine]) -> None:
    engine("good")
    engine("stuck", "--hang-at", "1")
    service.publish(0, weights(0))
    service.activate(0, min_engines=2)
    service.publish(1, weights(1))
    done = service.activate(1, min_engines=1, deadline_s=2)
    assert (done.engines, done.quarantined) == (1, 1)
    states = {e.engine_id: e.state for e in service.list().engines}
    assert states["stuck"] == weightsync_pb2.ENGINE_STATE_QUARANTINED
    service.publish(2, weights(2))
    assert service.activate(2, min_engines=1).engines == 1, "a stuck engine does not hold up later versions"


def test_the_service_killed_before_activation_carries_on_after_a_restart(
    start: Callable[..., Service], service: Service, engine: Callable[..., Engine]
) -> None:
    process = engine("a")
    service.publish(0, weights(0))
    service.activate(0, min_engines=1)
    service.publish(1, weights(1))
    service.kill()
    restarted = start(listen=service.address)
    assert restarted.states() == {0: "ACTIVE", 1: "PREPARED"}
    assert restarted.activate(1, min_engines=1, check_equal=True).engines == 1
    process.wait_for_state("serving", 1)
    assert process.digest() == digest(weights(1))


def test_the_service_killed_during_activation_carries_on_with_the_same_operation(
    start: Callable[..., Service], service: Service, engine: Callable[..., Engine]
) -> None:
    engine("a")
    service.publish(0, weights(0))
    service.activate(0, min_engines=1)
    service.publish(1, weights(1))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        activation = pool.submit(service.activate, 1, 2, 50.0, "the operation")
        service.wait_until(
            lambda answer: any(v.state == weightsync_pb2.VERSION_STATE_ACTIVATING for v in answer.versions),
            "activation",
        )
        service.kill()
        with pytest.raises(grpc.RpcError):
            activation.result(30)
    restarted = start(listen=service.address)
    assert restarted.states()[1] == "PREPARED"
    assert restarted.activate(1, min_engines=1, operation_id="the operation").engines == 1


def test_an_engine_that_comes_late_is_brought_to_the_active_version(
    service: Service, engine: Callable[..., Engine]
) -> None:
    service.publish(0, weights(0))
    service.activate(0, min_engines=0)
    late = engine("late")
    late.wait_for_state("serving", 0)
    assert late.digest() == digest(weights(0))


def test_an_engine_that_joins_during_an_activation_counts(service: Service, engine: Callable[..., Engine]) -> None:
    engine("a")
    service.publish(0, weights(0))
    service.activate(0, min_engines=1)
    service.publish(1, weights(1))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        activation = pool.submit(service.activate, 1, 2, 50.0)
        service.wait_until(
            lambda answer: any(e.state == weightsync_pb2.ENGINE_STATE_PREFETCHED for e in answer.engines), "a prefetch"
        )
        joined = engine("b")
        assert activation.result(50).engines == 2
    assert joined.digest() == digest(weights(1))


def test_policy_draft_and_another_job_do_not_meet(service: Service, engine: Callable[..., Engine]) -> None:
    policy, draft, other = engine("a"), engine("a", "--stream", "draft"), engine("a", job="other")
    service.publish(0, weights(0))
    service.activate(0, min_engines=1)
    service.publish(3, weights(3), stream="draft")
    service.activate(3, min_engines=1, stream="draft")
    service.publish(7, weights(7), job="other")
    service.activate(7, min_engines=1, job="other")
    assert policy.digest() == digest(weights(0))
    assert draft.digest() == digest(weights(3))
    assert other.digest() == digest(weights(7))


def test_a_resumed_job_can_go_back_to_an_older_version(service: Service, engine: Callable[..., Engine]) -> None:
    process = engine("a")
    for version, seed in ((4, 4), (5, 5), (4, 99)):
        service.publish(version, weights(seed))
        service.activate(version, min_engines=1)
        assert process.digest() == digest(weights(seed))
    service.wait_until(lambda answer: [v.version.version for v in answer.versions] == [4], "version 5 to be freed")


def test_releasing_a_job_gives_its_memory_back(
    service: Service, engine: Callable[..., Engine], directory: pathlib.Path
) -> None:
    engine("a")
    for version in range(2):
        service.publish(version, weights(version))
        service.activate(version, min_engines=1)
    answer = service.stub.ReleaseJob(weightsync_pb2.ReleaseJobRequest(job_id=JOB), timeout=10)
    assert answer.freed_bytes > 0
    assert [path.suffix for path in directory.iterdir()] == [".lock"]
    again = service.stub.ReleaseJob(weightsync_pb2.ReleaseJobRequest(job_id=JOB), timeout=10)
    assert again.freed_bytes == 0


def test_leftovers_of_a_killed_service_without_state_are_removed_by_the_next(
    start: Callable[..., Service], directory: pathlib.Path
) -> None:
    killed = start(keep=False)
    path = pathlib.Path(killed.publish(0, weights(0)).handle.shared_memory.path)
    alive = start(keep=False)
    assert path.exists(), "its owner lives"
    kept = pathlib.Path(alive.publish(0, weights(0)).handle.shared_memory.path)
    killed.kill()
    start(keep=True)
    assert not path.exists()
    assert kept.exists()
    assert len(list(directory.glob("*.lock"))) == 2


@pytest.mark.parametrize("keep", [True, False])
def test_an_orderly_stop_frees_the_bytes_unless_told_to_keep_them(
    start: Callable[..., Service], directory: pathlib.Path, keep: bool
) -> None:
    service = start(options=["--keep-bytes"] if keep else [])
    path = pathlib.Path(service.publish(0, weights(0)).handle.shared_memory.path)
    service.process.terminate()
    assert service.process.wait(30) == 0
    assert path.exists() is keep
    restarted = start()
    assert restarted.states() == ({0: "PREPARED"} if keep else {})


def test_calls_that_meet_an_orderly_stop_are_answered_or_refused(start: Callable[..., Service]) -> None:
    service = start()

    def allocate(job: int) -> grpc.Future:
        policy = policy_pb2.WEIGHT_STREAM_POLICY
        version = policy_pb2.WeightVersion(job_id=f"job/{job}", stream=policy, version=0)
        return service.stub.Allocate.future(weightsync_pb2.AllocateRequest(version=version, nbytes=64), timeout=30)

    calls = [allocate(job) for job in range(100)]
    assert calls[0].code() is grpc.StatusCode.OK
    service.process.terminate()
    calls += [allocate(job) for job in range(100, 400)]
    codes = {call.code() for call in calls}
    assert service.process.wait(30) == 0
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_a_version_that_does_not_fit_is_refused_with_the_way_out(service: Service) -> None:
    request = weightsync_pb2.AllocateRequest(
        version=policy_pb2.WeightVersion(job_id=JOB, stream=policy_pb2.WEIGHT_STREAM_POLICY, version=0),
        transport=weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY,
        nbytes=1 << 50,
    )
    with pytest.raises(grpc.RpcError) as failure:
        service.stub.Allocate(request, timeout=10)
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "--shm-size" in failure.value.details()
    assert service.states() == {}


@pytest.mark.parametrize(
    ("job", "stream", "operation", "deadline_ms", "code", "text"),
    [
        ("", 1, "op", 1000, grpc.StatusCode.INVALID_ARGUMENT, "job_id is empty"),
        (JOB, 0, "op", 1000, grpc.StatusCode.INVALID_ARGUMENT, "stream is 0"),
        (JOB, 1, "", 1000, grpc.StatusCode.INVALID_ARGUMENT, "operation_id"),
        (JOB, 1, "op", 0, grpc.StatusCode.INVALID_ARGUMENT, "deadline_ms"),
        (JOB, 1, "op", 1000, grpc.StatusCode.NOT_FOUND, "never published"),
    ],
)
def test_bad_activations_are_refused(
    service: Service, job: str, stream: int, operation: str, deadline_ms: int, code: grpc.StatusCode, text: str
) -> None:
    request = weightsync_pb2.ActivateRequest(operation_id=operation, deadline_ms=deadline_ms)
    request.version.job_id, request.version.stream, request.version.version = job, stream, 0
    with pytest.raises(grpc.RpcError) as failure:
        list(service.stub.Activate(request, timeout=10))
    assert failure.value.code() is code
    assert text in failure.value.details()
