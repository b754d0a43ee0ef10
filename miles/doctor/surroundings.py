"""Clock, letters and Python: what everything else takes for granted."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import sys
import time

import miles
from miles.doctor.finding import Finding, fail, ok, warn
from miles.doctor.subject import Subject

_OLDEST_PYTHON = (3, 11)
_DAY_S = 86_400
_TEN_YEARS_S = 10 * 365 * _DAY_S


@dataclasses.dataclass(frozen=True, slots=True)
class Surroundings:
    """Facts about this process's surroundings."""

    now: float
    """Seconds since 1970."""
    installed_at: float
    """When this package was written to the disk, in seconds since 1970: it cannot be later than now."""
    encoding: str
    """Of standard output."""
    file_names: str
    """Encoding of file names."""
    python: tuple[int, int]


def look(subject: Subject) -> Surroundings:
    """Read clock and locale."""
    written = pathlib.Path(miles.__file__).stat().st_mtime
    encoding = sys.stdout.encoding or "ascii"
    return Surroundings(time.time(), written, encoding, sys.getfilesystemencoding(), sys.version_info[:2])


def judge(facts: Surroundings) -> list[Finding]:
    """Judge the clock, the locale and the version of Python."""
    found = []
    day = datetime.datetime.fromtimestamp(facts.now, datetime.UTC).date().isoformat()
    if facts.now < facts.installed_at - _DAY_S or facts.now > facts.installed_at + _TEN_YEARS_S:
        found.append(fail(f"the clock says {day}: certificates and leases would not hold", "set it (chronyd, ntpd)"))
    for what, encoding in (("standard output", facts.encoding), ("file names", facts.file_names)):
        if not encoding.lower().replace("-", "").startswith("utf8"):
            found.append(warn(f"letters of {what} are {encoding}: others print as ?", "export LC_ALL=C.UTF-8"))
    if facts.python < _OLDEST_PYTHON:
        found.append(fail(f"Python {facts.python[0]}.{facts.python[1]}", "use Python 3.11 or later"))
    return found or [ok(f"{day}, {facts.encoding}, Python {facts.python[0]}.{facts.python[1]}")]
