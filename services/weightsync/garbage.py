"""Which versions' bytes can be freed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from miles.services.weightsync.engine import Engine
from miles.services.weightsync.version import Version, VersionState


def needed(engines: Iterable[Engine], roots: Iterable[int | None]) -> set[int]:
    """Publications that an engine serves, has prefetched or is about to load, and the roots (active, being activated).

    What a quarantined engine may still map is not needed: it must not be served, and removing a file leaves existing
    mappings intact. A disconnected engine needs nothing: it reports what it serves when it comes back.
    """
    found = {root for root in roots if root is not None}
    for engine in engines:
        if engine.session is None:
            continue
        found |= {held for held in (engine.held, engine.verified) if held is not None}
        if not engine.quarantined:
            found |= set(engine.maps)
        if engine.in_flight is not None and not engine.in_flight.expired:
            found.add(engine.in_flight.order.publication_id)
    return found


def unneeded(versions: Mapping[int, Version], keep: set[int]) -> list[Version]:
    """Versions to free, given those that are needed.

    A retired version is freed once it is below the lowest one needed. A failed version was never active, so no engine
    will ever need it: it is freed as soon as a newer one exists and no engine has it.
    """
    lowest, newest = min(keep, default=None), max(versions, default=0)
    gone: list[Version] = []
    for publication_id, version in versions.items():
        retired = version.state is VersionState.RETIRED and (lowest is None or publication_id < lowest)
        failed = version.state is VersionState.FAILED and publication_id < newest
        if publication_id not in keep and (retired or failed):
            gone.append(version)
    return gone
