"""The engine's state of grpc_chunks: the chunks that have arrived, and those that the last version already had."""

from __future__ import annotations

import concurrent.futures
import logging
from collections.abc import Sequence

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.base import ReceivedWeights
from miles.weights.manifest import ChecksumMismatch, ManifestError
from miles.weights.transports.grpc_chunks import chunks as chunking
from miles.weights.transports.grpc_chunks.changes import apply_change
from miles.weights.transports.memory import Buffer, BufferedWeights

logger = logging.getLogger(__name__)


class Transfer:
    """A version that is being received; it outlives the call that began it."""

    def __init__(
        self, publication_id: int, manifest: policy_pb2.Manifest, chunks: Sequence[weightsync_pb2.ChunkDescriptor]
    ) -> None:
        """ManifestError when the chunks do not make up the manifest's tensors."""
        self.publication_id = publication_id
        self.buffer = Buffer(manifest)
        self.chunks = chunks
        self._missing = dict.fromkeys(range(len(chunks)))
        self._bases: dict[int, tuple[bytes, memoryview]] = {}
        """By position: id and bytes of a chunk of the last version, which may have been written to."""
        _check(manifest, chunks)

    @property
    def checksum(self) -> bytes:
        """Of the manifest."""
        return bytes(self.buffer.manifest.checksum)

    def is_for(
        self, publication_id: int, manifest: policy_pb2.Manifest, chunks: Sequence[weightsync_pb2.ChunkDescriptor]
    ) -> bool:
        """Whether it is a transfer of this publication in these chunks."""
        same = (self.publication_id, self.checksum) == (publication_id, manifest.checksum)
        return same and list(self.chunks) == list(chunks)

    def missing(self) -> list[int]:
        """Positions of the chunks that have not arrived yet."""
        return list(self._missing)

    def offer_base(self, number: int, base_id: bytes, data: memoryview) -> None:
        """Have a chunk that a change may be applied to."""
        self._bases[number] = (base_id, data)

    def held(self) -> list[bytes]:
        """For each missing chunk the id of its base; empty without one."""
        return [self._bases[number][0] if number in self._bases else b"" for number in self._missing]

    def put_change(self, number: int, change: bytes) -> bool:
        """Store a chunk that has arrived as a change; False, and its base is forgotten, when that makes other bytes."""
        _, base = self._bases.pop(number, (b"", memoryview(b"")))
        try:
            self.put(number, apply_change(change, base))
        except ValueError as error:  # ChecksumMismatch among them
            logger.warning("chunk %d does not come of the last version's bytes: %s; it is sent in full", number, error)
            return False
        return True

    def drop_bases(self) -> None:
        """Let go of the last version."""
        self._bases.clear()

    def put(self, number: int, data: bytes | memoryview) -> None:
        """Store a chunk that has arrived; ChecksumMismatch unless its bytes match its id."""
        if number not in self._missing:
            raise ManifestError(f"chunk {number} came, which was not requested")
        chunk = self.chunks[number]
        if len(data) != chunk.nbytes or manifests.checksum(data) != chunk.id:
            raise ChecksumMismatch(
                f"chunk {number} of {manifests.describe(self.buffer.manifest.version)} came with other bytes than "
                f"its id names: {len(data)} of {chunk.nbytes} bytes"
            )
        self.buffer.memory[chunk.offset : chunk.offset + chunk.nbytes] = data
        del self._missing[number]


class ChunkReceiver:
    """Keeps the last version, and a transfer that was interrupted."""

    def __init__(self, threads: concurrent.futures.Executor) -> None:
        self._threads = threads
        self._transfer: Transfer | None = None
        self._last: Transfer | None = None

    def begin(
        self, publication_id: int, manifest: policy_pb2.Manifest, chunks: Sequence[weightsync_pb2.ChunkDescriptor]
    ) -> Transfer:
        """Resume the transfer that was interrupted, or begin one with the chunks that the last version has."""
        interrupted = self._transfer
        if interrupted is not None and interrupted.is_for(publication_id, manifest, chunks):
            return interrupted
        self._transfer = None  # before its memory is needed again
        transfer = self._transfer = Transfer(publication_id, manifest, chunks)
        if self._last is not None:
            known = {chunk.id: chunk for chunk in self._last.chunks}
            placed = {(chunk.offset, chunk.nbytes): chunk.id for chunk in self._last.chunks}
            memory = memoryview(self._last.buffer.memory)
            for number, chunk in enumerate(chunks):
                old = known.get(chunk.id)
                if old is not None and old.nbytes == chunk.nbytes:
                    with memory[old.offset : old.offset + old.nbytes] as data:
                        if manifests.checksum(data) == chunk.id:  # the engine may have written to it
                            transfer.put(number, data)
                elif base_id := placed.get((chunk.offset, chunk.nbytes)):
                    transfer.offer_base(number, base_id, memory[chunk.offset : chunk.offset + chunk.nbytes])
        return transfer

    def finish(self, transfer: Transfer, source: str) -> ReceivedWeights:
        """Verify a complete transfer; it becomes the last version."""
        self._transfer = None
        transfer.drop_bases()
        transfer.buffer.verify(self._threads, source)
        self._last = transfer
        return BufferedWeights(transfer.buffer)

    def forget(self) -> None:
        """Forget the last version and the transfer."""
        self._transfer = self._last = None


def _check(manifest: policy_pb2.Manifest, chunks: Sequence[weightsync_pb2.ChunkDescriptor]) -> None:
    """Raise ManifestError unless every tensor's bytes lie in chunks, and every chunk in the buffer."""
    what = f"the chunks of {manifests.describe(manifest.version)}"
    if wrong := chunking.fault(chunks, manifest.total_bytes):
        raise ManifestError(f"{what}: {wrong}")
    position, end = 0, 0
    for tensor in manifest.tensors:
        while position < len(chunks) and end < tensor.offset + tensor.nbytes:
            chunk = chunks[position]
            if chunk.offset > max(end, tensor.offset):
                raise ManifestError(f"{what} leave out bytes {end} to {chunk.offset}, in which {tensor.name!r} lies")
            position, end = position + 1, max(end, chunk.offset + chunk.nbytes)
        if end < tensor.offset + tensor.nbytes:
            raise ManifestError(f"{what} end at byte {end}, before the end of {tensor.name!r}")
