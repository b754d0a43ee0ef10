"""How each engine of a stream can get bytes: what it said when it subscribed, and what it has failed at since."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from miles.rpc.gen import weightsync_pb2
from miles.services.weightsync.transport_choice import Placement
from miles.weights.usable_transports import engines_by_gpu, fits_gpu_memory

if TYPE_CHECKING:
    from miles.rpc.gen import weightsource_pb2
    from miles.rpc.gen.weightsync_pb2 import TransportKind
    from miles.services.weightsync.engine import Engine

LOCAL = frozenset({weightsync_pb2.TRANSPORT_KIND_SHARED_MEMORY})
"""What a process that names no transports can use."""

_CUDA_IPC = weightsync_pb2.TRANSPORT_KIND_CUDA_IPC


class Links:
    """The engines of one stream by name. An engine's last subscription counts."""

    def __init__(self) -> None:
        self._usable: dict[str, frozenset[int]] = {}
        self._gpu_memory: dict[str, weightsource_pb2.GpuMemoryProbe] = {}
        self._used: dict[str, TransportKind.ValueType] = {}
        """Transport of each engine's last prefetch."""
        self._failed: set[str] = set()
        """Engines that could not load a version from the trainer's GPU memory, although they seemed able to."""

    def attach(self, hello: weightsync_pb2.EngineHello) -> None:
        """An engine has subscribed."""
        self._usable[hello.engine_id] = frozenset(hello.usable) or LOCAL
        self._gpu_memory.pop(hello.engine_id, None)
        if hello.HasField("gpu_memory"):
            self._gpu_memory[hello.engine_id] = hello.gpu_memory
        self._failed.discard(hello.engine_id)

    def usable(self, engine_id: str) -> frozenset[int]:
        """Transports that an engine can use whatever the trainer can, which leaves out CUDA_IPC."""
        return self._usable.get(engine_id, LOCAL)

    def used(self, engine_id: str) -> TransportKind.ValueType:
        """Transport of an engine's last prefetch; UNSPECIFIED before the first."""
        return self._used.get(engine_id, weightsync_pb2.TRANSPORT_KIND_UNSPECIFIED)

    def prefetches(self, engine_id: str, kind: TransportKind.ValueType) -> None:
        """An engine is ordered to prefetch a version by this transport."""
        self._used[engine_id] = kind

    def failed(self, engine_id: str) -> None:
        """An engine could not prefetch the last version that it was ordered to, or did not do so in time.

        If that came from GPU memory, no further version is put there for it until it subscribes again.
        """
        if self.used(engine_id) == _CUDA_IPC:
            self._failed.add(engine_id)

    def note_late(self, engines: Iterable[Engine]) -> None:
        """Count those of the engines that hang in a prefetch as failed: opening GPU memory may hang."""
        for engine in engines:
            if engine.hangs_in_prefetch():
                self.failed(engine.engine_id)

    def has_failed(self, engine_id: str) -> bool:
        """Whether an engine could not load from GPU memory since it subscribed."""
        return engine_id in self._failed

    def gpu_memory(self, engine_ids: Iterable[str]) -> list[weightsource_pb2.GpuMemoryProbe]:
        """What these engines share of their GPUs' memory, for trainers to open."""
        able = [engine_id for engine_id in engine_ids if engine_id not in self._failed]
        return [self._gpu_memory[engine_id] for engine_id in able if engine_id in self._gpu_memory]

    def usable_for(
        self, engine_ids: Iterable[str], opened: weightsource_pb2.OpenedGpuMemory, nbytes: int
    ) -> list[frozenset[int]]:
        """Transports that each of the attached engines can use for a version of `nbytes` bytes.

        `opened`: the GPU memory that the trainer could open.
        """
        names = list(engine_ids)
        by_gpu = engines_by_gpu(self.gpu_memory(names))
        able = {
            memory.token
            for memory in self.gpu_memory(names)
            if fits_gpu_memory(
                nbytes, min(memory.gpu_nbytes, opened.gpu_nbytes), engines=by_gpu[memory.memory.device_uuid]
            )
        } & set(opened.tokens)
        return [
            self.usable(name) | {_CUDA_IPC for memory in self.gpu_memory([name]) if memory.token in able}
            for name in names
        ]

    def reaches(self, engine_id: str, placement: Placement, handle: weightsync_pb2.TransportHandle) -> bool:
        """Whether an engine may get a version that was placed like this; it may turn out not to.

        Bytes that the service has reach every engine. Those in GPU memory were put there for the engines of that time,
        and others can only try on the same node.
        """
        if placement.fixed or handle.kind != _CUDA_IPC:
            return True
        memory = self._gpu_memory.get(engine_id)
        if memory is None or memory.boot_id != handle.cuda_ipc.boot_id:
            return False
        return {bucket.device_uuid for bucket in handle.cuda_ipc.buckets} <= set(memory.visible_gpus)
