"""Which services the soak has struck, until all are back."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterable

from soak.invariants.progress import pace_of
from soak.records import Records
from soak.schedule import Action, Freeze, Kill, Restart
from soak.stack import SERVED_REWARD, SERVICES, SoakStack

BACK_S = 300.0
"""How long services may take to come back."""
GRACE_S = 15.0
"""For so long after it is back, a service counts as struck: answers that were begun before are on their way."""


class Troubles:
    """Strikes services, continues those that were frozen, and follows their return."""

    def __init__(self, stack: SoakStack, records: Records) -> None:
        self.kills: Counter[str] = Counter()
        self.strikes: Counter[str] = Counter()
        self.pace = 1.0
        """How many times longer things take on this machine than on an idle one: the slowest start so far."""
        self._stack = stack
        self._records = records
        self._struck: set[str] = set()
        self._since_s = 0.0
        self._over_s = float("-inf")
        self._before: frozenset[str] = frozenset()
        """What was struck last, and is back."""
        self._frozen: set[str] = set()

    @property
    def calm(self) -> bool:
        """Whether every service is there and answers."""
        return not self._struck

    def touched(self, name: str) -> bool:
        """Whether a service is, or was until some seconds ago, struck; all of them are when the launcher is."""
        struck = self._struck or (self._before if self._records.now_s < self._over_s + GRACE_S else frozenset())
        return name in struck or "launcher" in struck

    def strike(self, action: Action) -> None:
        """Carry out a strike."""
        match action:
            case Kill(services):
                hit = [name for name in services if self._stack.signal(name, signal.SIGKILL)]
                self.kills.update(hit)
                self._note("kill", hit)
            case Freeze(name, seconds):
                if self._stack.signal(name, signal.SIGSTOP):
                    self._frozen.add(name)
                    self._note("freeze", [name])
                    # A thread of its own: this one may wait for an answer of the frozen service meanwhile.
                    threading.Timer(seconds, self._thaw, [name]).start()
            case Restart(kill):
                self._note("restart by SIGKILL" if kill else "restart", ["launcher"])
                code = self._stack.stop(kill=kill)
                if not kill and code != 0:
                    self._records.violation("services", f"miles serve ended with {code} after SIGTERM")
                self._stack.start()
            case _:
                raise AssertionError(f"{action} is no strike")

    def tick(self) -> bool:
        """Look who is back; return whether a strike is over just now."""
        if self._stack.launcher_ended is not None:
            end = self._stack.serve_log.read_text(errors="replace")[-3000:]
            self._records.violation("services", f"miles serve ended by itself ({self._stack.launcher_ended}): {end}")
            self._note("end by itself", ["launcher"])
        self._stack.start()
        if self.calm or self._frozen:
            return False
        if not self._stack.ready():
            if self._records.now_s > self._since_s + BACK_S * self.pace:
                after_s = self._records.now_s - self._since_s
                what = f"{sorted(self._struck)} were struck, and not all services were back {after_s:.0f} s later"
                self._records.violation("services", what)
                self._since_s = self._records.now_s
            return False
        after_s = self._records.now_s - self._since_s
        self.measured(after_s)
        self._records.note("back", services=sorted(self._struck), after_s=round(after_s, 1), pace=round(self.pace, 1))
        self._before, self._over_s = frozenset(self._struck), self._records.now_s
        self._struck.clear()
        return True

    def _thaw(self, name: str) -> None:
        self._stack.signal(name, signal.SIGCONT)
        self._since_s = self._records.now_s
        self._frozen.discard(name)

    def measured(self, start_s: float) -> None:
        """Note how long services took to start."""
        self.pace = max(self.pace, pace_of(start_s))

    def _note(self, how: str, names: Iterable[str]) -> None:
        hit = list(names)
        self._struck.update(hit)
        self._since_s = self._records.now_s
        self.strikes.update([how] * bool(hit))


def strikeable() -> tuple[str, ...]:
    """Services that may be killed and frozen."""
    return (*SERVICES, SERVED_REWARD)
