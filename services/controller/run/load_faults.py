"""What engines say while they fail to load a version and try again: nobody waits without knowing for what."""

from __future__ import annotations

import dataclasses

from miles.rpc.gen import weightsync_pb2


@dataclasses.dataclass(slots=True)
class _Fault:
    words: str = ""
    since_unix_ns: int = 0
    """Of the last failure; one is reported to everybody who watches, and again to who comes later."""
    tries: int = 0


class LoadFaults:
    """Counts each engine's failures to load the newest version."""

    def __init__(self) -> None:
        self._faults: dict[str, _Fault] = {}

    def note(self, version: int, engine: weightsync_pb2.EngineStatus) -> str:
        """Note an engine's stage; return what people should be told, if it is news: new words, or twice as many tries.

        Engines that refuse are left to those who count what is left (`RolloutWorkers`): they are not tried again.
        """
        if engine.state == weightsync_pb2.ENGINE_STATE_SERVING:
            self._faults.pop(engine.engine_id, None)
        if engine.state != weightsync_pb2.ENGINE_STATE_QUARANTINED or engine.refused or not engine.last_error:
            return ""
        fault = self._faults.setdefault(engine.engine_id, _Fault())
        if engine.since_unix_ns == fault.since_unix_ns:
            return ""
        news = fault.words != engine.last_error
        fault.words, fault.since_unix_ns, fault.tries = engine.last_error, engine.since_unix_ns, fault.tries + 1
        if not news and fault.tries & (fault.tries - 1):
            return ""
        return f"{engine.engine_id} could not load version {version} (try {fault.tries}) and tries again: {fault.words}"

    def clear(self) -> None:
        """The version is active. What was reported of it stays known, so that it is not counted for the next one."""
        for fault in self._faults.values():
            fault.words, fault.tries = "", 0

    def __str__(self) -> str:
        return "; ".join(
            f"{name} has failed {fault.tries} time{'s' * (fault.tries > 1)}, at last with: {fault.words}"
            for name, fault in sorted(self._faults.items())
            if fault.tries
        )
