"""Inference engines: weights and KV cache on each of their GPUs."""

from __future__ import annotations

from miles.memory.amount import Part, When, number, size
from miles.memory.held import Held, held
from miles.memory.model import ModelShape
from miles.memory.parameters import key_value_elements
from miles.memory.run import Run
from miles.memory.tensors import mtp_tensors

_MIB = 1 << 20
_SGLANG_SIZES = (
    (20 << 10, 2048, 8, 8),
    (35 << 10, 4096, 48, 160),
    (60 << 10, 4096, 32, 160),
    (160 << 10, 8192, 256, 512),
)
"""MiB below which a GPU has these, of SGLang 0.5.21: tokens of a prefill chunk, and requests of the largest decoding
graph with fewer than 4 GPUs and with more (arg_groups/memory_hook.py)."""
_SGLANG_LARGEST = (16384, 512, 512)


def engine_parts(run: Run, gpu_bytes: int | None = None, resident: int = 0) -> list[Part]:
    """Return what an engine takes on each of its GPUs.

    Args:
        run: what is asked for.
        gpu_bytes: memory of a GPU; None when it is not known, or there is none.
        resident: bytes of it that a trainer on the same GPU keeps all the time.
    """
    return _sglang(run, gpu_bytes, resident) if run.settings.rollout_backend == "sglang" else _torch(run)


def weights_part(run: Run) -> Part:
    """Return the weights on one of an engine's GPUs: SGLang splits all of them over its tensor-parallel ranks.

    The torch engine keeps quantised matrices as they came, beside what it computes with.
    """
    sglang = run.settings.rollout_backend == "sglang"
    gpus = run.settings.rollout_num_gpus_per_engine if sglang else 1
    weights = run.published
    formula, count = weights.formula, weights.bytes
    if weights.covered and not sglang:  # which computes with the matrices that the parts stand for
        formula = f"{formula} + {number(weights.covered)} dequantised × {run.engine_bytes} bytes"
        count += weights.covered * run.engine_bytes
    if (draft := _draft(run)) is not None:
        formula, count = f"{formula}, and MTP layers: {draft.formula}", count + draft.bytes
    divided = "" if gpus == 1 else f" / {gpus} GPUs of a server"
    formula = f"({formula}){divided}" if divided and "+" in formula else f"{formula}{divided}"
    when = When.GENERATING if run.settings.offload_rollout else When.ALWAYS
    return Part("engine weights", count // gpus, formula, when)


def static_fraction(run: Run, gpu_bytes: int) -> float:
    """Return SGLang's mem_fraction_static: weights and KV cache in a GPU's memory; the rest is for its work."""
    args = run.settings.sglang_args
    if args.get("mem_fraction_static") is not None:
        return float(args["mem_fraction_static"])
    total, gpus = gpu_bytes // _MIB, run.settings.rollout_num_gpus_per_engine
    found = next((sizes[1:] for sizes in _SGLANG_SIZES if total < sizes[0]), _SGLANG_LARGEST)
    chunk, batch = found[0], found[1] if gpus < 4 else found[2]
    reserved = 512 + 1.5 * max(2048, int(args.get("chunked_prefill_size") or chunk)) + 128 * gpus + 2 * batch
    if total > 60 << 10:
        reserved = max(reserved, 10 << 10)
    return float(max(0.0, round(1 - reserved / total, 3)))


def _draft(run: Run) -> Held | None:
    """Return MTP layers that an engine drafts with."""
    shape, args = run.policy.shape, run.settings.sglang_args
    algorithm = str(args.get("speculative_algorithm") or "").upper()
    own = args.get("speculative_draft_model_path") is not None
    if shape is None or own or algorithm not in ("EAGLE", "NEXTN"):
        return None
    layers = (tensor for number in range(shape.mtp_layers) for tensor in mtp_tensors(shape, number))
    return held(layers, run.serving, run.engine_bytes)


def _sglang(run: Run, gpu_bytes: int | None, resident: int) -> list[Part]:
    weights = weights_part(run)
    if gpu_bytes is None:
        return [weights]
    fraction = static_fraction(run, gpu_bytes)
    free = max(0, gpu_bytes - resident)
    static = int(fraction * free)
    cache = max(0, static - weights.bytes)
    tokens = ""
    if run.policy.shape is not None and cache:
        gpus = run.settings.rollout_num_gpus_per_engine
        each = _cache_bytes(run.policy.shape, _cache_element(run), gpus)
        tokens = f": {number(cache / each)} tokens of {each} bytes"
    room = size(free) + (" beside the trainer" if resident else "")
    formula = f"mem_fraction_static {fraction:g} × {room} − weights{tokens}"
    rest = f"activations and graphs: (1 − mem_fraction_static {fraction:g}) × {room}"
    return [
        weights,
        Part("KV cache", cache, formula, weights.when),
        Part("engine's work", free - static, rest, When.GENERATING),
    ]


def _cache_element(run: Run) -> int:
    """Return the bytes of a key's element in SGLang's cache."""
    return 1 if str(run.settings.sglang_args.get("kv_cache_dtype") or "").startswith("fp8") else run.engine_bytes


def _cache_bytes(shape: ModelShape, each: int, gpus: int) -> int:
    elements = key_value_elements(shape)
    return each * (elements if shape.latent is not None else elements // min(gpus, shape.key_value_heads))


def _torch(run: Run) -> list[Part]:
    weights, shape, s = weights_part(run), run.policy.shape, run.settings
    if shape is None:
        return [weights]
    elements, requests = key_value_elements(shape), s.max_running_requests or 64
    if shape.latent is not None:  # this engine keeps keys and values of every head
        latent = shape.latent
        elements = shape.layers * shape.heads * (latent.nope_dim + latent.rope_dim + latent.value_dim)
    positions = -(-run.longest // 64) * 64
    count = requests * positions * elements * run.engine_bytes
    formula = (
        f"at most {requests} requests × {positions} positions × {number(elements)} elements × {run.engine_bytes} bytes"
    )
    return [weights, Part("KV cache", count, formula, weights.when)]
