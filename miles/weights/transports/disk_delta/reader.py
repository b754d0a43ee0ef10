"""The engine's side of disk_delta: builds a version from a chain of folders, or from the last version."""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib

from miles.rpc.gen import policy_pb2, weightsync_pb2
from miles.weights import manifest as manifests
from miles.weights.base import ReceivedWeights
from miles.weights.manifest import DTYPE_BYTES, ChecksumMismatch, ManifestError
from miles.weights.transports.disk_delta.codec import Bytes, Encoding, apply, pieces
from miles.weights.transports.disk_delta.files import Index, Reader, Stored
from miles.weights.transports.memory import Buffer, BufferedWeights

_LONGEST_CHAIN = 10_000


class FolderReader:
    """Builds versions in memory. Keeps the last one, because the next one's changes most likely apply to it."""

    def __init__(self, threads: concurrent.futures.Executor) -> None:
        self._threads = threads
        self._last: tuple[int, Buffer] | None = None
        """The last version: its publication, and its verified bytes."""

    def receive(self, handle: weightsync_pb2.TransportHandle, manifest: policy_pb2.Manifest) -> ReceivedWeights:
        """Build and verify a version. Raises OSError or ManifestError; the last version stays as it is."""
        manifests.validate(manifest)
        path = pathlib.Path(handle.disk_delta.path)
        index = Index.read(path)
        if (index.publication_id, index.checksum) != (handle.publication_id, manifest.checksum.hex()):
            raise ManifestError(
                f"{path} holds publication {index.publication_id} with manifest {index.checksum}; "
                f"wanted is {handle.publication_id} with {manifest.checksum.hex()}"
            )
        folders, base = self._chain(path, index)
        buffer = Buffer(manifest)
        try:
            self._build(buffer, folders, base)
            buffer.verify(self._threads, str(path))
        except (ChecksumMismatch, ManifestError):
            if base is None:
                raise
            # The last version may have been written to since it was verified, so start from the last full one.
            self.forget()
            folders, _ = self._chain(path, index)
            buffer = Buffer(manifest)
            self._build(buffer, folders, None)
            buffer.verify(self._threads, str(path))
        self._last = (handle.publication_id, buffer)
        return BufferedWeights(buffer)

    def forget(self) -> None:
        """Forget the last version; the next one starts from a full version."""
        self._last = None

    def _chain(self, path: pathlib.Path, index: Index) -> tuple[list[pathlib.Path], Buffer | None]:
        """Folders to apply, oldest first, and their base: the last version, or None when the first folder is full."""
        folders = [path]
        while (base := index.base) is not None:
            if self._last is not None:
                publication_id, buffer = self._last
                if (publication_id, buffer.manifest.checksum.hex()) == (base.publication_id, base.checksum):
                    return folders[::-1], buffer
            before = path.parent / base.folder
            index = Index.read(before)
            if (index.publication_id, index.checksum) != (base.publication_id, base.checksum):
                raise ManifestError(
                    f"{folders[-1]} is a change to publication {base.publication_id} with manifest {base.checksum}, "
                    f"but {before} holds publication {index.publication_id} with {index.checksum}"
                )
            folders.append(before)
            if len(folders) > _LONGEST_CHAIN:
                raise ManifestError(f"{path}: {len(folders)} folders lead to no full version")
        return folders[::-1], None

    def _build(self, buffer: Buffer, folders: list[pathlib.Path], base: Buffer | None) -> None:
        """Fill a buffer from one folder after the other; all threads work on the pieces of a folder."""
        targets = {d.name: buffer.view(d) for d in buffer.manifest.tensors}
        known = set()
        if base is not None:
            for descriptor in base.manifest.tensors:
                target = targets.get(descriptor.name)
                if target is not None and target.size == descriptor.nbytes:
                    known.add(descriptor.name)
            sources = {d.name: base.view(d) for d in base.manifest.tensors if d.name in known}
            list(self._threads.map(lambda name: targets[name].__setitem__(slice(None), sources[name]), known))
        for folder in folders:
            self._apply(folder, targets, known)
        if missing := sorted(targets.keys() - known):
            raise ManifestError(f"{folders[-1]} and its bases lack {', '.join(missing[:3])}")

    def _apply(self, folder: pathlib.Path, targets: dict[str, Bytes], known: set[str]) -> None:
        with contextlib.ExitStack() as open_files:
            tasks: list[concurrent.futures.Future[None]] = []
            open_files.callback(concurrent.futures.wait, tasks)  # no thread may read a file that is closed
            for name in Index.read(folder).files:
                reader = Reader(folder / name)
                open_files.callback(reader.close)
                open_files.callback(concurrent.futures.wait, tasks)
                for stored in reader.tensors:
                    target = targets.get(stored.name)
                    if target is None or target.size != stored.nbytes:
                        known.discard(stored.name)  # an older version's; a later folder has all of it
                        continue
                    _check_fits(folder, stored, stored.name in known)
                    known.add(stored.name)
                    tasks += [
                        self._threads.submit(_apply_piece, reader, stored, number, target[piece], piece)
                        for number, piece in enumerate(pieces(stored.nbytes))
                        if stored.encoding is not Encoding.SAME
                    ]
            for task in tasks:
                task.result()


def _apply_piece(reader: Reader, stored: Stored, number: int, target: Bytes, piece: slice) -> None:
    if stored.encoding is Encoding.RAW:
        reader.read_raw(stored.name, piece, target.data)
    else:
        apply(stored.encoding, reader.read_frame(stored.name, number), target, DTYPE_BYTES[stored.dtype])


def _check_fits(folder: pathlib.Path, stored: Stored, known: bool) -> None:
    """Raise ManifestError when a tensor's change cannot apply to the bytes of the base."""
    where = f"{folder}: {stored.name!r}"
    if stored.encoding is not Encoding.RAW and not known:
        raise ManifestError(f"{where} is a change, and there is nothing that it applies to")
    if stored.encoding in (Encoding.XOR, Encoding.OVERWRITE) and len(stored.frames) != len(pieces(stored.nbytes)):
        raise ManifestError(f"{where} has {len(stored.frames)} frames for {len(pieces(stored.nbytes))} pieces")
