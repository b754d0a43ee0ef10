from __future__ import annotations

import pathlib

import pytest

from miles.migrate.shell_script import read_shell_script

SCRIPTS = pathlib.Path(__file__).parent / "scripts"


def launched(folder: pathlib.Path, before: str, line: str, **given: str) -> list[str]:
    """Return the words that a script gives train.py, with what is open as variables."""
    script = folder / "run.sh"
    script.write_text(f"{before}\npython3 train.py {line}\n")
    launch = read_shell_script(script, given)
    return [launch.open.plain(word) for word in launch.words]


@pytest.mark.parametrize(
    ("before", "line", "words"),
    [
        ("A=1", "--a $A", ["--a", "1"]),
        ("A='x y'", '--a "$A" $A', ["--a", "x y", "x", "y"]),
        ("A=(--a 1 # no\n  # --b 2\n  '--c d')", "${A[@]}", ["--a", "1", "--c d"]),
        ("A=(--a)\nA+=(--b)", '"${A[@]}"', ["--a", "--b"]),
        ("A=()", '"${A[@]}" ${B[@]} x', ["x"]),
        ("", "${A:-one} ${B-two} ${C:+three}", ["one", "two"]),
        ("A=1", "${A:+yes} ${A:-no}", ["yes", "1"]),
        ("A=model.tar.gz", "${A%.*} ${A%%.*} ${A#*.}", ["model.tar", "model", "tar.gz"]),
        ("N=3", "$((N * 2 + 1)) $(( (N + 1) / 2 ))", ["7", "2"]),
        ("", "$(seq 2) $(seq 1 2 5) $(basename /a/b.sh .sh)", ["1", "2", "1", "3", "5", "b"]),
        ("", r"a\ b 'c d' \"e\" \$f", ["a b", "c d", '"e"', "$f"]),
        ("P=1", "http://h:$P/x [0]*$P+[1]", ["http://h:1/x", "[0]*1+[1]"]),
        ("if [ 2 -gt 1 ]; then A=yes; else A=no; fi", "$A", ["yes"]),
        ("if [[ a == b ]]; then A=1; elif [ -z '' ]; then A=2; fi", "$A", ["2"]),
        ("N=8\nif (( N > 4 )); then A=big; fi", "$A", ["big"]),
        ('[ -n "$UNSET" ] && A=1\n[ -z "$UNSET" ] && A=2', "$A", ["2"]),
        ("case qwen3 in glm*) A=g;; qwen*|q) A=q;; *) A=none;; esac", "$A", ["q"]),
        ("for i in 1 2 3; do A+=$i; done", "$A", ["123"]),
        ('f() { A="$1-$#"; }\nf x y', "$A", ["x-2"]),
        ("cat <<EOF > file\nA=wrong\nEOF\nA=right", "$A", ["right"]),
        ("A=1 B=2", "$A$B", ["12"]),
        ("export A=1", "$A", ["1"]),
        ("N=$(nvidia-smi | wc -l)", "--n $N", ["--n", "$(nvidia-smi | wc -l)"]),
        ("N=$(ls | wc -l)\nif [ $N -gt 1 ]; then A=1; else A=2; fi", "--n $A", ["--n", "$A"]),
        ("", "--dir $BASE/x", ["--dir", "$BASE/x"]),
        ("while read x; do A=1; done", "$A", ["$A"]),
    ],
)
def test_words_are_those_of_a_shell(tmp_path: pathlib.Path, before: str, line: str, words: list[str]) -> None:
    assert launched(tmp_path, before, line) == words


def test_nothing_is_run(tmp_path: pathlib.Path) -> None:
    launched(tmp_path, f"touch {tmp_path}/a; A=$(touch {tmp_path}/b)\necho > {tmp_path}/c", "$A")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.sh"]


def test_variables_that_are_given_are_not_assigned(tmp_path: pathlib.Path) -> None:
    assert launched(tmp_path, "N=$(ls)\nM=1", "$N $M", N="4", M="2") == ["4", "2"]


def test_the_last_program_counts_also_within_a_job_of_ray(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text("python train.py --a\nray job submit -- python3 dir/train_async.py \\\n  --b 1\n")
    launch = read_shell_script(script, {})
    assert (launch.program, launch.words) == ("train_async", ["--b", "1"])
    assert [str(remark) for remark in launch.remarks] == [
        "line 2: the script starts training more than once; the last command is taken"
    ]


def test_a_script_beside_is_read_and_a_missing_one_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.sh").write_text("A=(--x)\n")
    before = 'D="$(cd "$(dirname "$0")" && pwd)"\nsource "$D/models/m.sh"\nsource $REPO/none.sh'
    assert launched(tmp_path, before, "${A[@]}") == ["--x"]
    launch = read_shell_script(tmp_path / "run.sh", {})
    assert str(launch.remarks[0]) == "line 3: $REPO/none.sh is not read: there is no such file near the script"


def test_the_environment_is_that_of_exports_and_of_rays_json(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(
        "export A=1\nB=2\nENV=$(cat <<END\n"
        '{"env_vars": {"C": "${B}"}}\nEND\n)\n'
        'ray job submit --runtime-env-json="${ENV}" -- python3 train.py --x\n'
    )
    assert read_shell_script(script, {}).environment == {"A": "1", "C": "2"}


def test_an_undecided_branch_names_its_condition() -> None:
    launch = read_shell_script(SCRIPTS / "run-tiny.sh", {})
    (found,) = launch.open.of(launch.words[1])
    assert (found.shell, found.line) == ("$GPUS", 10)
    assert found.why == 'it depends on [ "${FOUND}" -gt 1 ]'
