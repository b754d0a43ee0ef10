"""Figures of the web page, computed by its own modules in Node."""

from __future__ import annotations

import json
import pathlib
import subprocess
from typing import Any

import playwright
import pytest

NODE = pathlib.Path(playwright.__file__).parent / "driver" / "node"
PAGE = pathlib.Path(__file__).parents[3] / "gateway" / "web" / "js"


def evaluate(module: str, expression: str) -> Any:
    """The value of a JavaScript expression in which `page` is one of the page's modules."""
    script = f"""
        globalThis.window = globalThis.document = undefined;
        globalThis.localStorage = {{ getItem: () => null, setItem: () => undefined }};
        const page = await import({json.dumps((PAGE / module).as_uri())});
        console.log(JSON.stringify({expression}));
    """
    command = [str(NODE), "--input-type=module", "--eval", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_curve_of_zeros_has_an_axis_to_one_and_others_one_that_fits() -> None:
    ranges = evaluate(
        "charts.js",
        "[[0, 0], [0, 1e-30], [null, null], [0, 5], [3, 3], [-2, 2], [0, 1e-9]].map((each) => "
        "page.valueRange(null, ...each))",
    )
    assert ranges[:3] == [[0, 1], [0, 1], [None, None]]
    for (low, high), (bottom, top) in zip([(0, 5), (3, 3), (-2, 2), (0, 1e-9)], ranges[3:], strict=True):
        assert bottom <= low <= high <= top
        assert top - bottom <= 2.5 * max(high - low, high)


@pytest.mark.parametrize(
    ("run", "held", "newest", "behind"),
    [
        ({"active_version": 5, "newest_version": 5}, [["policy", 5], ["policy", 4]], 5, [0, 1]),
        # Engines were asked two steps later than the run.
        ({"active_version": 5, "newest_version": 5}, [["policy", 7], ["policy", 6]], 7, [0, 1]),
        ({"active_version": 5, "newest_version": 5}, [["policy", None], ["draft", 9]], 5, ["–", "–"]),
        # Before the run's first version, engines hold those of another job.
        ({"active_version": None, "newest_version": 0}, [["policy", 40]], 0, ["–"]),
    ],
)
def test_no_engine_is_ahead_of_the_newest_version(
    run: dict[str, Any], held: list[list[Any]], newest: int, behind: list[Any]
) -> None:
    versions = json.dumps([{"stream": stream, "version": version} for stream, version in held])
    state = json.dumps(run)
    found = evaluate(
        "queue.js",
        f"((run, held) => {{ const newest = page.newestVersion(run, held); "
        f"return [newest, held.map((each) => page.versionsBehind(run, newest, each))]; }})({state}, {versions})",
    )
    assert found == [newest, behind]
