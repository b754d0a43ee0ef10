"""Prove that a change which should not change what runs do changes no bit of it.

    python tools/same_runs.py --before REV            # this tree against a revision
    python tools/same_runs.py --dump FILE             # keep what this tree gives ...
    python tools/same_runs.py --against FILE          # ... and compare with it later, on the same machine

Short runs with fixed seeds, on the CPU, of a tiny dense model and a tiny mixture of experts, each trained by both
backends over two ranks: three synchronous steps with evaluations, routing replayed for the mixture of experts. Compared
are every metric but times and speeds, everything recorded of every sample, and every tensor and file of the final
checkpoint in Hugging Face form. Exits with 1 where something differs, and with 2 where a run fails.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "tiny"
STEPS, PROMPTS, SAMPLES = 3, 8, 4
NOT_COMPARED = re.compile(r"unix_s|perf/.*")
"""Metrics of which only the names are compared: the time of day, and times and speeds of a step."""
LIMIT_S, SHOWN_DIFFERENCES = 900, 3
FSDP, MEGATRON = "--train-backend=fsdp", "--train-backend=megatron"
REPLAY = "--use-rollout-routing-replay"
RUNS = {
    "dense-fsdp": ("dense", [FSDP]),
    "moe-fsdp": ("moe", [FSDP, REPLAY]),
    "dense-megatron": ("dense", [MEGATRON, "--tensor-model-parallel-size=2", "--sequence-parallel"]),
    "moe-megatron": ("moe", [MEGATRON, "--expert-model-parallel-size=2", REPLAY]),
}
FLAGS = f"""
    --device=cpu --no-gateway --seed=1 --rollout-seed=2 --max-weight-staleness=0 --actor-num-gpus-per-node=2
    --num-rollout={STEPS} --rollout-batch-size={PROMPTS} --n-samples-per-prompt={SAMPLES} --num-steps-per-rollout=2
    --input-key=prompt --label-key=label --rm-type=exact_match --rollout-skip-special-tokens
    --rollout-max-response-len=6 --max-running-requests=64 --rollout-dtype=float32 --train-dtype=float32
    --use-dynamic-batch-size --max-tokens-per-gpu=64 --calculate-per-token-loss --lr=5e-4 --use-kl-loss
    --kl-loss-coef=0.01 --entropy-coef=0.01 --eval-interval=2 --eval-temperature=0 --log-samples-per-step={PROMPTS}
""".split()

Result = dict[str, dict[str, Any]]
"""What is compared of one run: value by name, by section (metrics, tensors, ...)."""


def fail(message: str) -> NoReturn:
    """End the program, because nothing can be compared."""
    print(message, file=sys.stderr)
    sys.exit(2)


def call(command: list[str], tree: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Carry out a Python command with the modules of a tree and nobody else's, on one thread.

    With more threads the order of floating-point sums would depend on how many cores are to be had.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MILES_")}
    variables = {**kept, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        return subprocess.run([sys.executable, *command], cwd=tree, env=variables, text=True, timeout=LIMIT_S, **pipes)
    except subprocess.TimeoutExpired:
        fail(f"not done within {LIMIT_S} s in {tree}: {' '.join(command)}")


def run(tree: pathlib.Path, name: str, folder: pathlib.Path) -> Result:
    """Carry out a run in `folder`; fails with its output when it does not succeed."""
    model, flags = RUNS[name]
    data = MODELS / model
    command = ["train.py", *FLAGS, *flags, f"--hf-checkpoint={data / 'model'}", f"--name={name}"]
    command += [f"--prompt-data={data / 'train.jsonl'}", "--eval-prompt-data", "sort", str(data / "eval.jsonl")]
    command += [f"--run-dir={folder}", f"--save-hf={folder / 'hf'}"]
    if MEGATRON in flags:
        (stand_ins,) = (tree / "tests").rglob("megatron_cpu/sitecustomize.py")  # for what needs a GPU
        variables = {"PYTHONPATH": f"{stand_ins.parent}{os.pathsep}{tree}", "MILES_TEST_MEGATRON_CPU": "1"}
        command.append(f"--train-env-vars={json.dumps(variables)}")
    done = call(command, tree)
    if done.returncode != 0:
        logs = [f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted((folder / "logs").glob("*.log"))]
        fail("\n".join([f"{name} of {tree} ended with {done.returncode}:", done.stdout[-3000:], *logs]))
    return read(folder, data)


def read(folder: pathlib.Path, data: pathlib.Path) -> Result:
    """What is compared of a run that has ended; fails if it left less behind than it must."""
    metrics: dict[str, Any] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            key = f"step {line['step']} {name}"
            metrics.setdefault(key, []).append("not compared" if NOT_COMPARED.fullmatch(name) else value)
    samples = {}
    for file in sorted((folder / "samples").glob("*.jsonl")):
        for record in map(json.loads, file.read_text().splitlines()):
            samples[f"{file.stem} group {record['group_id']} {record.get('index', '')}".strip()] = record
    outputs = hashes(folder / "hf")
    result = {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "megatron-core")},
        "inputs": hashes(data) | hashes(data / "model"),
        "metrics": {key: values for key, values in metrics.items() if "not compared" not in values},
        "names": {key: values for key, values in metrics.items() if "not compared" in values},
        "samples": samples,
        "tensors": {name: value for name, value in outputs.items() if " " in value},
        "files": {name: value for name, value in outputs.items() if " " not in value},
    }
    losses, tokens = (sum(" train/loss" in key for key in metrics), sum("ids" in each for each in samples.values()))
    if (losses, tokens) != (STEPS, STEPS * PROMPTS * SAMPLES) or not result["tensors"]:
        fail(f"{folder} has losses of {losses} steps, tokens of {tokens} samples, {len(result['tensors'])} tensors")
    return result


def hashes(folder: pathlib.Path) -> dict[str, str]:
    """Hashes of a folder's files; those of tensors are hashed tensor by tensor, with type and shape beside."""
    found = {}
    for file in filter(pathlib.Path.is_file, sorted(folder.iterdir())):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start]) if file.suffix == ".safetensors" else {}
        if not header:
            found[file.name] = hashlib.sha256(content).hexdigest()
        for name in header.keys() - {"__metadata__"}:
            dtype, shape, (first, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
            found[name] = f"{dtype} {shape} {hashlib.sha256(content[start + first : start + end]).hexdigest()}"
    return dict(sorted(found.items()))


def differences(before: Result, after: Result) -> list[str]:
    """What is not the same to the bit, in words. Numbers are compared as they are written: -0.0 is not 0.0."""
    old, new = (
        {f"{section}: {key}": json.dumps(value) for section in result for key, value in result[section].items()}
        for result in (before, after)
    )
    pairs = [(key, old.get(key, "absent"), new.get(key, "absent")) for key in old | new]
    return [f"{key}: {one} became {other}" for key, one, other in pairs if one != other]


def compare(before: dict[str, Result], after: dict[str, Result]) -> bool:
    """Print the table and the first differences; whether there are none."""
    found = {name: differences(before[name], after[name]) for name in after}
    print(f"\n{'run':<16}{'steps':>5}{'metrics':>9}{'samples':>9}{'tensors':>9}  difference")
    for name, result in after.items():
        counts = f"{len(result['metrics']):>9}{STEPS * PROMPTS * SAMPLES:>9}{len(result['tensors']):>9}"
        print(f"{name:<16}{STEPS:>5}{counts}  {len(found[name]) or 'none'}")
    for name, each in found.items():
        for text in each[:SHOWN_DIFFERENCES]:
            print(f"{name}: {text}")
    return not any(found.values())


def run_all(tree: pathlib.Path, names: list[str]) -> dict[str, Result]:
    """Results of runs of a tree by name; makes the tiny models unless they are there."""
    package = call(["-c", "import miles; print(miles.__file__)"], tree).stdout.strip()
    if tree not in pathlib.Path(package).resolve().parents:
        fail(f"{tree} would not run its own package: {package}")
    if not (MODELS / "moe" / "model" / "tokenizer_config.json").exists():
        call(["examples/tiny/make.py", "--out", str(MODELS)], tree)
    results = {}
    for name in names:
        print(f"{name} of {tree}", flush=True)
        with tempfile.TemporaryDirectory(prefix="same-runs-") as scratch:
            results[name] = run(tree, name, pathlib.Path(scratch, "run"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--before", metavar="REV", help="compare with this revision")
    what.add_argument("--against", metavar="FILE", type=pathlib.Path, help="compare with what --dump wrote")
    what.add_argument("--dump", metavar="FILE", type=pathlib.Path, help="only write what the tree gives")
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT, help="the tree to run; this one by default")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="some of the runs alone")
    flags = parser.parse_args()
    if flags.before:
        with tempfile.TemporaryDirectory(prefix="same-runs-before-") as scratch:
            archive = subprocess.run(["git", "archive", flags.before], cwd=ROOT, stdout=subprocess.PIPE)
            if archive.returncode != 0:
                fail(f"git knows no revision {flags.before}")
            subprocess.run(["tar", "--extract"], cwd=scratch, input=archive.stdout, check=True)
            before = run_all(pathlib.Path(scratch).resolve(), flags.runs)
    elif flags.against:
        before = json.loads(flags.against.read_text())
        if missing := set(flags.runs) - before.keys():
            fail(f"{flags.against} has no {', '.join(sorted(missing))}")
    after = run_all(flags.tree.resolve(), flags.runs)
    if flags.dump:
        flags.dump.write_text(json.dumps(after, indent=1) + "\n")
    elif not compare(before, after):
        sys.exit(1)


if __name__ == "__main__":
    main()
