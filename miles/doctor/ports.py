"""Ports that the run is to listen on: whether they are free, and who has those that are not."""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import socket
from collections.abc import Sequence

from miles.config.checks.environment import SERVICE_PORTS
from miles.doctor.finding import Finding, fail, ok
from miles.doctor.subject import Subject

_LISTENING = "0A"


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    """Facts about one port."""

    flag: str
    host: str
    number: int
    problem: str = ""
    """Why it cannot be listened on; empty when it can."""
    denied: bool = False
    taken: bool = False
    holder: str = ""
    """The process that has it, as far as this user may see."""


def look(subject: Subject) -> Sequence[Port]:
    """Try to bind every port that the configuration names, and release it at once."""
    if subject.settings is None:
        return []
    s = subject.settings
    wanted = [(key, s.host, getattr(s, key)) for key in SERVICE_PORTS]
    if s.rollout_port:
        beyond = min(s.rollout_port + s.rollout_num_workers - s.rollout_workers_elsewhere, 65536)
        wanted += [("rollout_port", s.host, number) for number in range(s.rollout_port, beyond)]
    if s.gateway:
        wanted.append(("gateway_port", s.gateway_host, s.gateway_port))
    return [try_port(f"--{key.replace('_', '-')}", host, number) for key, host, number in wanted if number]


def judge(ports: Sequence[Port]) -> list[Finding]:
    """Judge each port that was named."""
    return [_judge(port) for port in ports] or [ok("none is named; free ones are taken")]


def _judge(port: Port) -> Finding:
    what = f"{port.flag} {port.number}"
    if not port.problem:
        return ok(f"{what} is free on {port.host}")
    if port.denied:
        return fail(f"{what}: this user may not listen on it ({port.problem})", f"{port.flag} 0, or one from 1024 on")
    if port.taken:
        return fail(f"{what} is taken by {port.holder or 'another process'}", f"{port.flag} 0, or end that process")
    return fail(f"{what} on {port.host}: {port.problem}", "give an address of this machine as --host")


def try_port(flag: str, host: str, number: int) -> Port:
    """Bind a port for a moment, and find out who has it when that fails."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free to a server
            probe.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        return Port(
            flag,
            host,
            number,
            error.strerror or str(error),
            denied=error.errno in (errno.EACCES, errno.EPERM),
            taken=taken,
            holder=_holder_of(number) if taken else "",
        )
    return Port(flag, host, number)


def _holder_of(port: int) -> str:
    """Return the command and process that listens on a port; empty when this user cannot see it."""
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening(pathlib.Path("/proc/net") / table, port)}
    for process in pathlib.Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:  # another user's, or it has just ended
            continue
    return ""


def _listening(table: pathlib.Path, port: int) -> list[str]:
    if not table.is_file():
        return []
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return [f"socket:[{row[9]}]" for row in rows if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port]
