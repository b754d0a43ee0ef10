"""What a micro-batch takes while it is trained on: activations that the backward pass needs, and logits.

Counted per token and layer, after Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer
Models, arXiv 2205.05198), for layers with flash attention, gated MLPs and no dropout. Kernels' workspaces and what the
allocator cannot use are not in it: expect up to a third more.
"""

from __future__ import annotations

from miles.memory.amount import Part, When, number
from miles.memory.low_precision import by_kernels
from miles.memory.megatron import Layout, layout_of, stage_layers
from miles.memory.model import ModelShape
from miles.memory.run import Run

_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
"""Of logits in float32, as `miles.algorithms.log_probs` takes them at a time."""
_MOST_LOGITS = 2 << 30
"""Of larger ones fsdp computes scores chunk by chunk, where the model's head allows it."""
_CHUNK_COPIES = 3
"""Of a chunk: scaled logits, their log-softmax, and the gradient."""


def activation_parts(run: Run, stage: int = 0) -> list[Part]:
    """Return what a training pass takes on a rank of a pipeline stage; nothing when the model's shape is not known."""
    shape = run.policy.shape
    if shape is None:
        return []
    layout = layout_of(run) if run.settings.train_backend == "megatron" else Layout(ranks=run.ranks)
    parts = [_activations(run, shape, layout, stage)]
    return [*parts, *_logits(run, shape, layout)] if stage == layout.pipeline - 1 else parts


def layer_elements(
    shape: ModelShape, layer: int, layout: Layout, *, sequence_parallel: bool, norm_elements: int = 2
) -> int:
    """Return the elements that one token leaves in one layer for the backward pass, on one rank.

    `norm_elements`: what a norm of one element leaves; its input and output where it is one kernel.
    """
    hidden, tensor = shape.hidden, layout.tensor
    whole = norm_elements * shape.norms * hidden
    if (latent := shape.latent) is not None:
        whole += norm_elements * ((latent.query_rank or 0) + latent.key_value_rank) + latent.rope_dim
        split = 2 * shape.heads * (latent.nope_dim + latent.rope_dim + latent.value_dim)
    else:
        split = 2 * shape.heads * shape.head_dim + 2 * shape.key_value_heads * shape.head_dim
        if shape.query_key_norm is not None:
            split += (norm_elements - 1) * (shape.heads + shape.key_value_heads) * shape.head_dim
    experts = 0
    if layer in shape.expert_layers:
        split += 4 * shape.shared_width
        # Of this rank's part of the sequence each token goes to its experts, whose ranks all need its hidden states.
        rows = layout.expert_tensor / (tensor if sequence_parallel else 1)
        experts = int(shape.experts_per_token * rows * (2 * hidden + 4 * shape.expert_width // layout.expert_tensor))
        whole += 2 * shape.experts
    else:
        split += 4 * shape.width  # gate, up, the activation of the one, and its product with the other
    return (whole // tensor if sequence_parallel else whole) + split // tensor + experts


def rounded_elements(shape: ModelShape, layer: int, layout: Layout, *, fused: bool) -> int:
    """Return the elements that one token leaves more in one layer where rounded inputs of its matrices are multiplied.

    Each matrix keeps its own rounded inputs, in place of the input that its neighbours share; attention and routers
    keep theirs besides. `fused`: queries, keys and values are one matrix, and so are gate and up.
    """
    hidden = shape.hidden
    latent = shape.latent
    outputs = shape.heads * (shape.head_dim if latent is None else latent.value_dim) // layout.tensor
    if fused:
        return outputs
    attention = outputs + (2 * hidden if latent is None else hidden)
    if layer not in shape.expert_layers:
        return attention + hidden
    return attention + hidden + (2 * hidden if shape.shared_width else 0)


def _activations(run: Run, shape: ModelShape, layout: Layout, stage: int) -> Part:
    s, tokens = run.settings, run.micro_batch_tokens
    megatron = s.train_backend == "megatron"
    sequence = bool(megatron and s.sequence_parallel and layout.tensor > 1)
    layers = stage_layers(shape, layout, stage)
    if s.enable_mtp_training and stage == layout.pipeline - 1:  # their layers are like the last one
        layers = layers + [shape.layers - 1] * (s.mtp_num_layers or 0)
    norm = 2 if megatron or _fuses_norms(run) else 3 if run.train_bytes == 4 else 4
    elements = [
        layer_elements(shape, layer, layout, sequence_parallel=sequence, norm_elements=norm) for layer in layers
    ]
    if run.training is not None and run.training.rounds_inputs and not by_kernels(run):
        more = (rounded_elements(shape, layer, layout, fused=megatron) for layer in layers)
        elements = [own + rounded for own, rounded in zip(elements, more, strict=True)]
    flying = layout.pipeline - stage if megatron else 1
    virtual = 1 + (layout.pipeline - 1) / (layout.pipeline * layout.virtual) if layout.virtual > 1 else 1.0
    full = s.recompute_granularity == "full" if megatron else s.gradient_checkpointing
    kept = shape.hidden // (layout.tensor if sequence else 1)
    if full:
        step = (s.recompute_num_layers or 1) if megatron else 1
        most = max(elements, default=0)
        count = tokens * run.train_bytes * (flying * -(-len(layers) // step) * kept + step * most)
        what = f"inputs of {len(layers)} layers, and {step} recomputed with {number(most)} elements a token"
    else:
        count = int(tokens * run.train_bytes * flying * virtual * sum(elements))
        what = f"{number(sum(elements))} elements a token in {len(layers)} layers"
    times = "" if flying == 1 else f" × {flying} micro-batches in the pipeline"
    formula = f"{tokens} tokens ({run.micro_batch_words}) × {what} × {run.train_bytes} bytes{times}"
    return Part("activations", count, formula, When.TRAINING)


def _fuses_norms(run: Run) -> bool:
    """Return whether fsdp's norms are one kernel; others keep a float32 copy, and what is multiplied by the weight."""
    return bool(run.settings.device == "cuda" and run.ranks == 1)


def _logits(run: Run, shape: ModelShape, layout: Layout) -> list[Part]:
    s = run.settings
    tokens = max(run.micro_batch_tokens, (s.log_probs_max_tokens_per_gpu or 0) if s.use_dynamic_batch_size else 0)
    columns = -(-shape.vocabulary // layout.tensor)
    split = "" if layout.tensor == 1 else f" of {shape.vocabulary} / {layout.tensor} ranks"
    rows = s.log_probs_chunk_size if s.log_probs_chunk_size > 0 else max(1, _CHUNK_ELEMENTS[_device(run)] // columns)
    rows = min(rows, tokens)
    bounded = shape.plain_head and s.train_backend == "fsdp"
    heads = 1 + (s.mtp_num_layers or 0) * s.enable_mtp_training
    every = tokens * columns * run.train_bytes * heads
    most, bound = (_MOST_LOGITS, ", at most 2 GiB") if bounded else (every, "")
    times = f" × {heads}, with MTP layers" if heads > 1 else ""
    return [
        Part(
            "logits",
            min(every, most),
            f"at most {tokens} rows × {columns} columns{split} × {run.train_bytes} bytes{times}{bound}",
            When.TRAINING,
        ),
        Part(
            "log-probabilities",
            _CHUNK_COPIES * rows * columns * 4,
            f"a chunk of {rows} rows × {columns} × 4 bytes × {_CHUNK_COPIES}",
            When.TRAINING,
        ),
    ]


def _device(run: Run) -> str:
    return "cpu" if run.settings.device == "cpu" else "cuda"
