"""Checks of a configuration on this machine: files, functions, ports, devices."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterator

from miles.config.checks.device import visible_gpus
from miles.config.checks.dotted_path import why_not_importable
from miles.config.checks.engine_model import engine_faults
from miles.config.checks.json_file import read_json_object
from miles.config.checks.model_layout import layout_faults, shape_differences
from miles.config.job import JobConfig
from miles.config.rules.registry import Rule, run_rules
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def check_environment(config: JobConfig) -> list[Fault]:
    """Return every fault of a configuration on this machine. Opens files and tries ports, but writes nothing."""
    flat = config.to_flat()
    return environment_faults(FlatSettings(flat, given=flat, invalid=()))


def environment_faults(settings: FlatSettings) -> list[Fault]:
    """Do the same for settings that may have other faults."""
    return run_rules(_CHECKS, settings)


def file_faults(settings: FlatSettings) -> list[Fault]:
    """Check files and functions only: what matters for a job on services that are already running."""
    return run_rules(_FILE_CHECKS, settings)


def deployment_faults(settings: FlatSettings) -> list[Fault]:
    """Check access, ports and devices only: what matters before there is a job."""
    return run_rules(_DEPLOYMENT_CHECKS, settings)


def _models(s: FlatSettings) -> Iterator[Fault]:
    if not s.hf_checkpoint:
        return  # a rule reports it
    yield from _model_folder("hf_checkpoint", s.hf_checkpoint)
    for key in ("ref_load", "critic_load", "opd_teacher_load"):
        folder = getattr(s, key)
        if folder in (None, s.hf_checkpoint):
            continue
        yield from _model_folder(key, folder)
        critic = key == "critic_load"
        with_mtp = s.mtp_num_layers is not None and not critic
        differences = shape_differences(s.hf_checkpoint, folder, with_head=not critic, with_mtp=with_mtp)
        if s.train_backend == "megatron" and differences:
            problem = f"train_backend = megatron holds it in the shape of hf_checkpoint, and {differences[0]}"
            yield Fault(key, folder, problem, "give a model of that shape, or train with fsdp")
    if s.apply_chat_template and s.chat_template_path is None and os.path.isdir(s.hf_checkpoint):
        yield from _chat_template(pathlib.Path(s.hf_checkpoint))


def _adapter(s: FlatSettings) -> Iterator[Fault]:
    if s.lora_adapter_path is None:
        return
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (pathlib.Path(s.lora_adapter_path) / name).is_file():
            problem = f"{name} is missing in it"
            yield Fault("lora_adapter_path", s.lora_adapter_path, problem, "give a folder that PEFT saved")
            return


def _model_folder(key: str, path: str) -> Iterator[Fault]:
    folder = pathlib.Path(path)
    if not folder.is_dir():
        name_on_hub = path.removeprefix("https://huggingface.co/").rstrip("/")
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name_on_hub):  # a relative path, or a model of the hub
            problem = "there is no such folder, and models of the Hugging Face hub are not fetched"
            name = folder.name
            remedy = f"check the path, or `hf download {name_on_hub} --local-dir {name}` and give {name}"
            yield Fault(key, path, problem, remedy)
            return
        yield Fault(key, path, "there is no such folder", "give a folder with a Hugging Face checkpoint")
        return
    if not (folder / "config.json").is_file():
        yield Fault(key, path, "config.json is missing in it", "give a complete Hugging Face checkpoint")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        yield Fault(key, path, "there are no weights in it (*.safetensors)", "give a complete Hugging Face checkpoint")
    if key == "hf_checkpoint" and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        yield Fault(key, path, "there is no tokenizer in it (tokenizer.json)", "save the tokenizer there too")


def _chat_template(folder: pathlib.Path) -> Iterator[Fault]:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or "chat_template" not in read_json_object(settings):
        problem = f"the tokenizer in {folder} has no chat template"
        yield Fault("apply_chat_template", True, problem, "set chat_template_path, or leave it out")


def _data_files(s: FlatSettings) -> Iterator[Fault]:
    if s.prompt_data:
        yield from _data_file("prompt_data", s.prompt_data, s.input_key, s.label_key)
    for path in (s.eval_prompt_data or ())[1::2]:
        yield from _data_file("eval_prompt_data", path, s.eval_input_key, s.eval_label_key)
    if s.chat_template_path and not os.path.isfile(s.chat_template_path):
        yield Fault("chat_template_path", s.chat_template_path, "there is no such file", "give a Jinja file")


def _data_file(key: str, spec: str, input_key: str, label_key: str | None) -> Iterator[Fault]:
    from miles.data import DataError, parse_file_slice

    try:
        path = parse_file_slice(spec).path
    except DataError:
        yield Fault(key, spec, "its slice is malformed", "write FILE@[start:end]")
        return
    if path.suffix.lower() not in _DATA_SUFFIXES:
        yield Fault(key, spec, "its type is not known", f"give a file that ends in {' or '.join(_DATA_SUFFIXES)}")
    elif not path.is_file():
        yield Fault(key, spec, "there is no such file", "give a JSONL or Parquet file")
    elif path.suffix.lower() != ".parquet":
        yield from _columns(key, path, input_key, label_key)


def _columns(key: str, path: pathlib.Path, input_key: str, label_key: str | None) -> Iterator[Fault]:
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    row = None
    with contextlib.suppress(ValueError):
        row = json.loads(first)
    if not isinstance(row, dict):
        yield Fault(key, str(path), "its first line is not a JSON object", "write one JSON object a line")
        return
    prefix, columns = "eval_" if key == "eval_prompt_data" else "", ", ".join(sorted(row))
    for name, column in (("input_key", input_key), ("label_key", label_key)):
        if column is not None and column not in row:
            yield Fault(prefix + name, column, f"{path} has no such column", f"set it to one of {columns}")


def _folders(s: FlatSettings) -> Iterator[Fault]:
    if s.load is not None and not os.path.isdir(s.load):
        yield Fault("load", s.load, "there is no such folder", "give a folder of checkpoints, or leave it out")
    for key in ("run_dir", "save", "save_hf"):
        path = getattr(s, key)
        if path is None:
            continue
        absolute = pathlib.Path(path).absolute()
        existing = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
        if not existing.is_dir():
            yield Fault(key, path, f"{existing} is not a folder", "choose another place")
        elif not os.access(existing, os.W_OK | os.X_OK):
            yield Fault(key, path, f"{existing} is not writable", "choose another place")


def _functions(s: FlatSettings) -> Iterator[Fault]:
    for key, entry in catalog().items():
        path = getattr(s, key)
        if entry.dotted_path is not None and path is not None and path not in entry.dotted_path.aliases:
            problem = why_not_importable(path)
            if problem is not None:
                yield Fault(key, path, problem, "check the name, and that its folder is on PYTHONPATH")


def _ports(s: FlatSettings) -> Iterator[Fault]:
    try:
        socket.getaddrinfo(s.host, None)
    except OSError:
        yield Fault("host", s.host, "it cannot be resolved", "give a name or address of this machine")
        return
    wanted = [(key, getattr(s, key)) for key in ("controller_port", "weightsync_port", "trainer_port", "reward_port")]
    if s.rollout_port:
        beyond = min(s.rollout_port + s.rollout_num_workers, 65536)
        wanted += [("rollout_port", port) for port in range(s.rollout_port, beyond)]
    for key, port in wanted:
        if port and (problem := _why_not_bindable(s.host, port)):
            yield Fault(key, port, problem, "choose another one, or 0 for any free one")
    if s.gateway and s.gateway_port and (problem := _why_not_bindable(s.gateway_host, s.gateway_port)):
        yield Fault("gateway_port", s.gateway_port, problem, "choose another one, or 0 for any free one")


def _access_files(s: FlatSettings) -> Iterator[Fault]:
    for key in ("gateway_keys_file", "tls_cert", "tls_key", "tls_ca"):
        path = getattr(s, key)
        if path is not None and not os.access(path, os.R_OK):
            yield Fault(key, path, "it cannot be read", "check the path and its permissions")
    for path in s.gateway_allowed_root:
        if not os.path.isdir(path):
            yield Fault("gateway_allowed_root", path, "there is no such folder", "give a folder")


def _why_not_bindable(host: str, port: int) -> str | None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free to a server
        try:
            probe.bind(address)
        except OSError as error:
            return f"{host}:{port} cannot be listened on ({error.strerror})"
    return None


def _devices(s: FlatSettings) -> Iterator[Fault]:
    if s.actor_num_nodes > 1:
        problem = "one machine starts the trainer's processes of one node"
        yield Fault("actor_num_nodes", s.actor_num_nodes, problem, "set it to 1")
    if s.device != "cuda":
        return
    gpus, wanted = visible_gpus(), s.actor_num_gpus_per_node or 8
    if not gpus:
        yield Fault("device", "cuda", "this machine has no GPU to use", "set it to cpu, or check CUDA_VISIBLE_DEVICES")
    elif wanted > gpus:
        yield Fault("actor_num_gpus_per_node", wanted, f"this machine has {gpus}", f"set it to at most {gpus}")


_DEPLOYMENT_CHECKS: tuple[Rule, ...] = (_access_files, _ports, _devices)
_FILE_CHECKS: tuple[Rule, ...] = (
    _models,
    _adapter,
    layout_faults,
    engine_faults,
    _data_files,
    _folders,
    _functions,
)
_CHECKS: tuple[Rule, ...] = (*_FILE_CHECKS, *_DEPLOYMENT_CHECKS)
