"""The collective transport over gloo: buckets from several ranks, engines that come, go, die and hang."""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import pathlib
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
import torch.distributed as dist
from broadcast_kit import PATIENT, QUICK, Published, publish, random_tensors, transport, write
from torch.distributed import distributed_c10d
from weightsync_processes import Lines

from miles.rpc.gen import weightsource_pb2
from miles.weights.flat import FlatWeights
from miles.weights.manifest import ChecksumMismatch, ManifestError
from miles.weights.transports.collective.group import Watch
from miles.weights.transports.collective.member import receive_from
from miles.weights.transports.collective.transport import CollectiveTransport, local_host

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


def test_engines_that_came_one_by_one_share_the_next_broadcast(make: Make) -> None:
    trainer = transport(timing=PATIENT)
    engines = [make(), make()]
    published = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    for engine in engines:
        engine.receive(*published)
    assert trainer.source.broadcasts == 2
    new = random_tensors(2)
    published = publish([trainer], 2, new, BUCKET_BYTES)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        early = threads.submit(engines[0].receive, *published)
        time.sleep(3 * QUICK.gather_s)
        assert_holds(engines[1].receive(*published), new)
        assert_holds(early.result(timeout=120), new)
    assert trainer.source.broadcasts == 3
    trainer.close()


def test_a_version_that_is_not_live_is_refused_and_its_memory_is_used_again(make: Make) -> None:
    trainer, engine = make(), make()
    old = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    trainer.trim([1])
    before = trainer.source.staged.nbytes()
    publish([trainer], 2, random_tensors(2), BUCKET_BYTES)
    trainer.trim([2])
    assert trainer.source.staged.nbytes() == before
    with pytest.raises(ConnectionError, match="publication 1 is not, or no longer, held"):
        engine.receive(*old)


def test_a_version_that_was_given_up_is_forgotten(make: Make) -> None:
    trainer = make()
    handle, _ = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    trainer.discard(handle)
    assert trainer.source.staged.nbytes() == 0


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


class ServerReceiver:
    """Joins as an inference server does that is told to over HTTP: a group of torch.distributed, buckets without gaps.

    SGLang's /init_weights_update_group makes its group by torch's own helper, over a store prefixed with the name.
    """

    def __init__(self, shapes: list[list[tuple[torch.dtype, torch.Size]]]) -> None:
        self._shapes = shapes
        self.received: list[torch.Tensor] = []

    def join(self, source: str, ticket: weightsource_pb2.GroupTicket, watch: Watch) -> None:
        timeout = datetime.timedelta(seconds=20)
        url = f"tcp://{ticket.master_address}:{ticket.master_port}"
        store, rank, size = next(dist.rendezvous(url, ticket.rank_offset, ticket.world_size, timeout=timeout))
        self._group, _ = distributed_c10d._new_process_group_helper(
            size,
            rank,
            [],
            distributed_c10d.Backend(ticket.backend),
            dist.PrefixStore(ticket.group_name, store),
            group_name=ticket.group_name,
            timeout=timeout,
        )
        distributed_c10d._world.pg_group_ranks[self._group] = {i: i for i in range(size)}

    def take(self, source: str, watch: Watch) -> None:
        for bucket in self._shapes:
            sizes = [shape.numel() * dtype.itemsize for dtype, shape in bucket]
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
            dist.broadcast(flat, src=0, group=self._group)
            parts = zip(flat.split(sizes), bucket, strict=True)
            self.received += [part.clone().view(dtype).view(shape) for part, (dtype, shape) in parts]

    def leave(self, source: str) -> None:
        dist.destroy_process_group(self._group)


def test_a_server_with_a_group_of_torch_takes_part_beside_an_engine(make: Make) -> None:
    trainer, engine = make(), make()
    tensors = random_tensors(1)
    published = publish([trainer], 1, tensors, BUCKET_BYTES)
    handle, manifest = published
    shapes = [
        [
            (tensors[tensor.name].dtype, tensors[tensor.name].shape)
            for tensor in manifest.tensors
            if bucket.offset <= tensor.offset < bucket.offset + bucket.nbytes
        ]
        for bucket in handle.collective.buckets
    ]
    server = ServerReceiver(shapes)
    source = handle.collective.buckets[0].source
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        engine_has = threads.submit(engine.receive, *published)
        hello = weightsource_pb2.JoinHello(publication_id=1, member="server", ranks=1, packed=True)
        assert receive_from(source, hello, server, time.monotonic() + 30, QUICK) == ["server"]
        assert_holds(engine_has.result(timeout=120), tensors)
    server.leave(source)
    sent = [tensor for tensor in tensors.values() if tensor.numel()]
    assert all(torch.equal(*pair) for pair in zip([t for t in server.received if t.numel()], sent, strict=True))


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
        assert_holds(receiving.result(timeout=200), tensors)
    new = random_tensors(2)
    assert_holds(engine.receive(*publish(trainers, 2, new, BUCKET_BYTES)), new)


def test_a_trainer_that_dies_in_the_middle_fails_the_engine_in_time(
    tmp_path: pathlib.Path, start: Callable[..., Lines]
) -> None:
    trainer = start("broadcast_source.py", tmp_path)
    trainer.wait_for(lambda line: line == "offering 1", "an offer")
    engine = start("broadcast_engine.py", tmp_path, "--victim", trainer.process.pid)
    assert "ConnectionError" in engine.wait_for(lambda line: "Error" in line, "an error")


@pytest.mark.parametrize(
    ("peer", "expected"),
    [("127.0.0.1:7300", "127.0.0.1"), ("[::1]:7300", "::1"), ("", "127.0.0.1")],
)
def test_a_source_is_where_those_who_reach_the_service_reach_it(peer: str, expected: str) -> None:
    if peer.startswith("["):
        with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                pytest.skip("this machine has no IPv6")
    assert local_host(peer) == expected


def test_an_engine_that_no_trainer_answers_fails_in_time(tmp_path: pathlib.Path, make: Make) -> None:
    trainer = make()
    published = publish([trainer], 1, random_tensors(1), BUCKET_BYTES)
    trainer.close()
    with pytest.raises(ConnectionError, match="cannot be reached"):
        make().receive(*published)
