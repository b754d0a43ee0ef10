"""What can be checked on this machine before anything starts: files, functions, ports, devices."""

from __future__ import annotations

import json
import os
import pathlib
import re
import socket
from collections.abc import Callable, Iterator

from miles.config.catalog import catalog
from miles.config.device import visible_gpus
from miles.config.dotted_path import why_not_importable
from miles.config.faults import Fault
from miles.config.job import JobConfig

_SLICE = re.compile(r"@\[-?\d*:-?\d*\]$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def check_environment(config: JobConfig) -> list[Fault]:
    """Every fault of the configuration on this machine. Opens files and tries ports; starts and writes nothing."""
    return [fault for each in _CHECKS for fault in each(config)]


def _models(config: JobConfig) -> Iterator[Fault]:
    model = config.rollout.hf_checkpoint
    assert model is not None, "a rule requires it"
    yield from _model_folder("hf_checkpoint", model)
    if config.checkpoint.ref_load not in (None, model):
        yield from _model_folder("ref_load", config.checkpoint.ref_load or "")
    if config.data.apply_chat_template and config.data.chat_template_path is None and os.path.isdir(model):
        yield from _chat_template(pathlib.Path(model))


def _model_folder(key: str, path: str) -> Iterator[Fault]:
    folder = pathlib.Path(path)
    if not folder.is_dir():
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
    if not settings.is_file() or "chat_template" not in _read_json(settings):
        problem = f"the tokenizer in {folder} has no chat template"
        yield Fault("apply_chat_template", True, problem, "set chat_template_path, or leave it out")


def _read_json(path: pathlib.Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _data_files(config: JobConfig) -> Iterator[Fault]:
    data, evaluation = config.data, config.eval
    if data.prompt_data:
        yield from _data_file("prompt_data", data.prompt_data, data.input_key, data.label_key)
    for path in evaluation.datasets.values():
        yield from _data_file("eval_prompt_data", path, evaluation.eval_input_key, evaluation.eval_label_key)
    if data.chat_template_path and not os.path.isfile(data.chat_template_path):
        yield Fault("chat_template_path", data.chat_template_path, "there is no such file", "give a Jinja file")


def _data_file(key: str, spec: str, input_key: str, label_key: str | None) -> Iterator[Fault]:
    path = pathlib.Path(_SLICE.sub("", spec))
    if not path.is_file():
        yield Fault(key, spec, "there is no such file", "give a JSONL or Parquet file")
        return
    if path.suffix != ".jsonl":
        return
    with path.open("rb") as file:
        first = file.readline().strip()
    try:
        row = json.loads(first)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        yield Fault(key, spec, "its first line is not a JSON object", "write one JSON object a line")
        return
    prefix, columns = "eval_" if key == "eval_prompt_data" else "", ", ".join(sorted(row))
    for name, column in (("input_key", input_key), ("label_key", label_key)):
        if column is not None and column not in row:
            yield Fault(prefix + name, column, f"{path} has no such column", f"set it to one of {columns}")


def _folders(config: JobConfig) -> Iterator[Fault]:
    load = config.checkpoint.load
    if load is not None and not os.path.isdir(load):
        yield Fault("load", load, "there is no such folder", "give a folder of checkpoints, or leave it out")
    paths = {"run_dir": config.services.run_dir, "save": config.checkpoint.save, "save_hf": config.checkpoint.save_hf}
    for key, path in paths.items():
        if path is not None:
            existing = next(
                p for p in (pathlib.Path(path).absolute(), *pathlib.Path(path).absolute().parents) if p.exists()
            )
            if not existing.is_dir():
                yield Fault(key, path, f"{existing} is not a folder", "choose another place")
            elif not os.access(existing, os.W_OK | os.X_OK):
                yield Fault(key, path, f"{existing} is not writable", "choose another place")


def _functions(config: JobConfig) -> Iterator[Fault]:
    flat = config.to_flat()
    for key, entry in catalog().items():
        if entry.dotted_path and flat[key] is not None:
            problem = why_not_importable(flat[key])
            if problem is not None:
                yield Fault(key, flat[key], problem, "check the name, and that its folder is on PYTHONPATH")


def _ports(config: JobConfig) -> Iterator[Fault]:
    services = config.services
    try:
        socket.getaddrinfo(services.host, None)
    except OSError:
        yield Fault("host", services.host, "it cannot be resolved", "give a name or address of this machine")
        return
    workers = range(config.cluster.rollout_num_workers) if services.rollout_port else ()
    wanted = [("rollout_port", services.rollout_port + i) for i in workers]
    wanted += [
        (key, getattr(services, key)) for key in ("controller_port", "weightsync_port", "trainer_port", "reward_port")
    ]
    for key, port in wanted:
        if port and (problem := _why_not_bindable(services.host, port)):
            yield Fault(key, port, problem, "choose another one, or 0 for any free one")


def _why_not_bindable(host: str, port: int) -> str | None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free to a server
        try:
            probe.bind(address)
        except OSError as error:
            return f"{host}:{port} cannot be listened on ({error.strerror})"
    return None


def _devices(config: JobConfig) -> Iterator[Fault]:
    cluster, gpus = config.cluster, visible_gpus()
    if cluster.actor_num_nodes > 1:
        problem = "one machine starts the trainer's processes of one node"
        yield Fault("actor_num_nodes", cluster.actor_num_nodes, problem, "set it to 1")
    if config.services.device != "cuda":
        return
    if not gpus:
        yield Fault("device", "cuda", "this machine has no GPU to use", "set it to cpu, or check CUDA_VISIBLE_DEVICES")
    elif (wanted := cluster.actor_num_gpus_per_node or 8) > gpus:
        yield Fault("actor_num_gpus_per_node", wanted, f"this machine has {gpus}", f"set it to at most {gpus}")


_CHECKS: tuple[Callable[[JobConfig], Iterator[Fault]], ...] = (
    _models,
    _data_files,
    _folders,
    _functions,
    _ports,
    _devices,
)
