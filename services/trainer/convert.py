"""`miles convert`: weights between Hugging Face folders and torch_dist checkpoints, Megatron-LM's among them.

    miles convert hf-to-hf --hf-checkpoint MODEL --save MODEL2      a text model whose weights are not quantised
    miles convert hf-to-fp8 --hf-checkpoint MODEL --save MODEL2     its matrices in blocks of FP8
    miles convert hf-to-int4 --hf-checkpoint MODEL --save MODEL2    its experts in groups of INT4
    miles convert new-draft --hf-checkpoint MODEL --save HEAD       an EAGLE-3 head for it, from nothing
    miles convert verify --hf-checkpoint MODEL --quantised MODEL2   whether that is what MODEL becomes, bit for bit
    miles convert hf-to-dist --hf-checkpoint MODEL --save DIR       then --load DIR starts a job from it
    miles convert dist-to-hf --hf-checkpoint MODEL --load DIR --save MODEL2

The last two run in one process or under torchrun, which splits the model for conversion by the sizes given; what is
written does not depend on them.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles.config.checks.json_file import read_json_object
from miles.config.checks.published_form import why_not_read
from miles.megatron_checkpoint import is_foreign, tensors_of
from miles.ownership.contents import names_in
from miles.services.trainer.convert_folders import BETWEEN_FOLDERS, add_folder_conversions, convert_folder, verify

if TYPE_CHECKING:
    from miles.config import JobConfig
    from miles.services.trainer.backends.megatron.model.build_model import MegatronModel

_SIZES = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "expert-model-parallel-size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.direction == "verify":
        return verify(options)
    import torch.distributed as dist

    from miles.services.trainer.ranks.process_group import join

    options.save = options.save.resolve()
    try:
        require_empty(options.save)  # on every rank before the first one can write
        require_empty(_partial(options.save))
        if options.direction not in BETWEEN_FOLDERS:
            require_readable(options.hf_checkpoint)
    except ValueError as error:
        print(f"miles convert: {error}", file=sys.stderr)
        return 1
    if options.direction in BETWEEN_FOLDERS:
        return convert_folder(options, _partial(options.save))
    join(options.device, None, 30)
    try:
        if options.direction == "hf-to-dist":
            hf_to_dist(_job_config(options), options.save)
        else:
            dist_to_hf(_job_config(options), options.load, options.save, options.chat_template_path)
    except (OSError, ValueError) as error:
        print(f"miles convert: {error}", file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


def hf_to_dist(config: JobConfig, directory: pathlib.Path) -> None:
    """Write the model's weights as a checkpoint of step 0 below `directory`; collective."""
    from miles.checkpoint_folder import folder_name
    from miles.services.trainer.backends.megatron.checkpoint import torch_dist
    from miles.services.trainer.checkpoint.record import CheckpointRecord
    from miles.services.trainer.checkpoint.state import TrainerState

    model = _model(config)
    record = CheckpointRecord(state=TrainerState(), iteration=0, world_size=1, settings={})
    contents = torch_dist.Contents(model=model, optimizer=None, reference=None)
    torch_dist.save(directory / folder_name(0), contents, record)


def dist_to_hf(
    config: JobConfig, source: pathlib.Path, directory: pathlib.Path, chat_template: pathlib.Path | None = None
) -> None:
    """Write a checkpoint's weights as a Hugging Face folder; `source` is one or a folder of them; collective.

    Tensors of the model's folder that are not converted, e.g. MTP layers, are copied. Without `chat_template` it is
    that of the run, as the checkpoint records it.
    """
    from miles.services.trainer.backends.megatron.checkpoint.weights_only import load_weights
    from miles.services.trainer.backends.megatron.export import Exporter
    from miles.services.trainer.checkpoint.background_save import on_first_rank
    from miles.services.trainer.checkpoint.errors import writing
    from miles.services.trainer.checkpoint.hf_files import write_hf_checkpoint
    from miles.services.trainer.checkpoint.record import read_record
    from miles.services.trainer.step import algorithm_options
    from miles.weights.naming.model_tensors import read_model_tensors

    checkpoint = _checkpoint(source)
    recorded = {} if is_foreign(checkpoint) else read_record(checkpoint).settings
    template = chat_template or _recorded_template(recorded)
    model = _model(config)
    load_weights(checkpoint, model.bare_chunks)
    out_type = algorithm_options.DTYPES[config.rollout.rollout_dtype]
    source_folder = pathlib.Path(str(config.rollout.hf_checkpoint))
    tensors = read_model_tensors(source_folder)
    exporter = Exporter(model, tensors, out_type)
    partial = _partial(directory)
    with writing(directory, partial):
        write_hf_checkpoint(partial, source_folder, tensors, exporter.tensors(), out_type, chat_template=template)
        on_first_rank(functools.partial(os.rename, partial, directory))


def _checkpoint(source: pathlib.Path) -> pathlib.Path:
    """The folder of tensors that `source` names: one of Megatron-LM, or the newest of the megatron backend."""
    from miles.checkpoint_folder import to_load

    if is_foreign(source) and (tensors := tensors_of(source)) is not None:
        return tensors
    found = to_load(source)
    assert found.checkpoint is not None, "to_load raises"
    if found.passed_over:
        print(f"passed over {found.words()}", file=sys.stderr)
    if tensors_of(found.checkpoint) is None:
        problem = f"{found.checkpoint} was saved with train_backend fsdp"
        raise ValueError(f"{problem}; use the export that its run wrote (save_hf)")
    return found.checkpoint


def _recorded_template(settings: Mapping[str, Any]) -> pathlib.Path | None:
    """The Jinja file that a checkpoint's run rendered prompts with; None for the tokenizer's own template."""
    path = settings.get("chat_template_path")
    if path is not None and not pathlib.Path(path).expanduser().is_file():
        raise FileNotFoundError(
            f"the checkpoint was trained with chat_template_path = {path}, which is not there; give the file as "
            "--chat-template-path"
        )
    return None if path is None else pathlib.Path(path)


def require_empty(directory: pathlib.Path) -> None:
    """Raise ValueError unless a conversion can be written to a folder without touching what is there."""
    if directory.exists() and (not directory.is_dir() or names_in(directory)):
        raise ValueError(f"{directory} exists already; give a folder that is empty or does not exist yet, or remove it")


def require_readable(folder: pathlib.Path) -> None:
    """Raise ValueError for a model that cannot be trained in the form in which it was published."""
    problem = why_not_read(read_json_object(folder / "config.json"))
    if problem is not None:
        raise ValueError(f"{folder} cannot be converted: {problem}")


def _partial(directory: pathlib.Path) -> pathlib.Path:
    """Where a folder is written before it gets its name."""
    return directory.with_name(f".{directory.name}.miles-partial")


def _model(config: JobConfig) -> MegatronModel:
    from miles.services.trainer.backends.megatron.model.build_model import build_model
    from miles.services.trainer.backends.megatron.parallel import groups
    from miles.services.trainer.step import algorithm_options

    dtype = algorithm_options.DTYPES[config.train.train_dtype]
    parallel = groups.initialize(config)
    return build_model(config, parallel, dtype, wrap=False)


def _job_config(options: argparse.Namespace) -> JobConfig:
    """The part of a job's configuration that conversion reads, as a complete one."""
    import torch.distributed as dist

    from miles.config import JobConfig

    layers = {} if options.mtp_num_layers is None else {"mtp_num_layers": options.mtp_num_layers}
    sizes = {name.replace("-", "_"): getattr(options, name.replace("-", "_")) for name in _SIZES}
    return JobConfig.from_flat(
        {
            "hf_checkpoint": str(options.hf_checkpoint),
            "prompt_data": "none.jsonl",
            "rm_type": "exact_match",
            "label_key": "label",
            "num_rollout": 1,
            "rollout_batch_size": dist.get_world_size(),
            "rollout_max_response_len": 1,
            "n_samples_per_prompt": 2,
            "train_backend": "megatron",
            "train_dtype": options.dtype,
            "rollout_dtype": options.dtype,
            "device": options.device,
            "actor_num_gpus_per_node": dist.get_world_size(),
            "sequence_parallel": sizes["tensor_model_parallel_size"] > 1,
            **sizes,
            **layers,
        }
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles convert", description="Weights of models in other forms.")
    directions = parser.add_subparsers(dest="direction", required=True)
    plain = directions.add_parser("hf-to-hf", help="text model of a folder, its weights not quantised, to another")
    quantised = add_folder_conversions(directions)
    to_dist = directions.add_parser("hf-to-dist", help="Hugging Face folder to a checkpoint that `load` takes")
    to_hf = directions.add_parser("dist-to-hf", help="torch_dist checkpoint to a Hugging Face folder")
    to_hf.add_argument("--load", type=pathlib.Path, required=True, metavar="DIR", help="checkpoint, or folder of them")
    to_hf.add_argument(
        "--chat-template-path", type=pathlib.Path, metavar="FILE", help="chat template (default: that of the run)"
    )
    for each in (plain, *quantised, to_dist, to_hf):
        each.add_argument(
            "--hf-checkpoint", type=pathlib.Path, required=True, metavar="DIR", help="model, with config and tokenizer"
        )
        each.add_argument("--save", type=pathlib.Path, required=True, metavar="DIR", help="where to write")
        each.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="type of the weights")
    for each in (to_dist, to_hf):
        each.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to convert")
        help_mtp = "number of the model's MTP (multi-token prediction) layers, to be converted too"
        each.add_argument("--mtp-num-layers", type=int, metavar="N", help=help_mtp)
        for name in _SIZES:
            each.add_argument(f"--{name}", type=int, default=1, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
