"""The part of a stream's state that survives a restart of the service, as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from miles.services.weightsync.actions import Outcome
from miles.services.weightsync.engine import Engine
from miles.services.weightsync.publication import Publication
from miles.services.weightsync.timing import Now, PublicationLimits
from miles.services.weightsync.version import Version, VersionState


def save(machine: Publication) -> dict[str, Any]:
    """Everything but the activation under way, which its caller repeats, and subscriptions, which engines renew."""
    return {
        "next_publication_id": machine.next_publication_id,
        "active": machine.active,
        "versions": [_version(version) for version in machine.versions.values()],
        "quarantined": {e.engine_id: e.last_error for e in machine.engines.values() if e.quarantined},
        "outcomes": {name: dataclasses.asdict(outcome) for name, outcome in machine.outcomes.items()},
    }


def load(saved: dict[str, Any], now: Now, limits: PublicationLimits) -> Publication:
    """Restore a saved state machine. Which engine maps which bytes is unknown now, so none may be rewritten."""
    machine = Publication(limits)
    machine.next_publication_id, machine.active = saved["next_publication_id"], saved["active"]
    for kept in saved["versions"]:
        state, checksum = VersionState(kept["state"]), bytes.fromhex(kept["checksum"])
        version = Version(**{**kept, "state": state, "checksum": checksum}, reusable=False)
        machine.versions[version.publication_id] = version
    for engine_id, error in saved["quarantined"].items():
        engine = Engine(engine_id, quarantined=True, last_error=error, since_unix_ns=now.unix_ns)
        machine.engines[engine_id] = engine
    machine.outcomes = {name: Outcome(**outcome) for name, outcome in saved["outcomes"].items()}
    return machine


def _version(version: Version) -> dict[str, Any]:
    state = VersionState.PREPARED if version.state is VersionState.ACTIVATING else version.state
    return {
        "publication_id": version.publication_id,
        "number": version.number,
        "nbytes": version.nbytes,
        "state": state.value,
        "checksum": version.checksum.hex(),
        "active_unix_ns": version.active_unix_ns,
        "written_bytes": version.written_bytes,
        "stage_s": version.stage_s,
    }
