"""Which versions' bytes nobody needs any more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from miles.services.weightsync.state import Engine, Version, VersionState


def needed(engines: Iterable[Engine], roots: Iterable[int | None]) -> set[int]:
    """Publications that an engine holds, has at hand or is about to load, and the roots (active, being activated).

    What a quarantined engine may still map is not needed: it must not be served, and removing a file leaves existing
    mappings whole. An engine that is gone needs nothing: it will say what it holds when it comes back.
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

    A retired version goes once it is below the lowest that is needed. One that failed or was given up was never active,
    so no engine can come to need it: it goes as soon as a newer one exists and no engine has it.
    """
    lowest, newest = min(keep, default=None), max(versions, default=0)
    gone: list[Version] = []
    for publication_id, version in versions.items():
        retired = version.state is VersionState.RETIRED and (lowest is None or publication_id < lowest)
        failed = version.state is VersionState.FAILED and publication_id < newest
        if publication_id not in keep and (retired or failed):
            gone.append(version)
    return gone
