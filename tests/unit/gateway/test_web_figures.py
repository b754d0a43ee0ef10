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


def engine_lines(values: dict[str, dict[int, float | None]]) -> Any:
    """The lines of a chart with a line for each engine, and the values of those that are computed."""
    return evaluate(
        "charts.js",
        f"""((given) => {{
            const curves = new page.Curves();
            for (const [name, steps] of Object.entries(given)) {{
                for (const [step, value] of Object.entries(steps)) curves.add(name, Number(step), value);
            }}
            const lines = curves.engines("accept");
            return lines.map(([name, label]) => [label, Object.fromEntries(curves.values.get(name))]);
        }})({json.dumps(values)})""",
    )


def test_a_chart_of_engines_has_a_line_for_each_and_of_many_the_least_and_the_most() -> None:
    assert engine_lines({"other/rollout-0": {0: 1.0}}) == []
    assert engine_lines({"accept": {0: 2.0}, "accept/rollout-0": {0: 2.0}}) == [["rollout-0", {"0": 2.0}]]
    two = {"accept": {0: 2.0}, "accept/rollout-0": {0: 1.0}, "accept/rollout-1": {0: 3.0}}
    assert [label for label, _ in engine_lines(two)] == ["all engines", "rollout-0", "rollout-1"]
    many: dict[str, dict[int, float | None]] = {f"accept/rollout-{i}": {0: 1.0 + i, 1: 9.0 - i} for i in range(5)}
    many["accept/rollout-2"][1] = None
    assert engine_lines({"accept": {0: 3.0}, **many}) == [
        ["all engines", {"0": 3.0}],
        ["least", {"0": 1.0, "1": 5.0}],
        ["most", {"0": 5.0, "1": 9.0}],
    ]


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
