"""HTTP proxies of the environment: they are for the way out of a machine, never for programs on it."""

from __future__ import annotations

from collections.abc import Mapping

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def without_proxy_for_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with this machine's own addresses in `no_proxy`, in both spellings."""
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    names = [name.strip() for name in given.split(",") if name.strip()]
    joined = ",".join([*names, *(name for name in _LOOPBACK if name not in names)])
    return {**environment, "no_proxy": joined, "NO_PROXY": joined}
