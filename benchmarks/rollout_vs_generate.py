"""Tokens per second of the torch engine and of Hugging Face `generate`: same model, prompts, lengths, batch, threads.

    python -m benchmarks.rollout_vs_generate --hf-checkpoint DIR
    python -m benchmarks.rollout_vs_generate --hf-checkpoint DIR --dtype float32 --batch 32 --device cuda

Groups of samples share a prompt. Response lengths are drawn once from a geometric distribution cut off at the longest
allowed, and forced: every response ends exactly there. `generate` takes the requests in batches, in order, each until
its longest response is done; the engine keeps the same number running and fills places as they come free. Both also
run with every response at the mean length, where continuous batching has nothing to win. Only response tokens count.
Rounds alternate between the two; the table shows medians and the span of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from miles.services.rollout.engines.base import GenerationRequest, SamplingParams
from miles.services.rollout.engines.torch import TorchEngine

QUESTIONS = (
    "What is {} + 8?",
    "Tell me a fact about the number {}.",
    "Name {} colours and say why you like each of them.",
    "Write a short story about {} friends at the sea.",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """One prompt and the length its response is made to have."""

    prompt: list[int]
    length: int


class AtLength(StoppingCriteria):
    """Ends each row of a `generate` batch at its own length."""

    def __init__(self, padded_prompt: int, lengths: Sequence[int], device: torch.device) -> None:
        self._ends = torch.tensor(lengths, device=device) + padded_prompt

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """Which rows are done, bool (batch,)."""
        return input_ids.shape[1] >= self._ends


def make_work(tokenizer: object, args: argparse.Namespace) -> list[Work]:
    """`args.requests` requests in groups, with ragged lengths."""
    generator = torch.Generator().manual_seed(args.seed)
    drawn = torch.empty(args.requests).exponential_(1 / args.mean_tokens, generator=generator)
    lengths = drawn.long().clamp(1, args.max_tokens).tolist()
    prompts = []
    for group in range(-(-args.requests // args.group)):
        text = QUESTIONS[group % len(QUESTIONS)].format(group + 2)
        prompts.append(tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"])  # type: ignore[operator]
    return [Work(prompts[i // args.group], length) for i, length in enumerate(lengths)]


def generate_all(model: torch.nn.Module, work: Sequence[Work], batch: int, pad: int) -> float:
    """Seconds `generate` takes for all requests."""
    device = next(model.parameters()).device
    begin = time.perf_counter()
    for start in range(0, len(work), batch):
        part = work[start : start + batch]
        width = max(len(item.prompt) for item in part)
        ids = torch.tensor([[pad] * (width - len(item.prompt)) + item.prompt for item in part], device=device)
        mask = torch.tensor([[0] * (width - len(w.prompt)) + [1] * len(w.prompt) for w in part], device=device)
        longest = max(item.length for item in part)
        criteria = StoppingCriteriaList([AtLength(width, [item.length for item in part], device)])
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=pad,
            stopping_criteria=criteria,
        )
        assert output.shape[1] == width + longest
    return time.perf_counter() - begin


async def engine_all(engine: TorchEngine, work: Sequence[Work]) -> float:
    """Seconds the engine takes for all requests."""

    async def one(index: int, item: Work) -> None:
        params = SamplingParams(max_new_tokens=item.length, min_new_tokens=item.length, seed=index)
        tokens = 0
        async for delta in engine.generate(GenerationRequest(str(index), item.prompt, params)):
            tokens += len(delta.token_ids)
        assert tokens == item.length

    begin = time.perf_counter()
    await asyncio.gather(*(one(index, item) for index, item in enumerate(work)))
    return time.perf_counter() - begin


def report(name: str, work: Sequence[Work], times: dict[str, list[float]]) -> None:
    """Print the rows of one workload and the ratio of the medians."""
    tokens = sum(item.length for item in work)
    for system, seconds in times.items():
        rates = sorted(tokens / second for second in seconds)
        middle = statistics.median(rates)
        print(f"{name:14} {system:10} {tokens:8d} {middle:10.0f} {rates[0]:9.0f} - {rates[-1]:<7.0f}")
    hf, ours = (statistics.median(times[system]) for system in ("generate", "engine"))
    print(f"{name:14} engine / generate: {hf / ours:.2f}")


async def compare(args: argparse.Namespace) -> None:
    """Measure both on ragged and on equal lengths."""
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint)
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.hf_checkpoint, dtype=dtype).to(args.device).eval()
    engine = TorchEngine(
        args.hf_checkpoint,
        device=args.device,
        dtype=args.dtype,
        max_running_requests=args.batch,
        threads=args.threads,
    )
    await engine.start()
    await engine.load_weights(0, dict(model.named_parameters()))
    ragged = make_work(tokenizer, args)
    mean = round(statistics.mean(item.length for item in ragged))
    workloads = {"ragged": ragged, "equal lengths": [Work(item.prompt, mean) for item in ragged]}
    print(f"{args.hf_checkpoint} {args.dtype} on {args.device}, {args.threads} threads, batch {args.batch}")
    print(f"{'lengths':14} {'system':10} {'tokens':>8} {'tokens/s':>10} {'slowest - fastest':>19}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    warm_up = [Work(item.prompt, 4) for item in ragged[: args.batch]]
    generate_all(model, warm_up, args.batch, pad)
    await engine_all(engine, warm_up)
    for name, work in workloads.items():
        times: dict[str, list[float]] = {"generate": [], "engine": []}
        for _ in range(args.rounds):
            times["generate"].append(generate_all(model, work, args.batch, pad))
            times["engine"].append(await engine_all(engine, work))
        report(name, work, times)
    await engine.close()


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-checkpoint", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="requests that run at once")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--group", type=int, default=8, help="requests per prompt")
    parser.add_argument("--mean-tokens", type=float, default=40.0, help="mean response length before the cut-off")
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rounds < 1 or args.requests < 1:
        sys.exit("--rounds and --requests must be at least 1")
    with torch.no_grad():
        asyncio.run(compare(args))


if __name__ == "__main__":
    main()
