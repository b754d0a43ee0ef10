"""CPU time of the processes that serve watchers, and of the clients."""

from __future__ import annotations

import subprocess

import psutil

SERVING = {"gateway": "miles.gateway", "controller": "miles.services.controller", "redis": "redis-server"}
"""Processes that watchers are served by, and a word of their command lines."""


class Usage:
    """CPU seconds of the processes that serve watchers, and of the clients."""

    def __init__(self, services: psutil.Process, watchers: subprocess.Popen[str]) -> None:
        children = services.children(recursive=True)
        self._serving = {
            name: [child for child in children if any(word in part for part in child.cmdline())]
            for name, word in SERVING.items()
        }
        self._clients = [psutil.Process(watchers.pid)]
        self._ended_s = 0.0

    def add(self, client: subprocess.Popen[str]) -> None:
        """Count another client too."""
        self._clients.append(psutil.Process(client.pid))

    def remove_last(self) -> None:
        """The client added last is about to end."""
        self._ended_s += _cpu_s(self._clients.pop())

    def seconds(self) -> dict[str, float]:
        """CPU seconds so far by name."""
        used = {name: sum(map(_cpu_s, processes)) for name, processes in self._serving.items()}
        return used | {"load generator": self._ended_s + sum(map(_cpu_s, self._clients))}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
