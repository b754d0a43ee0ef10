from __future__ import annotations

import pathlib

import pytest

from miles.migrate.python_script import read_python_script

SCRIPTS = pathlib.Path(__file__).parent / "scripts"


def launched(folder: pathlib.Path, before: str, expression: str, **given: str) -> list[str]:
    script = folder / "run.py"
    script.write_text(f"{before}\nU.execute_train(train_args={expression})\n")
    launch = read_python_script(script, given)
    return [launch.open.plain(word) for word in launch.words]


@pytest.mark.parametrize(
    ("before", "expression", "words"),
    [
        ("", "'--a 1 ' '--b'", ["--a", "1", "--b"]),
        ("n = 2 * 1024**3", "f'--n {n} {n // 2:,}'", ["--n", "2147483648", "1,073,741,824"]),
        ("a = '--a '\na += '--b '", "a", ["--a", "--b"]),
        ("fast = False", "f\"{'--fast ' if fast else ''}--x\"", ["--x"]),
        ("def f(n, m=2): return f'--n {n * m}'", "f(3)", ["--n", "6"]),
        ("n = 4\nif n > 2 and n != 3:\n    a = 'big'\nelse:\n    a = 'small'", "a", ["big"]),
        ("match ('H100', 2):\n    case ('H100', 1 | 2): a = 'yes'\n    case _: a = 'no'", "a", ["yes"]),
        ("a = ''\nfor i in range(3):\n    if i == 1: continue\n    a += f'{i} '", "a", ["0", "2"]),
        ("import os", "os.environ.get('A', 'b') + ' ' + os.path.join('/x', 'y')", ["b", "/x/y"]),
        ("import os", "os.environ['DIR'] + '/x'", ["$DIR/x"]),
        ("from pathlib import Path\np = Path('/a') / 'b'", "f'--p {p}'", ["--p", "/a/b"]),
        ("import json", "f\"--j '{json.dumps({'a': 1})}'\"", ["--j", '{"a": 1}']),
        ("run_id = U.new_id()", "f'--run /x/{run_id}'", ["--run", "/x/$RUN_ID"]),
        ("a = ' '.join(f'--{x}' for x in ['p', 'q'] if x != 'p')", "a", ["--q"]),
        ("import re\nm = re.search('([0-9]+)layer', 'x_4layer')", "f'--n {m.group(1)}'", ["--n", "4"]),
        ("try:\n    a = '1'\nfinally:\n    b = '2'", "a + b", ["12"]),
    ],
)
def test_words_are_those_that_python_would_pass(
    tmp_path: pathlib.Path, before: str, expression: str, words: list[str]
) -> None:
    assert launched(tmp_path, before, expression) == words


def test_nothing_is_run(tmp_path: pathlib.Path) -> None:
    before = f"import os, pathlib\nos.system('touch {tmp_path}/a')\npathlib.Path('{tmp_path}/b').write_text('')"
    assert launched(tmp_path, f"{before}\nopen('{tmp_path}/c', 'w')", "'--x'") == ["--x"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]


@pytest.mark.parametrize(
    "before", ["a = 'x' * 10**9", "a = [0] * 10**9", "a = 10**10**10", "def a(): return a()\na = a()", "a = 1 / 0"]
)
def test_what_cannot_be_computed_is_open(tmp_path: pathlib.Path, before: str) -> None:
    assert launched(tmp_path, before, "f'--a {a}'") == ["--a", "$A"]


def test_an_endless_loop_ends(tmp_path: pathlib.Path) -> None:
    loop = "for i in range(10000):\n    for j in range(10000):\n        x = 1"
    assert launched(tmp_path, loop, "'--x'") == []


def test_a_dataclass_has_its_defaults_what_follows_from_them_and_what_is_given() -> None:
    launch = read_python_script(SCRIPTS / "run_tiny.py", {})
    words = [launch.open.plain(word) for word in launch.words]
    assert words[:4] == ["--hf-checkpoint", "/models/tiny", "--save", "$U_NEW_FOLDER/out"]
    assert words[words.index("--rollout-batch-size") + 1] == "16"
    assert launch.environment == {"NVTE_DEBUG": "1"}
    assert [str(remark) for remark in launch.remarks] == [
        "line 33: the flags of model type tiny are not needed: config.json has them"
    ]
    given = read_python_script(
        SCRIPTS / "run_tiny.py", {"num_gpus": "4", "model": "huge", "offload": "true", "extra": "--x"}
    )
    assert given.words[given.words.index("--rollout-batch-size") + 1] == "32"
    assert given.words[given.words.index("--num-rollout") + 1] == "1"
    assert {"--colocate", "--x"} <= set(given.words)


def test_a_condition_that_is_not_known_counts_as_false_and_is_named(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("a = ''\nif U.on():\n    a = '--on'\nU.execute_train(train_args=a + ' --x')\n")
    launch = read_python_script(script, {})
    assert launch.words == ["--x"]
    assert [str(remark) for remark in launch.remarks] == ["line 2: `U.on()` is not known, and taken for false"]


def test_a_module_near_the_script_is_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "u.py").write_text("K = 3\ndef flags(n): return f'--n {n + K}'\n")
    (tmp_path / "scripts").mkdir()
    assert launched(tmp_path / "scripts", "import lib.u as V", "V.flags(1)") == ["--n", "4"]
