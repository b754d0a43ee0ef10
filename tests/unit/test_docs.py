"""What the documents say of the code exists: files, and the functions and classes in them."""

from __future__ import annotations

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
_FOLDERS = "benchmarks|deploy|docs|examples|gateway|miles|protos|services|tests|tools"
PLACE = re.compile(rf"`((?:{_FOLDERS})/[\w./-]*)(?:::([\w.]+))?`")
"""`folder/file.py`, `folder/`, or `folder/file.py::Class.method`."""


@functools.cache
def names_in(path: pathlib.Path) -> frozenset[str]:
    """Functions, classes, their methods and attributes, and module-level variables, as dotted names."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    found.add(prefix + node.name)
                case ast.ClassDef():
                    found.add(prefix + node.name)
                    visit(node.body, f"{prefix}{node.name}.")
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(prefix + name)
                case _:
                    pass

    visit(ast.parse(path.read_text()).body, "")
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_place_that_a_page_names_exists(page: pathlib.Path) -> None:
    missing = []
    for place, name in PLACE.findall(page.read_text()):
        path = ROOT / place
        if not path.exists():
            missing.append(f"{place}: no such file or folder")
        elif name and name not in names_in(path):
            missing.append(f"{place} has no {name}")
    assert not missing, f"{page.relative_to(ROOT)} is out of date: " + "; ".join(missing)


def test_the_walk_in_the_architecture_page_names_functions() -> None:
    walk = PLACE.findall((ROOT / "docs" / "architecture.md").read_text())
    assert sum(bool(name) for _, name in walk) >= 40


def test_each_term_of_the_glossary_names_where_it_lives() -> None:
    lines = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| **")]
    assert len(lines) >= 50
    assert not [line for line in lines if not PLACE.search(line)]
    terms = [line.split("**")[1].lower() for line in lines]
    assert terms == sorted(terms), "the terms are in alphabetical order"
