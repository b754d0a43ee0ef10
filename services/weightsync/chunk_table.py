"""The chunks of one version in the service's memory: their names, and their bytes in and out."""

from __future__ import annotations

import mmap
import pathlib
from collections.abc import Iterable, Sequence

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.weightsync.version import Refused
from miles.threads import Threads
from miles.weights import manifest as manifests
from miles.weights.transports.grpc_chunks import chunks as chunking
from miles.weights.transports.grpc_chunks.changes import apply_change


class ChunkTable:
    """Chunks of a file of `nbytes` bytes. Methods block while they copy or hash."""

    def __init__(self, path: pathlib.Path, nbytes: int, others: Iterable[ChunkTable] = ()) -> None:
        """`others`: tables to copy chunks from, so that they need not be uploaded."""
        self._nbytes = nbytes
        self._others = list(others)
        with path.open("r+b", buffering=0) as file:
            self._mapping: mmap.mmap | None = mmap.mmap(file.fileno(), nbytes)
        self._listed: list[weightsync_pb2.ChunkDescriptor] = []
        self._offered: dict[int, weightsync_pb2.ChunkDescriptor] = {}
        """By offset: what the trainer has offered."""
        self._arrived: dict[bytes, weightsync_pb2.ChunkDescriptor] = {}
        """By id: where the bytes of a chunk are."""
        self._placed: dict[int, bytes] = {}
        """By offset: the id of the chunk whose bytes are there."""
        self._changes: dict[bytes, tuple[bytes, bytes]] = {}
        """By id of a chunk that came as a change: its base's id and the change, for engines with the base."""

    # -- from the trainer ---------------------------------------------------------------------------------------------

    def offer(self, chunks: Sequence[weightsync_pb2.ChunkDescriptor]) -> list[int]:
        """Record the chunks of a part; copy those that are known; return the positions of the others.

        Raises Refused for chunks that do not lie in the buffer.
        """
        if wrong := chunking.fault(chunks, self._nbytes):
            raise Refused(wrong)
        missing = []
        for number, chunk in enumerate(chunks):
            if self._offered.get(chunk.offset) == chunk and self._has(chunk):
                continue
            self._offered[chunk.offset] = chunk
            data = next((data for table in (self, *self._others) if (data := table._find(chunk)) is not None), None)
            if data is None:
                missing.append(number)
            else:
                self._put(chunk, data)
        return missing

    def put(self, chunk: weightsync_pb2.ChunkDescriptor, data: bytes) -> None:
        """Store a chunk that was offered; Refused when it was not, or when its bytes do not match its id."""
        if self._offered.get(chunk.offset) != chunk:
            raise Refused(f"a chunk at byte {chunk.offset} came that was not offered")
        if len(data) != chunk.nbytes or manifests.checksum(data) != chunk.id:
            raise Refused(f"the chunk at byte {chunk.offset} came with other bytes than its id says")
        self._put(chunk, data)

    def has_base(self, chunk: weightsync_pb2.ChunkDescriptor, base_id: bytes) -> bool:
        """Whether a change of that base to this chunk could be applied."""
        return self._base(chunk, base_id) is not None

    def put_change(self, chunk: weightsync_pb2.ChunkDescriptor, base_id: bytes, change: bytes) -> bool:
        """Store a chunk as `put` does, made of its base; False when the base has been freed. Raises Refused."""
        base = self._base(chunk, base_id)
        if base is None:
            return False
        try:
            self.put(chunk, apply_change(change, base))
        except ValueError as error:
            raise Refused(f"the chunk at byte {chunk.offset} came as a change that does not apply: {error}") from error
        self._changes[chunk.id] = (base_id, change)
        return True

    def covers(self, manifest: policy_pb2.Manifest) -> bool:
        """Whether every tensor's bytes have arrived."""
        spans = sorted((c.offset, c.offset + c.nbytes) for c in self._offered.values() if self._has(c))
        position, end = 0, 0
        for tensor in manifest.tensors:
            need = tensor.offset + tensor.nbytes
            while position < len(spans) and end < need and spans[position][0] <= max(end, tensor.offset):
                position, end = position + 1, max(end, spans[position][1])
            if tensor.nbytes and end < need:
                return False
        return True

    # -- to engines ---------------------------------------------------------------------------------------------------

    def listed(self) -> Sequence[weightsync_pb2.ChunkDescriptor]:
        """Every chunk in buffer order: those uploaded; cut now if the trainer wrote the file itself."""
        if not self._listed:
            self._listed = [self._offered[offset] for offset in sorted(self._offered)] or self._cut()
            self._arrived = {chunk.id: chunk for chunk in self._listed}
        return self._listed

    def get(self, number: int) -> bytes:
        """The bytes of a chunk of the list; Refused when there is no such chunk or the version has been freed."""
        if not 0 <= number < len(self._listed):
            raise Refused(f"there is no chunk {number}; the list has {len(self._listed)}")
        chunk = self._listed[number]
        return self._memory[chunk.offset : chunk.offset + chunk.nbytes]

    def change(self, number: int, held: bytes) -> bytes | None:
        """What makes a chunk of the list of the one with the id `held`; None when that is not known."""
        if not held or not 0 <= number < len(self._listed):
            return None
        base_id, change = self._changes.get(self._listed[number].id, (b"", b""))
        return change if base_id == held else None

    def close(self) -> None:
        """Let go of a freed version's memory; it is unmapped when threads that read it are done."""
        self._mapping = None
        self._others.clear()
        self._changes.clear()

    @property
    def _memory(self) -> mmap.mmap:
        if self._mapping is None:
            raise Refused("the version has been freed")
        return self._mapping

    def _cut(self) -> list[weightsync_pb2.ChunkDescriptor]:
        with (
            Threads(manifests.checksum_threads()) as pool,
            memoryview(self._memory) as data,
        ):
            return chunking.cut(data, 0, chunking.CHUNK_BYTES, pool)

    def _has(self, chunk: weightsync_pb2.ChunkDescriptor) -> bool:
        return self._placed.get(chunk.offset) == chunk.id

    def _base(self, chunk: weightsync_pb2.ChunkDescriptor, base_id: bytes) -> bytes | None:
        """The bytes of a chunk's base, from this version or another one."""
        wanted = weightsync_pb2.ChunkDescriptor(offset=chunk.offset, nbytes=chunk.nbytes, id=base_id)
        found = (table._find(wanted) for table in (*self._others, self))
        return next((data for data in found if data is not None), None) if base_id else None

    def _find(self, chunk: weightsync_pb2.ChunkDescriptor) -> bytes | None:
        """The bytes of a chunk with the same id, verified; None when there is none."""
        there = self._arrived.get(chunk.id)
        if self._mapping is None or there is None or there.nbytes != chunk.nbytes:
            return None
        data = self._memory[there.offset : there.offset + there.nbytes]
        return data if manifests.checksum(data) == chunk.id else None

    def _put(self, chunk: weightsync_pb2.ChunkDescriptor, data: bytes) -> None:
        self._memory[chunk.offset : chunk.offset + chunk.nbytes] = data
        self._arrived[chunk.id] = chunk
        self._placed[chunk.offset] = chunk.id
