"""What the distribution promises about its parts."""

from __future__ import annotations

import ast
import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from setuptools import Distribution

ROOT = pathlib.Path(__file__).resolve().parents[2]


def closure(requirement: str) -> set[str]:
    """Names of every installed distribution that a requirement brings along, by the installed packages' metadata."""
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name.lower(), extra) in found:
                continue
            found.add((wanted.name.lower(), extra))
            try:
                needs = importlib.metadata.requires(wanted.name) or []
            except importlib.metadata.PackageNotFoundError:
                continue  # only needed on other platforms
            for text in needs:
                need = Requirement(text)
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    waiting.append(need)
    return {name for name, _ in found}


@pytest.mark.parametrize("extra", ["gateway", "controller", "reward"])
def test_services_without_tensors_bring_no_torch(extra: str) -> None:
    names = closure(f"miles[{extra}]")
    assert len(names) > 10
    assert "torch" not in names


def test_the_trainer_does_bring_torch() -> None:
    assert "torch" in closure("miles[trainer]")


def test_megatron_on_a_gpu_brings_its_layers_and_attention() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needs = [Requirement(text) for text in extras["trainer-megatron-gpu"]]
    linux = {need.name for need in needs if need.marker is None or need.marker.evaluate({"sys_platform": "linux"})}
    assert linux == {"miles", "flash-attn-4", "transformer-engine"}
    [engine] = [need for need in needs if need.name == "transformer-engine"]
    assert engine.extras == {"core-cu13", "pytorch"}
    assert {extra for need in needs if need.name == "miles" for extra in need.extras} == {"trainer-megatron"}


@pytest.mark.parametrize("package", ["miles.gateway", "miles.services.controller", "miles.services.reward"])
def test_importing_a_service_without_tensors_imports_no_torch(package: str) -> None:
    program = (
        f"import importlib, pkgutil, sys; package = importlib.import_module({package!r})\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def imported(path: pathlib.Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def sources(folder: str) -> list[pathlib.Path]:
    """Python files below a folder of the repository, not following the links to services and gateway."""
    files = [path for path in (ROOT / folder).rglob("*.py") if not any(parent.is_symlink() for parent in path.parents)]
    assert files
    return files


def test_the_library_imports_no_service() -> None:
    offenders = {
        str(path)
        for path in sources("miles")
        for name in imported(path)
        if name.startswith(("miles.services", "miles.gateway"))
    }
    assert offenders == set()


@pytest.mark.parametrize("folder", ["miles", "services", "gateway"])
def test_nothing_imports_pickle(folder: str) -> None:
    pickles = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert [path for path in sources(folder) if imported(path) & pickles] == []


def test_the_web_page_is_part_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    command: Any = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    command.manifest_files = {}  # what git knows is not asked
    packed = {
        path for path in command.find_data_files("miles.gateway", "miles/gateway") if pathlib.Path(path).is_file()
    }
    web = ROOT / "miles" / "gateway" / "web"
    assert packed == {str(path.relative_to(ROOT)) for path in web.rglob("*") if path.is_file()}
    assert len(packed) > 20
