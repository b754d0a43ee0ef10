"""Hosts of their own addresses on this machine: network namespaces on one bridge, with no route to anywhere else."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence

import pytest

_NETWORK = "10.203.77"
_BECOME = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'


class Hosts:
    """Some hosts, numbered from 0: the address of each, commands that run on it, and its link to cut."""

    def __init__(self, count: int) -> None:
        self._bridge = f"m{uuid.uuid4().hex[:8]}"
        self._names = [f"{self._bridge}-{host}" for host in range(count)]

    def address(self, host: int) -> str:
        """The host's address in the network that all share."""
        return f"{_NETWORK}.{host + 1}"

    def on(self, host: int, command: Sequence[str]) -> list[str]:
        """A command as it is run on a host, with shared memory of its own.

        The host has a name, host-0 and so on, that cannot be resolved.
        """
        enter = ["ip", "netns", "exec", self._names[host], "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-c", _BECOME, f"host-{host}", *command]

    def cut(self, host: int) -> None:
        """Cut a host's link: what is sent is lost, and nobody is told."""
        _ip("-n", self._bridge, "link", "set", f"port{host}", "down")

    def heal(self, host: int) -> None:
        """Mend a link that was cut."""
        _ip("-n", self._bridge, "link", "set", f"port{host}", "up")

    def kill(self, host: int) -> int:
        """Kill every process of a host at once, as a crash of the machine would; return how many there were."""
        pids = [int(pid) for pid in _ip("netns", "pids", self._names[host]).split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def make(self) -> None:
        """Make the hosts. The bridge is in a namespace too: nothing that this machine reaches can be reached."""
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        for host, name in enumerate(self._names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            port = ("name", f"port{host}", "netns", self._bridge)
            _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", *port)
            _ip("-n", self._bridge, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        """Kill what is left on the hosts, and remove them."""
        known = _ip("netns", "list")
        for host, name in enumerate(self._names):
            if name in known:
                self.kill(host)
                _ip("netns", "delete", name)
        if self._bridge in known:
            _ip("netns", "delete", self._bridge)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """So many hosts for a test; skips it where this user may make no network namespaces."""
    made = Hosts(count)
    try:
        try:
            made.make()
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", "") or error
            pytest.skip(f"no network namespaces can be made here: {str(why).strip()}")
        yield made
    finally:
        made.remove()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
