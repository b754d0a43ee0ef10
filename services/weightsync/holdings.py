"""The bytes of one stream's publications: where they are, and by which transports engines can get them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Collection

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.services.weightsync import transport_choice
from miles.services.weightsync.chunk_table import ChunkTable
from miles.services.weightsync.folders import FULL_EVERY, Folder, FolderStore
from miles.services.weightsync.segments import Segment, SegmentStore
from miles.services.weightsync.store import HoldingRecord, StateStore
from miles.services.weightsync.transport_choice import Placement
from miles.services.weightsync.version import UnknownVersion
from miles.weights.transports.grpc_chunks.chunks import CHUNK_BYTES

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Holding:
    """One publication's bytes."""

    version: policy_pb2.WeightVersion
    placement: Placement
    handles: list[weightsync_pb2.TransportHandle]
    """One for each kind of the placement; the trainer fills them in at Prepare."""
    segment: Segment | None = None
    folder: Folder | None = None
    manifest: policy_pb2.Manifest | None = None
    """None before PREPARED."""
    chunks: ChunkTable | None = None
    """Made when chunks are first requested or uploaded."""


class Holdings:
    """The publications of one stream, by publication id. All methods run on the event loop."""

    def __init__(self, key: str, store: StateStore, segments: SegmentStore, folders: FolderStore) -> None:
        self._key = key
        self._store = store
        self._segments = segments
        self._folders = folders
        self._of: dict[int, Holding] = {}

    def __contains__(self, publication_id: int) -> bool:
        return publication_id in self._of

    def __getitem__(self, publication_id: int) -> Holding:
        return self._of[publication_id]

    @property
    def nbytes(self) -> int:
        """Shared memory in use, in bytes."""
        return sum(holding.segment.nbytes for holding in self._of.values() if holding.segment is not None)

    def restore(self, known: Collection[int]) -> tuple[set[pathlib.Path], set[pathlib.Path]]:
        """Restore what an earlier process held, if it still exists and belongs to a known publication.

        Returns the files and the folders.
        """
        for publication_id, record in self._store.holdings(self._key):
            holding = _restored(record)
            if publication_id in known and _is_there(holding):
                self._of[publication_id] = holding
            else:
                self._store.delete_holding(self._key, publication_id)
        files = {h.segment.path for h in self._of.values() if h.segment is not None}
        folders = {
            path for h in self._of.values() if h.folder is not None for path in (h.folder.path, h.folder.partial)
        }
        return files, folders

    async def allocate(
        self,
        publication_id: int,
        request: weightsync_pb2.AllocateRequest,
        placement: Placement,
        still_wanted: Callable[[], bool],
    ) -> Holding:
        """Reserve room for a version; raises OutOfMemory, or UnknownVersion when it is no longer wanted afterwards."""
        number, nbytes = request.version.version, request.nbytes
        holding = Holding(request.version, placement, [])
        try:
            if placement.in_memory:
                holding.segment = await asyncio.to_thread(
                    self._segments.allocate, self._key, number, publication_id, nbytes
                )
            if weightsync_pb2.TRANSPORT_KIND_DISK_DELTA in placement.kinds:
                holding.folder = await asyncio.to_thread(
                    self._folders.allocate, self._key, number, publication_id, nbytes
                )
            if not still_wanted():
                raise UnknownVersion("the job was released meanwhile")
        except BaseException:
            self._free(holding, reusable=False)
            raise
        holding.handles = [self._handle(kind, publication_id, request, holding) for kind in placement.kinds]
        self._of[publication_id] = holding
        self._store.save_holding(self._key, publication_id, _record(holding))
        return holding

    def find(self, handle: weightsync_pb2.TransportHandle, version: int) -> int:
        """The publication of a handle that Allocate returned; UnknownVersion when it has been freed."""
        for publication_id, holding in self._of.items():
            first = holding.handles[0]
            same_file = handle.shared_memory.path and first.shared_memory.path == handle.shared_memory.path
            if (handle.publication_id == publication_id or same_file) and holding.version.version == version:
                return publication_id
        raise UnknownVersion("its allocation was replaced by a later one or freed; allocate again")

    def check(self, publication_id: int, request: weightsync_pb2.PrepareRequest) -> None:
        """Raise UnknownVersion unless the bytes that the trainer declares complete are where they should be."""
        holding = self._of[publication_id]
        if holding.manifest is not None:
            return
        nbytes = request.manifest.total_bytes
        if [handle.kind for handle in (request.handle, *request.more)] != list(holding.placement.kinds):
            raise UnknownVersion("it was prepared with handles of other transports than Allocate gave; allocate again")
        if holding.segment is not None and nbytes > holding.segment.nbytes:
            raise UnknownVersion(f"{holding.segment.path} is too small for its {nbytes} bytes; allocate again")
        uploaded = weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS in holding.placement.kinds
        if uploaded and (holding.chunks is None or not holding.chunks.covers(request.manifest)):
            raise UnknownVersion("not every chunk of it has arrived; allocate again and upload them all")
        if holding.folder is not None and not holding.folder.path.is_dir():
            raise UnknownVersion(f"{holding.folder.path} is not there; do service and trainer share this storage?")

    def complete(self, publication_id: int, request: weightsync_pb2.PrepareRequest) -> None:
        """Store the manifest and handles of a version that passed `check`."""
        holding = self._of[publication_id]
        if holding.manifest is None:
            holding.handles, holding.manifest = [request.handle, *request.more], request.manifest
            self._store.save_holding(self._key, publication_id, _record(holding))

    def transports(self, publication_id: int) -> list[weightsync_pb2.TransportKind.ValueType]:
        """Transports by which engines can get a publication, the best first."""
        return transport_choice.transports_of(self._of[publication_id].placement)

    def handle_for(self, publication_id: int, usable: Collection[int]) -> weightsync_pb2.TransportHandle:
        """The handle for an engine to get a publication by the best transport that it can use."""
        holding = self._of[publication_id]
        kind = transport_choice.transport_for(holding.placement, usable)
        for handle in holding.handles:
            if handle.kind == kind:
                return handle
        request = weightsync_pb2.AllocateRequest(version=holding.version)
        if holding.manifest is not None:
            request.nbytes = holding.manifest.total_bytes
        return self._handle(kind, publication_id, request, holding)

    def free(self, publication_id: int, reusable: bool) -> None:
        """Free a publication's bytes."""
        holding = self._of.pop(publication_id, None)
        if holding is not None:
            self._free(holding, reusable)
            self._store.delete_holding(self._key, publication_id)

    def free_spare(self) -> int:
        """Free the memory kept for the next version; return its bytes."""
        return self._segments.free_spare(self._key)

    def chunk_table(self, publication_id: int) -> ChunkTable:
        """The chunks of a publication that is in memory; UnknownVersion when it is not."""
        holding = self._of.get(publication_id)
        if holding is None or holding.segment is None:
            raise UnknownVersion("its bytes are not in the service's memory, or have been freed")
        if holding.chunks is None:
            others = [h.chunks for h in self._of.values() if h.chunks is not None]
            nbytes = holding.segment.nbytes if holding.manifest is None else holding.manifest.total_bytes
            holding.chunks = ChunkTable(holding.segment.path, nbytes, others)
        return holding.chunks

    def folders_in_use(self) -> set[pathlib.Path]:
        """Folders of versions, and those that a trainer may be writing changes against."""
        found: set[pathlib.Path] = set()
        for holding in self._of.values():
            if holding.folder is not None:
                found.add(holding.folder.path)
                bases = [handle.disk_delta.base_path for handle in holding.handles]
                found |= {pathlib.Path(base) for base in bases if base}
        return found

    def _free(self, holding: Holding, reusable: bool) -> None:
        if holding.chunks is not None:
            holding.chunks.close()
        if holding.segment is not None:
            self._segments.free(self._key, holding.segment, reusable)
        if holding.folder is not None:
            self._folders.free(holding.folder, self.folders_in_use())

    def _handle(
        self,
        kind: weightsync_pb2.TransportKind.ValueType,
        publication_id: int,
        request: weightsync_pb2.AllocateRequest,
        holding: Holding,
    ) -> weightsync_pb2.TransportHandle:
        """The handle of a holding for one transport; only the id is set when the bytes stay with the trainer."""
        handle = weightsync_pb2.TransportHandle(kind=kind, publication_id=publication_id)
        if kind == weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY and holding.segment is not None:
            handle.shared_memory.path = str(holding.segment.path)
            handle.shared_memory.nbytes = holding.segment.nbytes
        elif kind == weightsync_pb2.TRANSPORT_KIND_GRPC_CHUNKS:
            handle.grpc_chunks.version.CopyFrom(request.version)
            handle.grpc_chunks.nbytes = request.nbytes
            handle.grpc_chunks.chunk_bytes = CHUNK_BYTES
        elif kind == weightsync_pb2.TRANSPORT_KIND_DISK_DELTA and holding.folder is not None:
            delta = handle.disk_delta
            delta.path, delta.partial_path = str(holding.folder.path), str(holding.folder.partial)
            delta.encoding = request.delta_encoding or weightsync_pb2.DELTA_ENCODING_XOR
            base = self._base(request.full_every or FULL_EVERY)
            if base is not None:
                delta.base_publication_id, delta.base_path = base
        return handle

    def _base(self, full_every: int) -> tuple[int, str] | None:
        """The newest complete folder, to write changes against; None when a full version is due."""
        for publication_id, holding in reversed(self._of.items()):
            if holding.folder is not None and holding.manifest is not None:
                due = len(self._folders.chain(holding.folder.path)) >= full_every
                return None if due else (publication_id, str(holding.folder.path))
        return None


def _record(holding: Holding) -> HoldingRecord:
    """The part of a holding that survives a restart."""
    segment = holding.segment
    return HoldingRecord(
        path="" if segment is None else str(segment.path),
        nbytes=0 if segment is None else segment.nbytes,
        fixed=holding.placement.fixed,
        version=holding.version.SerializeToString(),
        handles=weightsync_pb2.AllocateResponse(
            handle=holding.handles[0], more=holding.handles[1:]
        ).SerializeToString(),
        manifest=None if holding.manifest is None else holding.manifest.SerializeToString(),
    )


def _restored(record: HoldingRecord) -> Holding:
    allocated = weightsync_pb2.AllocateResponse.FromString(record.handles)
    handles = [allocated.handle, *allocated.more]
    delta = next((handle.disk_delta for handle in handles if handle.HasField("disk_delta")), None)
    return Holding(
        version=policy_pb2.WeightVersion.FromString(record.version),
        placement=Placement(tuple(handle.kind for handle in handles), fixed=record.fixed),
        handles=handles,
        segment=Segment(pathlib.Path(record.path), record.nbytes) if record.path else None,
        folder=None if delta is None else Folder(pathlib.Path(delta.path), pathlib.Path(delta.partial_path)),
        manifest=None if record.manifest is None else policy_pb2.Manifest.FromString(record.manifest),
    )


def _is_there(holding: Holding) -> bool:
    """Whether the bytes still exist."""
    segment, folder = holding.segment, holding.folder
    if segment is not None and not (segment.path.exists() and segment.path.stat().st_size >= segment.nbytes):
        return False
    return folder is None or holding.manifest is None or folder.path.is_dir()
