"""Tokens per second of the torch engine with drafts from earlier responses and without, by batch size and likeness.

    python -m benchmarks.speculative_torch
    python -m benchmarks.speculative_torch --hf-checkpoint DIR --dtype bfloat16 --batches 1,8 --device cuda

Each request brings along one earlier response: the one that it is about to get, with a share of its tokens replaced at
random places. At 0 % this is text that comes again word by word; at 50 % most drafts are wrong and only cost. All
engines generate the same tokens, which is checked. Rounds alternate between them: without drafts, with drafts always,
and with automatic speculation, which goes on measuring from round to round. The table shows medians. Without a
checkpoint a Llama of random weights is used, as fast as a real one of its size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from miles.config.speculation import DraftKind, Speculation
from miles.services.rollout.engines.base import GenerationRequest, SamplingParams, SpeculationCounts
from miles.services.rollout.engines.torch import TorchEngine

PROMPT = list(range(5, 29))


@dataclasses.dataclass(frozen=True)
class Round:
    """One run of all requests."""

    seconds: float
    responses: list[list[int]]
    tokens_per_verification: float


def write_model(folder: pathlib.Path, layers: int) -> None:
    """A Llama of SmolLM2-135M's widths, without weights, and a tokenizer of bytes."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip
    config.save_pretrained(folder)
    bytes_ = Tokenizer(models.BPE(vocab={chr(i): i for i in range(256)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(folder)


def altered(response: Sequence[int], share: float, seed: int) -> npt.NDArray[np.int32]:
    """The response with this share of its tokens replaced."""
    random = np.random.default_rng(seed)
    tokens = np.array(response, np.int32)
    places = random.random(len(tokens)) < share
    tokens[places] = random.integers(300, 8000, places.sum())
    return tokens


async def run(engine: TorchEngine, batch: int, length: int, earlier: Sequence[npt.NDArray[np.int32]]) -> Round:
    """Generate `batch` responses of one prompt at once; `earlier`: one response for each, or none at all."""
    responses: list[list[int]] = [[] for _ in range(batch)]

    async def one(index: int) -> None:
        params = SamplingParams(max_new_tokens=length, min_new_tokens=length, seed=index)
        prompt = [*PROMPT, 40 + index]  # a group of its own, so that it drafts from its own earlier response alone
        brought = earlier[index : index + 1]
        request = GenerationRequest(f"{id(responses)}-{index}", prompt, params, earlier_responses=brought)
        async for delta in engine.generate(request):
            responses[index] += delta.token_ids

    before = _counts(engine)
    begin = time.perf_counter()
    await asyncio.gather(*(one(index) for index in range(batch)))
    seconds = time.perf_counter() - begin
    after = _counts(engine)
    verified = after.verify_count - before.verify_count
    accepted = after.accepted_draft_tokens - before.accepted_draft_tokens
    return Round(seconds, responses, 1 + accepted / verified if verified else 1.0)


def _counts(engine: TorchEngine) -> SpeculationCounts:
    state = engine.stats().speculation
    return state.counts[-1] if state is not None and state.counts else SpeculationCounts(0, None)


async def compare(args: argparse.Namespace, folder: str) -> None:
    """Measure all batch sizes and shares of replaced tokens."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.hf_checkpoint:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(dtype)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    batches = [int(each) for each in args.batches.split(",")]
    drafts = Speculation(DraftKind.NGRAM, num_steps=args.steps, num_draft_tokens=args.steps + 1)
    kinds = {
        "none": None,
        "always": dataclasses.replace(drafts, adaptive=False),
        "automatic": dataclasses.replace(drafts, adaptive=True),
    }
    print(f"{folder} {args.dtype} on {args.device}, {args.threads} threads, {args.length} tokens, {args.steps} steps")
    print(f"{'requests':>8} {'replaced':>8} {'drafts':10} {'tokens/s':>9} {'over none':>9} {'tokens/verification':>20}")
    for batch in batches:
        for share in map(float, args.replaced.split(",")):
            async with contextlib.AsyncExitStack() as closing:
                engines = {}
                for name, speculation in kinds.items():
                    engine = TorchEngine(
                        folder, device=args.device, dtype=args.dtype, threads=args.threads,
                        max_running_requests=batch, speculation=speculation,
                    )  # fmt: skip
                    await engine.start()
                    closing.push_async_callback(engine.close)
                    await engine.load_weights(0, weights)
                    engines[name] = engine
                plain = await run(engines["none"], batch, args.length, ())
                earlier = [altered(response, share, seed) for seed, response in enumerate(plain.responses)]
                rounds: dict[str, list[Round]] = {name: [] for name in kinds}
                for _ in range(args.rounds):
                    for name, engine in engines.items():
                        rounds[name].append(await run(engine, batch, args.length, earlier))
                        assert rounds[name][-1].responses == plain.responses, f"{name} drafts changed a response"
            report(batch, share, args.length, rounds)


def report(batch: int, share: float, length: int, rounds: dict[str, list[Round]]) -> None:
    """Print a row for each kind of drafts."""
    rates = {name: batch * length / statistics.median(r.seconds for r in each) for name, each in rounds.items()}
    for name, each in rounds.items():
        accepted = statistics.median(r.tokens_per_verification for r in each)
        ratio = statistics.median(
            plain.seconds / drafted.seconds for plain, drafted in zip(rounds["none"], each, strict=True)
        )
        print(f"{batch:8d} {share:8.0%} {name:10} {rates[name]:9.0f} {ratio:9.2f} {accepted:20.2f}", flush=True)


def main() -> None:
    """Read the flags and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-checkpoint", help="a Hugging Face folder; by default a model is made up")
    parser.add_argument("--layers", type=int, default=12, help="of the model that is made up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,8,32", help="requests at once")
    parser.add_argument("--replaced", default="0,0.2,0.5", help="shares of tokens in which earlier responses differ")
    parser.add_argument("--length", type=int, default=128, help="tokens of a response")
    parser.add_argument("--steps", type=int, default=4, help="drafts of a request in a step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.hf_checkpoint:
            write_model(pathlib.Path(folder), args.layers)
        asyncio.run(compare(args, args.hf_checkpoint or folder))


if __name__ == "__main__":
    main()
