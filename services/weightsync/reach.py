"""Whether engines can get a version's bytes, which lie where the engines of the time of its allocation could."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from miles.services.weightsync.engine import Engine


def reached_by_none(publication_id: int, engines: Iterable[Engine], failed: Callable[[str], bool]) -> bool:
    """Whether engines are attached, none of them serves a publication, and none of them can get it.

    `failed`: whether an engine, by name, seemed able to and was not. The publication then helps nobody, and engines get
    no order before there is another one.
    """
    attached = [engine for engine in engines if engine.session is not None]
    return bool(attached) and not any(
        engine.has(publication_id) or not (publication_id in engine.out_of_reach or failed(engine.engine_id))
        for engine in attached
    )
