"""What the servers of an engine start from, made for as long as they live."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from miles.services.rollout.engines.sglang.options import SglangOptions
from miles.services.rollout.engines.sglang.server.served_model import (
    ServedModel,
    needs_own_folder,
    served_quantisation,
    write_folder,
)
from miles.services.rollout.engines.sglang.weights.layout import ModelLayout


def model_to_serve(options: SglangOptions, layout: ModelLayout, files: contextlib.ExitStack) -> ServedModel:
    """The checkpoint, or a folder that describes its model as it is served, which goes when `files` are closed."""
    folder, recipe, positions = options.hf_checkpoint, options.recipe, layout.max_positions
    if options.addresses or not needs_own_folder(folder, recipe):
        return ServedModel(folder, positions)
    if options.log_dir is not None:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    own = files.enter_context(tempfile.TemporaryDirectory(prefix=f"{options.name}-model-", dir=options.log_dir))
    quantisation = None if recipe is None else served_quantisation(recipe, layout.shapes)
    write_folder(Path(own), folder, quantisation)
    return ServedModel(own, positions, has_weights=False)
