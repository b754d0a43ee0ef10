"""Peak memory and time of a loss over a large vocabulary: log-prob and entropy of every token, forward and backward.

    python -m benchmarks.loss_memory                 # a size that fits this machine
    python -m benchmarks.loss_memory --full          # 32,768 tokens, a vocabulary of 151,936, 4,096 hidden units
    python -m benchmarks.loss_memory --device cuda --dtype bfloat16 --full

Every form begins with hidden states and the head's weight and ends with the gradients of both:

    naive      logits, upcast to float32, divided by the temperature, log-softmax, gather
    chunked    logits, then `token_log_probs`
    overwrite  the same, the gradient taking the memory of the logits
    hidden     `linear_token_log_probs`: the logits never exist in full

Each runs in a process of its own. Memory is what the form holds at its peak beside its inputs, their gradients
included: resident memory on the CPU, allocated memory on a GPU. "copies" counts it in float32 copies of the logits.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from miles.algorithms import TokenLogProbs, linear_token_log_probs, token_log_probs

TEMPERATURE = 0.8
FULL_SIZE = {"tokens": 32768, "vocab": 151936, "hidden": 4096}
NAIVE_COPIES = 5
"""Full-size float32 tensors the naive form holds at its peak, roughly; only to choose a default size."""
CPU_TOKENS = 1024
"""The default on a CPU takes no longer than a coffee."""

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], TokenLogProbs]


def naive(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, tokens_T: torch.Tensor) -> TokenLogProbs:
    """The textbook form."""
    log_p_TV = torch.log_softmax((hidden_TD @ weight_VD.t()).float() / TEMPERATURE, dim=-1)
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)
    return TokenLogProbs(log_p_TV.gather(-1, tokens_T[:, None]).squeeze(-1), entropy_T)


def chunked(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, tokens_T: torch.Tensor) -> TokenLogProbs:
    """Full logits, chunked softmax."""
    return token_log_probs(hidden_TD @ weight_VD.t(), tokens_T, temperature=TEMPERATURE, with_entropy=True)


def overwrite(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, tokens_T: torch.Tensor) -> TokenLogProbs:
    """Full logits, whose memory the gradient takes."""
    logits_TV = hidden_TD @ weight_VD.t()
    return token_log_probs(logits_TV, tokens_T, temperature=TEMPERATURE, with_entropy=True, overwrite_logits=True)


def hidden(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, tokens_T: torch.Tensor) -> TokenLogProbs:
    """No full logits."""
    return linear_token_log_probs(hidden_TD, weight_VD, tokens_T, temperature=TEMPERATURE, with_entropy=True)


FORMS: dict[str, Form] = {"naive": naive, "chunked": chunked, "overwrite": overwrite, "hidden": hidden}


def step(form: Form, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, tokens_T: torch.Tensor) -> float:
    """Forward and backward of -mean(log-prob) - 0.01 mean(entropy); the loss."""
    scored = form(hidden_TD, weight_VD, tokens_T)
    assert scored.entropy_T is not None
    loss = -scored.log_probs_T.mean() - 0.01 * scored.entropy_T.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def reset_peak(device: str) -> int:
    """Forget the peak so far; bytes in use now."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak(device: str) -> int:
    """Most bytes in use since `reset_peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; measuring on the CPU needs Linux")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Run one form in this process."""
    form, device, dtype = FORMS[options.measure], options.device, getattr(torch, options.dtype)
    torch.manual_seed(0)
    small = (torch.randn(32, options.hidden), torch.randn(256, options.hidden), torch.zeros(32, dtype=torch.long))
    step(
        form,
        *(x.to(device, dtype if x.is_floating_point() else None).requires_grad_(x.is_floating_point()) for x in small),
    )
    hidden_TD = torch.randn(options.tokens, options.hidden).to(device, dtype).requires_grad_()
    weight_VD = (0.02 * torch.randn(options.vocab, options.hidden)).to(device, dtype).requires_grad_()
    tokens_T = torch.randint(0, options.vocab, (options.tokens,)).to(device)
    before = reset_peak(device)
    start = time.perf_counter()
    loss = step(form, hidden_TD, weight_VD, tokens_T)
    most = peak(device)
    return {"seconds": time.perf_counter() - start, "bytes": most - before, "loss": loss}


def run(form: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one form in a process of its own; {"error": reason} if it did not fit."""
    command = [sys.executable, "-m", "benchmarks.loss_memory", "--measure", form]
    for name in ("tokens", "vocab", "hidden", "dtype", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).resolve().parent.parent)
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    if "OutOfMemoryError" in done.stderr or done.returncode < 0:
        return {"error": "out of memory"}
    raise RuntimeError(f"form {form} failed:\n{done.stderr}")


def available_bytes(device: str) -> int:
    """Free memory."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def parse() -> argparse.Namespace:
    """Flags, with sizes filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the full size")
    parser.add_argument("--tokens", type=int, help="rows (default: what fits)")
    parser.add_argument("--vocab", type=int, default=FULL_SIZE["vocab"])
    parser.add_argument("--hidden", type=int, help="hidden size (default 256 on a CPU, 4096 on a GPU)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of hidden states and head")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--measure", choices=list(FORMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.full:
        options.tokens, options.hidden = FULL_SIZE["tokens"], FULL_SIZE["hidden"]
    if options.hidden is None:
        options.hidden = 256 if options.device == "cpu" else FULL_SIZE["hidden"]
    if options.tokens is None:
        fits = int(available_bytes(options.device) * 0.5 / (NAIVE_COPIES * 4 * options.vocab))
        options.tokens = max(16, min(fits, CPU_TOKENS if options.device == "cpu" else FULL_SIZE["tokens"]))
    return options


def main() -> None:
    """Print the table."""
    options = parse()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    copy = options.tokens * options.vocab * 4
    gradients = (options.tokens + options.vocab) * options.hidden * getattr(torch, options.dtype).itemsize
    print(
        f"{options.tokens} tokens, vocabulary {options.vocab}, hidden {options.hidden}, {options.dtype}, "
        f"on {options.device}; the logits in float32 are {copy / 2**30:.2f} GiB,\n"
        f"and the gradients of hidden states and head, which every form ends with, {gradients / 2**30:.2f} GiB"
    )
    print(f"{'form':<10} {'peak GiB':>9} {'copies':>7} {'seconds':>8} {'loss':>11}")
    for form in options.forms:
        result = run(form, options)
        if "error" in result:
            print(f"{form:<10} {result['error']}")
            continue
        print(
            f"{form:<10} {result['bytes'] / 2**30:9.2f} {result['bytes'] / copy:7.2f} "
            f"{result['seconds']:8.2f} {result['loss']:11.6f}"
        )


if __name__ == "__main__":
    main()
