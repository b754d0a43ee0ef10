"""Sets up what the generate function of a job needs: its thread, its endpoint, and its `args`."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from miles.extensions.arguments import args_of
from miles.extensions.samples import renderer_of
from miles.services.rollout.engines.sglang.requests.continuation import read_end_tokens
from miles.services.rollout.functions.endpoint import GenerateEndpoint
from miles.services.rollout.functions.function_thread import FunctionThread
from miles.services.rollout.functions.generate_function import load_generate_function
from miles.services.rollout.functions.payload import TextTools
from miles.services.rollout.functions.sampler import FunctionTools
from miles.services.rollout.groups.response_text import text_decoder

if TYPE_CHECKING:
    from miles.config import JobConfig


@contextlib.asynccontextmanager
async def generate_by_function(
    config: JobConfig, tokenizer: Any, version: Callable[[], int]
) -> AsyncIterator[FunctionTools]:
    """Load the job's generate function and serve its requests inside the block. Raises ExtensionError."""
    extensions, checkpoint = config.extensions, str(config.rollout.hf_checkpoint)
    name = str(extensions.custom_generate_function_path)
    function = load_generate_function(name)
    endpoint = GenerateEndpoint(
        TextTools(
            encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
            decode=text_decoder(tokenizer),
            end_tokens=frozenset(read_end_tokens(checkpoint)),
            longest=_longest(checkpoint, config.rollout.rollout_max_context_len),
        )
    )
    thread = FunctionThread()
    try:
        async with endpoint.serving():
            yield FunctionTools(
                name=name,
                function=function,
                thread=thread,
                endpoint=endpoint,
                settings=vars(args_of(config.to_flat())),
                render=renderer_of(config, tokenizer),
                timeout_s=extensions.custom_generate_timeout_s,
                version=version,
            )
    finally:
        await thread.close()


def _longest(checkpoint: str, wanted: int | None) -> int | None:
    """Return the most tokens that prompt and response may have together, by the settings and the model's positions."""
    model = json.loads((pathlib.Path(checkpoint) / "config.json").read_text())
    positions = model.get("max_position_embeddings") or model.get("text_config", {}).get("max_position_embeddings")
    return min((limit for limit in (wanted, positions) if limit is not None), default=None)
