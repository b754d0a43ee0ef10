"""Weights as chunks by content hash through the weightsync service: works wherever gRPC does.

A chunk that the other side already has, from another version or from before a disconnect, is not sent again. The
service keeps the bytes in its shared memory, so engines on its host can map what was uploaded to it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

import grpc
import torch

from miles.rpc import connect_blocking
from miles.rpc.gen import policy_pb2, weightsync_pb2, weightsync_pb2_grpc
from miles.weights import manifest as manifests
from miles.weights.base import ReceivedWeights, SendTimes
from miles.weights.manifest import ManifestError, checksum_threads
from miles.weights.transports.grpc_chunks.changes import find_change
from miles.weights.transports.grpc_chunks.part import Part
from miles.weights.transports.grpc_chunks.receiver import ChunkReceiver

logger = logging.getLogger(__name__)

CALL_DEADLINE_S = 60.0
"""How long the service may take to answer a call that moves no chunks."""

SILENCE_S = 60.0
"""How long to retry while no chunk gets through."""

_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 5.0
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)
"""A lost connection or a restarting service. Any other status is final."""

T = TypeVar("T")


class GrpcChunksTransport:
    """Implements WeightTransport; both ends call the service."""

    def __init__(self, address: str, silence_s: float = SILENCE_S) -> None:
        """`address`: host:port of the service. `silence_s`: after so long without progress, a transfer fails."""
        if not address:
            raise ValueError("grpc_chunks needs the address of the weightsync service; give it as Endpoint.address")
        self._address = address
        self._silence_s = silence_s
        self._channels: dict[str, grpc.Channel] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(checksum_threads(), thread_name_prefix="weight-chunks")
        self._receiver = ChunkReceiver(self._threads)
        self._kept: dict[int, Part] = {}
        """The parts of the last version, by offset."""

    def send(
        self,
        handle: weightsync_pb2.TransportHandle,
        descriptors: Sequence[policy_pb2.TensorDescriptor],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        lasting: bool = False,
    ) -> SendTimes:
        """Offer the chunks of one bucket and upload those that the service lacks; resume after a disconnect."""
        if not descriptors:
            return SendTimes()
        began = time.monotonic()
        tensors = list(tensors) if lasting else tensors
        part = Part(descriptors, tensors, handle.grpc_chunks.chunk_bytes, self._threads)
        changes = self._changes(part)
        prepared_s = time.monotonic() - began
        sent = self._upload(handle, part, changes)
        if isinstance(tensors, list) and lasting:
            part.keep(tensors)
        return SendTimes(time.monotonic() - began - prepared_s, prepared_s, sent)

    def seal(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> None:
        """Nothing to do: Prepare checks that every chunk has arrived."""

    def discard(self, handle: weightsync_pb2.TransportHandle) -> None:
        """Nothing to do: the service frees what it has."""

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> ReceivedWeights:
        """Download the chunks that are missing, and verify; resume after a disconnect, even in a later call."""
        manifests.validate(manifest)
        address = handle.grpc_chunks.address or self._address
        name = f"{manifests.describe(manifest.version)} from {address}"
        wanted = weightsync_pb2.ListChunksRequest(version=manifest.version, publication_id=handle.publication_id)

        def listed(progress: Progress) -> Sequence[weightsync_pb2.ChunkDescriptor]:
            answer: weightsync_pb2.ListChunksResponse = self._stub(address).ListChunks(wanted, timeout=CALL_DEADLINE_S)
            return answer.chunks

        chunks = self._retry(f"list the chunks of {name}", listed)
        transfer = self._receiver.begin(handle.publication_id, manifest, chunks)

        def fetch(progress: Progress) -> None:
            request = weightsync_pb2.FetchChunksRequest(
                version=manifest.version, publication_id=handle.publication_id, chunks=transfer.missing()
            )
            request.held.extend(transfer.held())
            if request.chunks:
                call = self._stub(address).FetchChunks(request)
                with progress.watching(call):
                    for answer in call:
                        if not answer.is_change:
                            transfer.put(answer.chunk, answer.data)
                        elif not transfer.put_change(answer.chunk, answer.data):
                            continue
                        progress.note()
            if left := transfer.missing():
                raise ConnectionError(f"the service ended the stream {len(left)} chunks early")

        self._retry(f"fetch {name}", fetch)
        return self._receiver.finish(transfer, address)

    def trim(self, live: Collection[int] | None = None) -> None:
        """Nothing to do: the last version is kept to tell what has changed, whether the service still has it or not."""

    def close(self) -> None:
        """Close the connections and forget what was received."""
        self._receiver.forget()
        self._kept.clear()
        self._threads.shutdown()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _changes(self, part: Part) -> dict[int, tuple[bytes, bytes]]:
        """Ids of the chunks that this part's have replaced, and what has changed, by position; keeps the part."""
        before = self._kept.get(part.begin)
        self._kept[part.begin] = part
        if before is None or before.layout != part.layout:
            return {}

        def change(number: int) -> tuple[int, bytes, bytes]:
            old_id = before.chunks[number].id
            same = old_id == part.chunks[number].id
            return number, old_id, b"" if same else find_change(before.bytes(number), part.bytes(number))

        before.restore()
        found = self._threads.map(change, range(len(part.chunks)))
        return {number: (old_id, data) for number, old_id, data in found if data}

    def _upload(
        self, handle: weightsync_pb2.TransportHandle, part: Part, changes: dict[int, tuple[bytes, bytes]]
    ) -> int:
        """Offer the chunks and upload those that are missing, as changes where they can be; return the bytes sent."""
        version, publication_id, chunks = handle.grpc_chunks.version, handle.publication_id, part.chunks
        offer = weightsync_pb2.OfferChunksRequest(version=version, publication_id=publication_id, chunks=chunks)
        offer.base_ids.extend(changes[number][0] if number in changes else b"" for number in range(len(chunks)))
        sent = 0

        def requests(
            missing: Iterable[int], based: Collection[int], progress: Progress
        ) -> Iterator[weightsync_pb2.UploadChunksRequest]:
            nonlocal sent
            for number in missing:
                base_id, data = changes[number] if number in based else (b"", bytes(part.bytes(number)))
                yield weightsync_pb2.UploadChunksRequest(
                    version=version, publication_id=publication_id, chunk=chunks[number], data=data, base_id=base_id
                )
                sent += len(data)
                progress.note()

        def upload(progress: Progress) -> None:
            answer = self._stub(self._address).OfferChunks(offer, timeout=CALL_DEADLINE_S)
            if not answer.missing:
                return
            call = self._stub(self._address).UploadChunks.future(requests(answer.missing, set(answer.based), progress))
            with progress.watching(call):
                arrived = call.result().chunks
            if arrived < len(answer.missing):
                raise ConnectionError(f"{len(answer.missing) - arrived} chunks are changes of chunks that are gone")

        self._retry(f"upload {len(chunks)} chunks of {manifests.describe(version)} to {self._address}", upload)
        return sent

    def _retry(self, what: str, attempt: Callable[[Progress], T]) -> T:
        """Retry an attempt that loses its connection; TimeoutError after `silence_s` without any progress.

        The channel stays open and reconnects by itself: closing it would wait for what a failed call still had to send,
        up to gRPC's keepalive timeout.
        """
        progress = Progress(self._silence_s)
        retry_s = _FIRST_RETRY_S
        while True:
            notes = progress.notes
            try:
                return attempt(progress)
            except (grpc.RpcError, ConnectionError) as error:
                fault = _describe(error)
                if isinstance(error, grpc.RpcError) and error.code() not in _TRANSIENT:
                    raise ManifestError(f"cannot {what}: {fault}") from error
                if progress.notes > notes:
                    retry_s = _FIRST_RETRY_S
                if progress.silent_s() + retry_s > self._silence_s:
                    silent = f"nothing for {progress.silent_s():.0f} s"
                    raise TimeoutError(f"could not {what}: {silent}; last: {fault}") from error
                logger.info("cannot %s: %s; trying again in %.1f s", what, fault, retry_s)
            time.sleep(retry_s)
            retry_s = min(2 * retry_s, _LAST_RETRY_S)

    def _stub(self, address: str) -> weightsync_pb2_grpc.WeightSyncServiceStub:
        if address not in self._channels:
            self._channels[address] = connect_blocking(address)
        return weightsync_pb2_grpc.WeightSyncServiceStub(self._channels[address])


class Progress:
    """The time of the last progress, and a watchdog that cancels a call without any."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._last = time.monotonic()
        self.notes = 0

    def note(self) -> None:
        """Record that a chunk got through."""
        self._last = time.monotonic()
        self.notes += 1

    def silent_s(self) -> float:
        """Seconds since the last progress."""
        return time.monotonic() - self._last

    @contextlib.contextmanager
    def watching(self, call: grpc.Future) -> Iterator[None]:
        """Cancel a call when `silence_s` pass without progress."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(min(1.0, self._silence_s / 4)):
                if self.silent_s() > self._silence_s:
                    call.cancel()
                    return

        watcher = threading.Thread(target=watch, name="weight-chunks-watch", daemon=True)
        watcher.start()
        with contextlib.ExitStack() as at_end:
            at_end.callback(watcher.join)
            at_end.callback(done.set)
            yield


def _describe(error: grpc.RpcError | ConnectionError) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else str(error)
