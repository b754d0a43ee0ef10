"""Speculative rollouts over a GRPO run in which the policy moves: no draft, a frozen one, one that is trained on.

    python -m examples.smollm2_chain_sum.prepare
    python -m examples.smollm2_chain_sum.enlarge --model .cache/smollm2-135m-instruct --out .cache/large --layers 56
    python -m benchmarks.gpu.speculative --policy .cache/large --draft .cache/smollm2-135m-instruct

The draft is a small language model, or the EAGLE-3 head that `benchmarks.gpu.draft_head` makes.

1. A run of GRPO whose draft is trained beside the policy (`online`), and with `--frozen` at the same time one whose
   draft is not. They share the GPU with what starts for part 2, so their times say nothing; their acceptance does.
2. A server without a draft and one with the draft answer 1, 8, 32 and 128 requests at a time, in `--loads`: with the
   policy of the beginning, and with that of the end of the run, there with the draft of the beginning (frozen) and that
   of the end (online). `--seconds` each; the servers take turns.

`tokens` are those of a verification: 1 is a draft of which nothing is accepted. With `--only serve --accept-length 3.4`
SGLang acts as if so many came of each, whatever the draft: what a head would bring, before one is trained.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import pathlib
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.draft_pool import LOADS, Pool, Reading, draft_weights, policy_weights
from benchmarks.gpu.draft_tasks import TASKS
from benchmarks.gpu.grpo_run import SHARED, steps_of, train
from benchmarks.gpu.run_table import hardware, versions
from miles.drafts.folders import trained_dir

RECIPE = "examples/smollm2_chain_sum/config.yaml"
PROMPT_TOKENS = 120
"""Room for each prompt, and for drafts."""
SERVER_FLAGS: Mapping[str, Any] = {
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.2,
    "disable_prefill_cuda_graph": True,
    "log_level": "warning",
}
SPECULATION: Mapping[str, Any] = {
    "speculative_eagle_topk": 1,
    "speculative_adaptive": False,
}
DRAFT_ATTENTION = "triton"
"""SGLang has CUDA graphs of a head's pass behind each verification with these kernels, and none with fa3."""


def flags_of(args: argparse.Namespace, name: str, folder: pathlib.Path) -> list[str]:
    """The flags of train.py for one of the runs."""
    task = TASKS[args.task]
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    rows = ({"prompt": [{"role": "user", "content": text}], "label": ""} for text in task.texts(4096, 2))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--config", RECIPE, "--hf-checkpoint", str(args.policy), "--prompt-data", str(prompts)]
    flags += ["--no-rm-type", "--custom-rm-path", task.reward, "--rollout-temperature", str(args.temperature)]
    flags += ["--no-eval-interval", "--no-eval-prompt-data", "--no-eval-temperature"]
    flags += ["--num-rollout", str(args.steps), "--lr", str(args.lr), "--lr-decay-style", "constant"]
    flags += ["--rollout-batch-size", str(args.prompts), "--n-samples-per-prompt", str(args.samples)]
    flags += ["--rollout-max-response-len", str(args.tokens), "--no-save-optim"]
    flags += ["--train-backend", "fsdp", "--device", args.device, "--rollout-backend", args.engine]
    flags += [*passed(speculation(args)), "--draft-acceptance-alarm", "1.01"]
    if name == "online":
        flags += ["--enable-draft-training", "--draft-learning-rate", str(args.draft_lr)]
        flags += ["--draft-tokens-per-step", str(args.draft_tokens)]
    if args.device == "cuda":
        flags += ["--actor-num-gpus-per-node", "1", *SHARED, "--max-tokens-per-gpu", "8192"]
        flags += ["--train-dtype", "bfloat16", "--rollout-dtype", "bfloat16"]
        requests = args.prompts * args.samples
        server = {**server_flags(args), "cuda_graph_bs_decode": sorted({requests // 4, requests // 2, requests})}
        flags += [*passed(server), "--max-running-requests", str(requests)]
    return [*flags, *args.more]


def server_flags(args: argparse.Namespace) -> dict[str, Any]:
    """SGLang's flags of all servers on a GPU."""
    return {**SERVER_FLAGS, "attention_backend": args.attention_backend}


def speculation(args: argparse.Namespace) -> dict[str, Any]:
    """SGLang's flags of speculation for the draft of a folder."""
    is_head = "Eagle3" in json.loads((args.draft / "config.json").read_text())["architectures"][0]
    flags = {"speculative_algorithm": "EAGLE3" if is_head else "STANDALONE", **SPECULATION}
    flags |= {"speculative_num_steps": args.draft_steps, "speculative_num_draft_tokens": args.draft_steps + 1}
    flags["speculative_draft_model_path"] = str(args.draft)
    if is_head and args.engine == "sglang":
        flags["speculative_use_rejection_sampling"] = True
    if (args.engine, args.device) == ("sglang", "cuda"):
        flags["speculative_draft_attention_backend"] = DRAFT_ATTENTION
    return flags


def passed(flags: Mapping[str, Any]) -> list[str]:
    """SGLang's flags on train.py's command line."""
    line: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        values = (
            [] if isinstance(value, bool) else [str(part) for part in (value if isinstance(value, list) else [value])]
        )
        line += ["--no-sglang-" + flag if value is False else "--sglang-" + flag, *values]
    return line


def train_all(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs, at once; their results, with acceptance by step."""
    results: dict[str, dict[str, Any]] = {}

    def one(name: str) -> None:
        folder = (args.runs / name).absolute()
        result = train(flags_of(args, name, folder), folder, args.deadline)
        steps = steps_of(folder)
        for key in ("rollout/spec_accept_length", "rollout/raw_reward", "draft/update_s", "draft/version"):
            result[key] = [line.get(key) for line in steps]
        results[name] = result
        print(name, json.dumps(result), flush=True)

    names = ("online", "frozen") if args.frozen else ("online",)
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        for future in [pool.submit(one, name) for name in names]:
            future.result()
    return {name: results[name] for name in names}


async def measure(args: argparse.Namespace) -> None:
    """The runs, while the servers start; then tokens per second from pools of all sizes, and what a new draft costs."""
    room = {
        "max_running_requests": max(args.pools),
        "max_total_tokens": max(args.pools) * (args.tokens + PROMPT_TOKENS),
    }
    graphs = {"cuda_graph_bs_decode": sorted(set(args.pools)), **room, **prefill_graphs(args.prefill_graphs)}
    common = {**server_flags(args), **graphs} if args.device == "cuda" else {}
    plain, drafting = Pool(args, "none", common), Pool(args, "drafts", {**common, **speculation(args)})
    try:
        async with asyncio.TaskGroup() as group:
            runs = None if args.only == "serve" else group.create_task(asyncio.to_thread(train_all, args))
            if args.only != "runs":
                group.create_task(plain.start())
                group.create_task(drafting.start())
        if runs is not None:
            report_runs(args, runs.result())
        if args.only != "runs":
            readings = await serve(args, plain, drafting)
            (args.runs / "table.md").write_text(tables(readings, args.pools))
            print("\n" + tables(readings, args.pools), flush=True)
    finally:
        await asyncio.gather(plain.close(), drafting.close())


def accepting(python: str, length: float, program: pathlib.Path) -> str:
    """A program that is this interpreter, but for SGLang's switch, which the product's servers do not inherit."""
    program.write_text(f'#!/bin/sh\nSGLANG_SIMULATE_ACC_LEN={length} exec "{python}" "$@"\n')
    program.chmod(0o755)
    return str(program)


def prefill_graphs(sizes: Sequence[int]) -> dict[str, Any]:
    """SGLang's flags for CUDA graphs of prefills of these numbers of tokens."""
    if not sizes:
        return {}
    how = {"disable_prefill_cuda_graph": False, "cuda_graph_backend_prefill": "breakable"}
    return {**how, "cuda_graph_bs_prefill": list(sizes)}


def report_runs(args: argparse.Namespace, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print and write acceptance by step, and what updates took."""
    (args.runs / "by-step.md").write_text(by_step(results) + "\n")
    print("\n" + by_step(results), flush=True)
    if updates := [seconds for seconds in results["online"]["draft/update_s"] if seconds]:
        print(f"\nan update of the draft: median {statistics.median(updates):.2f} s", flush=True)


async def serve(args: argparse.Namespace, plain: Pool, drafting: Pool) -> list[Reading]:
    """Tokens per second of both servers from pools of all sizes."""
    online = args.runs.absolute() / "online"
    first = draft_weights(args.draft, args.dtype)
    readings = await at_policy("begin", policy_weights(args.policy, args.dtype), {"frozen": first}, plain, drafting)
    exports = sorted((online / "hf").glob("*"), key=lambda folder: int(folder.name))
    if not exports:
        print(f"{online} has no policy of the run's end: see its output.log", flush=True)
        return readings
    drafts = {"frozen": first, "online": draft_weights(trained_dir(online), args.dtype)}
    return readings + await at_policy("end", policy_weights(exports[-1], args.dtype), drafts, plain, drafting)


async def at_policy(
    policy: str, weights: Mapping[str, Any], drafts: Mapping[str, Mapping[str, Any]], plain: Pool, drafting: Pool
) -> list[Reading]:
    """Tokens per second with one policy: without a draft, and with each of these."""
    await asyncio.gather(plain.load(weights), drafting.load(weights))
    if policy == "begin":
        await asyncio.gather(plain.warm_up(), drafting.warm_up())
    readings = [await plain.measure(load, policy, "none", size) for load in plain.loads for size in plain.sizes]
    for name, draft in drafts.items():
        print(f"draft {name}: {json.dumps(await drafting.load_draft(draft))}", flush=True)
        for load in drafting.loads:
            readings += [await drafting.measure(load, policy, name, size) for size in drafting.sizes]
    return readings


def tables(readings: Sequence[Reading], pools: Sequence[int]) -> str:
    """Markdown: a table for each load."""
    loads = dict.fromkeys(each.load for each in readings)
    return "\n".join(f"{load}\n\n{table([one for one in readings if one.load == load], pools)}\n" for load in loads)


def table(readings: Sequence[Reading], pools: Sequence[int]) -> str:
    """Markdown: a row for each policy and draft, a column for each number of requests."""
    plain = {(each.policy, each.size): each.tokens_per_s for each in readings if each.draft == "none"}
    lines = ["| policy | draft | " + " | ".join(f"{size} requests" for size in pools) + " |"]
    lines.append("|---|---|" + "---|" * len(pools))
    for policy, draft in dict.fromkeys((each.policy, each.draft) for each in readings):
        cells = []
        for each in readings:
            if (each.policy, each.draft) == (policy, draft):
                ratio = each.tokens_per_s / plain[policy, each.size]
                more = "" if draft == "none" else f", {ratio:.2f} ×, {each.accept_length:.2f} tokens"
                cells.append(f"{each.tokens_per_s:,.0f}/s{more}")
        lines.append(f"| {policy} | {draft} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_step(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: acceptance and reward by step."""
    lines = ["| step | " + " | ".join(f"{name}: tokens, reward, version of the draft" for name in results) + " |"]
    lines.append("|---" * (1 + len(results)) + "|")
    count = max(len(result["rollout/raw_reward"]) for result in results.values())
    for step in range(count):
        cells = []
        for result in results.values():
            length, reward, version = (
                (result[key] + [None] * count)[step]
                for key in ("rollout/spec_accept_length", "rollout/raw_reward", "draft/version")
            )
            cells.append("" if length is None else f"{length:.3f}, {reward:.3f}, {version or 0:.0f}")
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for; print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=pathlib.Path, default=pathlib.Path(".cache/large"))
    parser.add_argument("--draft", type=pathlib.Path, default=pathlib.Path(".cache/smollm2-135m-instruct"))
    parser.add_argument("--task", default="rare-words", choices=list(TASKS))
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a step")
    parser.add_argument("--samples", type=int, default=8, help="responses to each")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of a response")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--draft-lr", type=float, default=2e-4)
    parser.add_argument("--draft-tokens", type=int, default=32768)
    parser.add_argument("--draft-steps", type=int, default=3, help="tokens drafted one behind the other")
    parser.add_argument("--pools", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--loads", nargs="+", default=LOADS, choices=LOADS, help="how requests come")
    parser.add_argument("--accept-length", type=float, help="tokens of a verification, as if they had been accepted")
    parser.add_argument("--attention-backend", default="fa3", help="the policy's kernels; triton where not on Hopper")
    parser.add_argument("--prefill-graphs", type=int, nargs="+", default=[], help="tokens of prefills with CUDA graphs")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--deadline", type=float, default=420.0, help="seconds that the runs may take")
    parser.add_argument("--frozen", action="store_true", help="also a run whose draft is not trained")
    parser.add_argument("--only", choices=["runs", "serve"], help="the first or the second part alone")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--engine", default="sglang", choices=["sglang", "torch"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--python", default=sys.executable, help="interpreter that has SGLang")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/speculative"), help="folder for runs")
    parser.add_argument("more", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.accept_length is not None:
        if (args.only, args.engine, args.device) != ("serve", "sglang", "cuda"):
            parser.error("--accept-length goes with --only serve, SGLang and a GPU: nothing can be trained with it")
        args.python = accepting(args.python, args.accept_length, args.runs.absolute() / "python")
    print(f"{hardware(args.device)}; {versions()}", flush=True)
    if args.only != "serve":
        for name in ("online", "frozen"):
            shutil.rmtree(args.runs / name, ignore_errors=True)
    asyncio.run(measure(args))


if __name__ == "__main__":
    main()
