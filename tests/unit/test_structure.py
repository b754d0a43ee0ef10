"""The structure of the source: file sizes, docstrings, and who may import whom."""

from __future__ import annotations

import ast
import functools
import pathlib
import statistics
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES: Mapping[str, pathlib.Path] = {
    "miles": ROOT / "miles",
    "miles.services": ROOT / "services",
    "miles.gateway": ROOT / "gateway",
}
"""Folder of each package; miles/services and miles/gateway are links to the folders beside miles."""
GENERATED = "miles.rpc.gen"
MAX_LINES = 350
MAX_MEDIAN_LINES = 95


@functools.cache
def sources() -> Mapping[str, pathlib.Path]:
    """Every module of the source by name, without generated stubs."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "miles" and parts[0] in ("services", "gateway"):
                continue  # reached through the link; found in its own folder
            name = ".".join([package, *parts]).removesuffix(".__init__")
            if not name.startswith(GENERATED):
                found[name] = path
    return found


@functools.cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(sources()[module].read_bytes())


def shown(module: str) -> str:
    """A module's path, for messages."""
    return str(sources()[module].relative_to(ROOT))


@functools.cache
def imports(module: str) -> set[str]:
    """Our modules that a module imports anywhere in its file, except for type checking."""
    found: set[str] = set()
    for node in runtime_nodes(tree(module)):
        if isinstance(node, ast.Import):
            found.update(known for alias in node.names if (known := nearest_module(alias.name)))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(module)}:{node.lineno}: import by the full name"
            for alias in node.names:
                known = nearest_module(f"{node.module}.{alias.name}")
                found.update([known] if known else [])
    return found - {module}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and those below it, without the bodies of `if TYPE_CHECKING`."""
    yield node
    for field, value in ast.iter_fields(node):
        if isinstance(node, ast.If) and field == "body" and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from runtime_nodes(child)


def nearest_module(name: str) -> str | None:
    """The module that a dotted name is, or is in; None when it is generated or not ours."""
    if name.startswith(GENERATED):
        return None
    while name and name not in sources():
        name = name.rpartition(".")[0]
    return name or None


def service_of(module: str) -> str | None:
    """The service that a module belongs to, if it belongs to one."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["miles", "services"] and len(parts) > 2 else None


def part_of(module: str) -> str:
    """gateway, the name of a service, or miles for the library."""
    return "gateway" if module.startswith("miles.gateway") else service_of(module) or "miles"


def lines(module: str) -> int:
    return len(sources()[module].read_text(encoding="utf-8").splitlines())


def test_no_file_is_too_long() -> None:
    counts = {shown(module): lines(module) for module in sources()}
    for folder in ("benchmarks", "examples", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            counts[str(path.relative_to(ROOT))] = len(path.read_text(encoding="utf-8").splitlines())
    long = {path: count for path, count in counts.items() if count > MAX_LINES}
    found = "".join(f"\n  {path}: {count} lines" for path, count in sorted(long.items()))
    assert not long, f"split these by idea, so that each file has at most {MAX_LINES} lines:{found}"


def test_the_median_file_is_short() -> None:
    median = statistics.median(lines(module) for module in sources())
    assert median <= MAX_MEDIAN_LINES, f"the median file has {median} lines; a file should hold one idea"


def test_every_module_has_a_docstring() -> None:
    bare = [shown(module) for module in sources() if not ast.get_docstring(tree(module))]
    assert not bare, f"say in one sentence what these modules are for: {', '.join(bare)}"


def test_there_is_no_import_circle() -> None:
    circle = import_circle()
    route = " -> ".join(map(shown, circle))
    assert not circle, f"import circle {route}: move what both ends need into a module of its own"


def import_circle() -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty when there is none.

    Importing a module does not count as importing the packages around it, whose `__init__` may gather its names.
    """
    finished: set[str] = set()

    def visit(module: str, route: list[str]) -> list[str]:
        if module in route:
            return [*route[route.index(module) :], module]
        if module in finished:
            return []
        for imported in sorted(imports(module)):
            if circle := visit(imported, [*route, module]):
                return circle
        finished.add(module)
        return []

    return next((circle for module in sources() if (circle := visit(module, []))), [])


def test_services_are_reached_over_the_wire_only() -> None:
    wrong = [
        f"{shown(module)} imports {imported}"
        for module in sources()
        for imported in sorted(imports(module))
        if part_of(imported) not in ("miles", part_of(module))
    ]
    assert not wrong, (
        f"services and gateway call each other by gRPC and share code through miles, which starts them by name: {wrong}"
    )


def test_the_configuration_does_not_know_the_launcher() -> None:
    wrong = [
        f"{shown(module)} imports {imported}"
        for module in sources()
        for imported in sorted(imports(module))
        if module.startswith("miles.config") and imported.startswith("miles.launcher")
    ]
    assert not wrong, f"what the configuration needs of the launcher belongs into miles/config: {wrong}"
