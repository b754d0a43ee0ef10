"""The collective transport over gloo: buckets from several ranks, engines that come, go, die and hang."""

from __future__ import annotations

import concurrent.futures
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from broadcast_kit import Published, publish, random_tensors, transport, write
from weightsync_processes import Lines

from miles.weights.flat import FlatWeights
from miles.weights.manifest import ChecksumMismatch, ManifestError
from miles.weights.transports.collective import CollectiveTransport

SUPPORT = pathlib.Path(__file__).parent.parent / "support"
BUCKET_BYTES = 4096

Make = Callable[[], CollectiveTransport]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes transports that are closed in the end."""
    made: list[CollectiveTransport] = []

    def one() -> CollectiveTransport:
        made.append(transport())
        return made[-1]

    yield one
    for each in made:
        each.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Lines]]:
    """Starts scripts of tests/support that are killed in the end."""
    started: list[Lines] = []

    def one(script: str, *arguments: object) -> Lines:
        started.append(Lines([str(SUPPORT / script), *map(str, arguments)]))
        return started[-1]

    yield one
    for process in started:
        process.kill()


def receive_all(engines: list[CollectiveTransport], published: Published) -> list[FlatWeights]:
    """Every engine at once, each in a thread, as several processes would."""
    with concurrent.futures.ThreadPoolExecutor(len(engines)) as threads:
        return list(threads.map(lambda engine: engine.receive(*published), engines))


def assert_holds(received: FlatWeights, tensors: Mapping[str, torch.Tensor]) -> None:
    assert received.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert received.tensors[name].dtype == tensor.dtype
        assert torch.equal(received.tensors[name], tensor), name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("engines", [1, 2])
def test_engines_get_every_byte_of_every_version(ranks: int, engines: int, make: Make) -> None:
    trainers, receivers = [make() for _ in range(ranks)], [make() for _ in range(engines)]
    for version in (1, 2):
        tensors = random_tensors(version)
        for received in receive_all(receivers, publish(trainers, version, tensors, BUCKET_BYTES)):
            assert_holds(received, tensors)


def test_engines_join_and_leave_between_versions_and_catch_up_late(make: Make) -> None:
    trainers, (first, second, third) = [make(), make()], [make() for _ in range(3)]
    old, new = random_tensors(1), random_tensors(2)
    published = publish(trainers, 1, old, BUCKET_BYTES)
    receive_all([first, second], published)
    assert_holds(third.receive(*published), old)
    published = publish(trainers, 2, new, BUCKET_BYTES)
    second.close()
    for received in receive_all([first, third], published):
        assert_holds(received, new)


def test_a_version_that_is_not_live_is_refused_and_its_memory_is_used_again(make: Make) -> None:
    trainer, engine = make(), make()
    old = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    trainer.trim([1])
    before = trainer.source.staged_bytes()
    publish([trainer], 2, random_tensors(2), BUCKET_BYTES)
    trainer.trim([2])
    assert trainer.source.staged_bytes() == before
    with pytest.raises(ConnectionError, match="publication 1 is not, or no longer, held"):
        engine.receive(*old)


def test_a_version_that_was_given_up_is_forgotten(make: Make) -> None:
    trainer = make()
    handle, _ = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    trainer.discard(handle)
    assert trainer.source.staged_bytes() == 0


def test_bytes_that_differ_from_the_manifest_are_refused(make: Make) -> None:
    trainer, engine = make(), make()
    handle, _ = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    _, manifest = publish([make()], 1, random_tensors(2), BUCKET_BYTES)
    with pytest.raises(ChecksumMismatch, match=re.escape("layer.0")):
        engine.receive(handle, manifest)


def test_a_version_with_a_bucket_missing_is_refused_by_both_sides(make: Make) -> None:
    trainer, engine = make(), make()
    handle, manifest = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    del handle.collective.buckets[1]
    with pytest.raises(ManifestError, match="no bucket holds"):
        trainer.seal(handle, manifest)
    with pytest.raises(ManifestError, match="no bucket holds"):
        engine.receive(handle, manifest)


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGSTOP"])
def test_an_engine_that_dies_or_hangs_in_the_middle_keeps_nobody_from_the_version(
    ending: str, tmp_path: pathlib.Path, make: Make, start: Callable[..., Lines]
) -> None:
    trainers, engine = [make(), make()], make()
    tensors = random_tensors(1)
    published = publish(trainers, 1, tensors, BUCKET_BYTES)
    write(tmp_path, published)
    dying = start("broadcast_engine.py", tmp_path, "--ending", ending)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        receiving = threads.submit(engine.receive, *published)
        dying.wait_for(lambda line: line == "in the middle", "the middle of a broadcast")
        assert_holds(receiving.result(timeout=60), tensors)
    new = random_tensors(2)
    assert_holds(engine.receive(*publish(trainers, 2, new, BUCKET_BYTES)), new)


def test_a_trainer_that_dies_in_the_middle_fails_the_engine_in_time(
    tmp_path: pathlib.Path, start: Callable[..., Lines]
) -> None:
    trainer = start("broadcast_source.py", tmp_path)
    trainer.wait_for(lambda line: line == "offering", "an offer")
    engine = start("broadcast_engine.py", tmp_path, "--victim", trainer.process.pid)
    assert "ConnectionError" in engine.wait_for(lambda line: "Error" in line, "an error")


def test_an_engine_that_no_trainer_answers_fails_in_time(tmp_path: pathlib.Path, make: Make) -> None:
    trainer = make()
    published = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    trainer.close()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        make().receive(*published)
