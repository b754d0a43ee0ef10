"""All checks, and how they are run: at once, each within a bound, none able to end the others."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from miles.config.schema.flat_settings import InvalidSetting
from miles.doctor import (
    configuration,
    folders,
    gpus,
    limits,
    low_precision,
    memory,
    packages,
    ports,
    processor,
    proxies,
    redis_server,
    surroundings,
)
from miles.doctor.finding import Finding, fail, warn
from miles.doctor.probe import PROBE_S
from miles.doctor.subject import Subject

_LIMIT_S = 10.0
"""How long a check may take: a folder of a lost server, or a name that nobody resolves, keeps it for minutes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One check."""

    name: str
    look: Callable[[Subject], Any]
    """Gathers facts."""
    judge: Callable[[Any], list[Finding]]
    """Turns these facts into findings."""
    limit_s: float = _LIMIT_S


CHECKS: Sequence[Check] = (
    Check("configuration", configuration.look, configuration.judge),
    Check("processor", processor.look, processor.judge, PROBE_S + _LIMIT_S),
    Check("GPUs", gpus.look, gpus.judge, PROBE_S + _LIMIT_S),
    Check("low precision", low_precision.look, low_precision.judge, PROBE_S + _LIMIT_S),
    Check("memory", memory.look, memory.judge),
    Check("shared memory", memory.look_at_shared, memory.judge_shared),
    Check("folders", folders.look, folders.judge),
    Check("ports", ports.look, ports.judge),
    Check("limits", limits.look, limits.judge),
    Check("proxies", proxies.look, proxies.judge),
    Check("Redis", redis_server.look, redis_server.judge),
    Check("packages", packages.look, packages.judge, 30.0),
    Check("surroundings", surroundings.look, surroundings.judge),
)


def run_checks(subject: Subject, checks: Sequence[Check] = CHECKS) -> list[tuple[str, Finding]]:
    """Run all checks at once; return each finding with its check's name, in the order of the checks."""
    begun = time.monotonic()
    running = [_Running(check, subject) for check in checks]
    return [(each.check.name, finding) for each in running for finding in each.findings(begun)]


class _Running:
    """A check in a thread of its own, which is left behind when it does not end in time."""

    def __init__(self, check: Check, subject: Subject) -> None:
        self.check = check
        self._subject = subject
        self._findings: list[Finding] = []
        self._thread = threading.Thread(target=self._run, name=f"doctor-{check.name}", daemon=True)
        self._thread.start()

    def findings(self, begun: float) -> list[Finding]:
        """Return what was found, or that the check did not end in time. `begun` is a time of `time.monotonic`."""
        self._thread.join(max(0.0, begun + self.check.limit_s - time.monotonic()))
        if self._thread.is_alive():
            late = f"no answer within {self.check.limit_s:.0f} s, as from a file server or name server that is away"
            return [fail(late, "check mounts (findmnt) and names (/etc/resolv.conf), then again")]
        return self._findings

    def _run(self) -> None:
        try:
            self._findings = self.check.judge(self.check.look(self._subject))
        except InvalidSetting as setting:
            self._findings = [warn(f"not checked, because {setting} is at fault", "correct the configuration first")]
        except Exception as error:  # whatever is broken on a machine must not hide the other checks
            self._findings = [fail(f"not checked: {type(error).__name__}: {error}", "mend that first")]
