"""Turns an engine's counters into what came since its last report."""

from __future__ import annotations

from collections.abc import Mapping

from miles.rpc.gen import rollout_pb2
from miles.services.controller.speculation.draft_counts import DraftCounts, Versions


class EngineCounters:
    """The last report of one engine.

    Its counters begin at zero when the engine starts, and the pairs of versions that it counted longest ago leave its
    reports.
    """

    def __init__(self) -> None:
        self._incarnation = ""
        self._is_first = True
        self._prompts = (0, 0)
        self._seen: dict[Versions, DraftCounts] = {}
        """In the order of the report, newest last."""

    def note(self, incarnation: str, counts: Mapping[Versions, DraftCounts]) -> dict[Versions, DraftCounts]:
        """Take in a report of the process `incarnation`; return what it counted since the last, by versions.

        The first report of a process is what later ones are compared with: it comes before the run's first lease, and
        counts what an earlier controller has seen already.
        """
        known, self._seen = self._seen, dict(counts)
        self._is_first = incarnation != self._incarnation
        if self._is_first:
            self._incarnation = incarnation
            return {}
        if known and self._has_restarted(known):
            known = {}
        new = {versions: count - known.get(versions, DraftCounts()) for versions, count in counts.items()}
        return {versions: count for versions, count in new.items() if count != DraftCounts()}

    def note_prompts(self, found: int, missed: int) -> tuple[int, int]:
        """Take in how many prompts had earlier responses and had none; return how many since the last report.

        They are counted by the job on the worker; call `note` with the same report first.
        """
        known, self._prompts = self._prompts, (found, missed)
        if self._is_first:
            return (0, 0)
        if found < known[0] or missed < known[1]:
            known = (0, 0)
        return found - known[0], missed - known[1]

    def _has_restarted(self, known: Mapping[Versions, DraftCounts]) -> bool:
        newest = next(reversed(list(known)))
        return newest not in self._seen or any(
            versions in self._seen and self._seen[versions].any_below(count) for versions, count in known.items()
        )


def counts_of(progress: rollout_pb2.SpeculationProgress) -> dict[Versions, DraftCounts]:
    """Return what an engine reports, by versions, newest last."""
    found: dict[Versions, DraftCounts] = {}
    for message in progress.counts:
        draft = message.draft_version if message.HasField("draft_version") else None
        found[Versions(message.policy_version, draft)] = DraftCounts.of(message)
    return found
