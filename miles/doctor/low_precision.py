"""Formats of few bits: whether GPUs and packages have the kernels that trainer and engines need."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from miles.config.backends import is_installed
from miles.config.checks.json_file import read_json_object
from miles.config.rules.precision import why_emulated
from miles.config.schema.flat_settings import InvalidSetting
from miles.doctor.finding import Finding, fail, ok, warn
from miles.doctor.probe import torch_facts
from miles.doctor.subject import Subject
from miles.precision.of_run import recipes_of

Capability = tuple[int, int]
_TRAINING: Mapping[str, Capability] = {"fp8_block": (9, 0), "mxfp8": (10, 0)}
"""From which compute capability on TransformerEngine has kernels."""
_SERVING: Mapping[str, Capability] = {"fp8_block": (8, 9), "int4": (8, 0)}
"""The same of SGLang."""
_ENGINE, _KERNELS = "transformer_engine", "sgl_kernel"


@dataclasses.dataclass(frozen=True, slots=True)
class LowPrecision:
    """Facts about formats and kernels for them."""

    trained: str | None = None
    """The trainer's format, where TransformerEngine may compute it; None also where it is emulated anyway."""
    insists: bool = False
    """Whether the configuration names TransformerEngine."""
    served: str | None = None
    """The format of SGLang's servers."""
    capability: Capability | None = None
    """Of the weakest GPU; None where there is none that PyTorch can use."""
    installed: frozenset[str] = frozenset()
    """Packages with kernels in this environment."""
    own_interpreter: bool = True
    """Whether SGLang is in this environment too."""


def look(subject: Subject) -> LowPrecision:
    """Read the recipes of the configuration, and ask PyTorch for the GPUs where they matter. Raises InvalidSetting."""
    s = subject.settings
    if s is None or s.device == "cpu":
        return LowPrecision()
    model = read_json_object(pathlib.Path(s.hf_checkpoint or "") / "config.json")
    if (recipes := recipes_of(s, model)) is None:
        raise InvalidSetting("te_precision_config_file")
    trained, served = recipes
    by_engine = trained is not None and s.low_precision_impl != "emulated" and why_emulated(s) is None
    by_servers = served is not None and s.rollout_backend == "sglang" and s.rollout_external_engine_addrs is None
    if not by_engine and not by_servers:
        return LowPrecision()
    return LowPrecision(
        trained=trained.format if by_engine and trained is not None else None,
        insists=s.low_precision_impl == "transformer_engine",
        served=served.format if by_servers and served is not None else None,
        capability=_weakest(torch_facts()),
        installed=frozenset(name for name in (_ENGINE, _KERNELS) if is_installed(name)),
        own_interpreter=s.rollout_engine_python is None,
    )


def judge(facts: LowPrecision) -> list[Finding]:
    """Compare what formats need with what is there."""
    if facts.trained is None and facts.served is None:
        return [ok("no kernels for formats of few bits are needed")]
    return [*_trainer(facts), *_servers(facts)] or [ok(_fits(facts))]


def _trainer(facts: LowPrecision) -> list[Finding]:
    if facts.trained is None:
        return []
    needed = _TRAINING[facts.trained]
    if _ENGINE not in facts.installed:
        problem, change = "TransformerEngine is not installed", "install it (docs/megatron.md)"
    elif facts.capability is not None and facts.capability < needed:
        problem = f"TransformerEngine has kernels for {facts.trained} from compute capability {_shown(needed)} on"
        problem, change = f"{problem}, and a GPU has {_shown(facts.capability)}", "use other GPUs"
    else:
        return []
    if facts.insists:
        return [fail(f"{problem}, as low_precision_impl asks for", f"{change}, or --low-precision-impl emulated")]
    slow = f"{problem}: {facts.trained} is emulated, which is no faster than without it"
    return [warn(slow, f"{change}, or --low-precision-impl emulated to say so")]


def _servers(facts: LowPrecision) -> list[Finding]:
    if facts.served is None or facts.served not in _SERVING:
        return []  # the configuration's own check refuses formats that SGLang does not take
    needed, found = _SERVING[facts.served], []
    if facts.capability is not None and facts.capability < needed:
        problem = f"SGLang computes in {facts.served} from compute capability {_shown(needed)} on, and a GPU has"
        change = "use other GPUs, or --rollout-weight-format as_trained"
        found.append(fail(f"{problem} {_shown(facts.capability)}", change))
    if facts.own_interpreter and _KERNELS not in facts.installed:
        found.append(fail(f"SGLang's kernels ({_KERNELS}) are not installed", "pip install 'miles[rollout-sglang]'"))
    return found


def _fits(facts: LowPrecision) -> str:
    parts = [f"trainer in {facts.trained}"] if facts.trained is not None else []
    parts += [f"engines in {facts.served}"] if facts.served is not None else []
    gpu = "" if facts.capability is None else f"; GPUs of compute capability {_shown(facts.capability)} have kernels"
    return " and ".join(parts) + gpu


def _weakest(torch: Mapping[str, Any] | None) -> Capability | None:
    found = [(int(gpu["capability"][0]), int(gpu["capability"][1])) for gpu in (torch or {}).get("gpus", [])]
    return min(found, default=None)


def _shown(capability: Capability) -> str:
    return ".".join(map(str, capability))
