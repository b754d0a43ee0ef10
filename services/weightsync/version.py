"""The versions of one stream: their states, and how to find one."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from miles.services.weightsync.timing import Now


class VersionState(enum.Enum):
    """Life of a version; the values are the names in weightsync.proto."""

    ALLOCATED = "ALLOCATED"
    PREPARED = "PREPARED"
    ACTIVATING = "ACTIVATING"
    ACTIVE = "ACTIVE"
    RETIRED = "RETIRED"
    FAILED = "FAILED"


class Refused(Exception):
    """The event is not possible in this state; nothing changed."""


class UnknownVersion(Refused):
    """No such version."""


@dataclasses.dataclass(slots=True)
class Version:
    """One publication. A number can be published again (after a resume from an older checkpoint); an id never is."""

    publication_id: int
    number: int
    nbytes: int
    state: VersionState = VersionState.ALLOCATED
    checksum: bytes = b""
    """Of its manifest; empty before PREPARED."""
    active_unix_ns: int = 0
    reusable: bool = True
    """Whether its memory may be rewritten once freed: false as soon as someone may map it without our knowing."""
    written_bytes: int = 0
    """What the trainer wrote for it, all transports together."""
    stage_s: dict[str, float] = dataclasses.field(default_factory=dict)
    """How long the trainer took over each stage."""


def find(versions: Mapping[int, Version], number: int) -> Version:
    """The newest complete publication of a version number; UnknownVersion or Refused when there is none."""
    found = [version for version in versions.values() if version.number == number]
    complete = [version for version in found if version.checksum]
    if complete:
        return complete[-1]
    if found:
        raise Refused("its bytes are not complete: the trainer has allocated but not prepared it")
    raise UnknownVersion("it was never published, or has been freed")


def identify(versions: Mapping[int, Version], number: int | None, checksum: bytes) -> Version | None:
    """The newest publication with that number and manifest checksum; None when there is none."""
    if number is None or not checksum:
        return None
    found = [version for version in versions.values() if version.number == number and version.checksum == checksum]
    return found[-1] if found else None


def fail_unprepared(versions: Mapping[int, Version]) -> None:
    """Fail what the trainer allocated and never prepared."""
    for version in versions.values():
        if version.state is VersionState.ALLOCATED:
            version.state, version.reusable = VersionState.FAILED, False


def prepare(versions: Mapping[int, Version], publication_id: int, checksum: bytes) -> bool:
    """Mark a version PREPARED; return False when it was already. Refused for another manifest."""
    version = versions.get(publication_id)
    if version is None or (version.state is VersionState.FAILED and not version.checksum):
        raise UnknownVersion("its allocation was replaced by a later one or freed; allocate again")
    if version.state is VersionState.ALLOCATED:
        version.state, version.checksum = VersionState.PREPARED, checksum
        return True
    if version.checksum != checksum:
        raise Refused("it was prepared with another manifest; allocate again to publish other bytes")
    return False


def make_active(versions: Mapping[int, Version], version: Version, active: int | None, now: Now) -> None:
    """Mark a version ACTIVE; retire the one that was, and those prepared before it and skipped."""
    if active != version.publication_id:
        version.active_unix_ns = now.unix_ns
    for other in versions.values():
        skipped = other.state is VersionState.PREPARED and other.publication_id < version.publication_id
        if skipped or other.state is VersionState.ACTIVE:
            other.state = VersionState.RETIRED
    version.state = VersionState.ACTIVE
