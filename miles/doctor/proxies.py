"""Proxies in the environment: which of the run's connections would go through one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import urllib.parse
from collections.abc import Mapping, Sequence

from miles.addresses import is_loopback
from miles.config.sections.reward import parse_reward_service
from miles.doctor.finding import Finding, fail, ok, warn
from miles.doctor.subject import Subject
from miles.telemetry.redaction import redact

_NAMES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")


@dataclasses.dataclass(frozen=True, slots=True)
class Proxies:
    """Facts about proxies."""

    set: Mapping[str, str]
    """By variable, in lower case."""
    exempt: str
    """Value of no_proxy."""
    peers: Sequence[tuple[str, str]]
    """What the run connects to, and its host."""
    has_socks: bool
    """Whether HTTP clients here can use a SOCKS proxy."""


def look(subject: Subject) -> Proxies:
    """Read the environment, and the addresses that the configuration names."""
    lower = {name.lower(): value for name, value in os.environ.items() if value}
    peers = []
    if subject.settings is not None:
        s = subject.settings
        peers = [("services", s.host)]
        for spec in s.reward_service:
            name, address = parse_reward_service(spec)
            peers.append((f"reward service {name}", address.rpartition(":")[0]))
        peers += [("SGLang server", each.rpartition(":")[0]) for each in s.rollout_external_engine_addrs or ()]
    if url := lower.get("miles_url"):
        peers.append(("gateway ($MILES_URL)", urllib.parse.urlsplit(url).hostname or ""))
    proxies = {name: lower[name] for name in _NAMES if name in lower}
    return Proxies(proxies, lower.get("no_proxy", ""), peers, importlib.util.find_spec("socksio") is not None)


def judge(facts: Proxies) -> list[Finding]:
    """Judge which connections leave through a proxy."""
    if not facts.set:
        return [ok("none in the environment")]
    shown = redact(", ".join(f"{name}={value}" for name, value in facts.set.items()))
    found = []
    for what, host in facts.peers:
        if not is_loopback(host) and not _is_exempt(host, facts.exempt):
            exempt = ",".join(filter(None, (facts.exempt, host)))
            found.append(warn(f"{what} at {host} would be reached through {shown}", f"export no_proxy={exempt}"))
    for name, value in facts.set.items():
        if value.startswith("socks") and not facts.has_socks:
            found.append(fail(f"{name} is a SOCKS proxy, which HTTP clients here cannot use", f"unset {name}"))
    return found or [ok(f"{shown}; nothing of the run goes through it, as loopback addresses never do")]


def _is_exempt(host: str, exempt: str) -> bool:
    """Return whether no_proxy names the host, a domain that it is in, or everything."""
    names = [name.strip().lstrip(".") for name in exempt.split(",") if name.strip()]
    return any(name in ("*", host) or host.endswith(f".{name}") for name in names)
