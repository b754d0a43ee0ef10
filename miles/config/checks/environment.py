"""Checks of a configuration on this machine: files, functions, ports, devices."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from miles.addresses import join_address, why_not_bindable, why_not_host
from miles.certificates import why_not_authorities, why_not_pair
from miles.checkpoint_folder import NoCheckpointError, newest, same_folder, to_load
from miles.config.checks.dotted_path import why_not_importable
from miles.config.checks.drafts import draft_device_faults, draft_model_faults
from miles.config.checks.gpus import gpu_faults
from miles.config.checks.json_file import read_json_object
from miles.config.checks.model import MODEL_CHECKS
from miles.config.checks.model_layout import shape_differences
from miles.config.checks.outputs import output_faults
from miles.config.checks.precision_variables import variable_faults
from miles.config.checks.rewards import reward_faults
from miles.config.checks.teacher_tokens import why_other_tokens
from miles.config.checks.trackers import tracker_faults
from miles.config.eval_sets import READ as EVAL_READ
from miles.config.eval_sets import eval_sets
from miles.config.job import JobConfig, examine
from miles.config.rules.paths import unusable_paths
from miles.config.rules.registry import Rule, run_rules
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import ConfigError, Fault, RunFault
from miles.config.schema.flat_settings import FlatSettings
from miles.config.sections.distillation import named
from miles.config.server_groups import READ, servers_of_service
from miles.megatron_checkpoint import is_foreign, tensors_of
from miles.placement.nodes import Cluster
from miles.reward_names import REWARD_KEY

SERVICE_PORTS = ("controller_port", "weightsync_port", "trainer_port", "trainer_master_port", "reward_port")
"""Settings of ports of `host`, apart from those of rollout services."""
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def check_environment(config: JobConfig) -> list[Fault]:
    """Return every fault of a configuration on this machine. Opens files and tries ports, but writes nothing."""
    return environment_faults(examine(config.to_flat()).settings)


def environment_faults(settings: FlatSettings, assumed: Cluster | None = None) -> list[Fault]:
    """Do the same for settings that may have other faults.

    This machine is no part of an assumed cluster: hosts and ports are not tried.
    """
    if assumed is None:
        return _run(_CHECKS, settings)
    return _run((*_FILE_CHECKS, functools.partial(gpu_faults, assumed=assumed)), settings)


def file_faults(settings: FlatSettings) -> list[Fault]:
    """Check files and functions only: what matters for a job on services that are already running."""
    return _run(_FILE_CHECKS, settings)


def deployment_faults(settings: FlatSettings) -> list[Fault]:
    """Check access, ports and devices only: what matters before there is a job."""
    return _run(_DEPLOYMENT_CHECKS, settings)


def _run(checks: tuple[Rule, ...], settings: FlatSettings) -> list[Fault]:
    settings.refuse(*unusable_paths(settings))  # a rule reports them, and file functions raise errors of their own
    return run_rules(checks, settings)


def _models(s: FlatSettings) -> Iterator[Fault]:
    if not s.hf_checkpoint:
        return  # a rule reports it
    yield from _model_folder("hf_checkpoint", s.hf_checkpoint)
    teachers = [("opd_teacher_load", folder) for folder in named(s.opd_teacher_load or ()).values()]
    folders: list[tuple[str, str | None]] = [("ref_load", s.ref_load), ("critic_load", s.critic_load), *teachers]
    for key, path in folders:
        if path is None or path == s.hf_checkpoint:
            continue
        try:
            if tensors_of(pathlib.Path(path), s.ref_ckpt_step if key == "ref_load" else None) is not None:
                yield from _torch_dist_faults(s, key, path)
                continue
        except NoCheckpointError as error:
            yield Fault(key, path, error.problem, error.remedy)
            continue
        yield from _model_folder(key, path)
        critic = key == "critic_load"
        with_mtp = s.mtp_num_layers is not None and not critic
        differences = shape_differences(s.hf_checkpoint, path, with_head=not critic, with_mtp=with_mtp)
        if s.train_backend == "megatron" and differences:
            problem = f"train_backend = megatron holds it in the shape of hf_checkpoint, and {differences[0]}"
            yield Fault(key, path, problem, "give a model of that shape, or train with fsdp")
        elif key == "opd_teacher_load" and (why := why_other_tokens(s.hf_checkpoint, path)) is not None:
            yield Fault(key, path, why, "give a teacher with the tokenizer of hf_checkpoint")
    if s.apply_chat_template and s.chat_template_path is None and os.path.isdir(s.hf_checkpoint):
        yield from _chat_template(pathlib.Path(s.hf_checkpoint))


def _torch_dist_faults(s: FlatSettings, key: str, folder: str) -> Iterator[Fault]:
    if s.train_backend != "megatron":
        problem = f"it is a torch_dist checkpoint, which train_backend = {s.train_backend} does not read"
        converted = f"{folder.rstrip('/')}-hf"
        command = f"`miles convert dist-to-hf --hf-checkpoint {s.hf_checkpoint} --load {folder} --save {converted}`"
        yield Fault(key, folder, problem, f"{command} and give {converted}, or train with megatron")


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
        remedy = "give a folder with a Hugging Face checkpoint"
        if key == "ref_load":
            remedy += ", or leave it out: the reference is hf_checkpoint then"
        yield Fault(key, path, "there is no such folder", remedy)
        return
    if not (folder / "config.json").is_file():
        yield Fault(key, path, "config.json is missing in it", "give a complete Hugging Face checkpoint")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        yield RunFault(
            key, path, "there are no weights in it (*.safetensors)", "give a complete Hugging Face checkpoint"
        )
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
        yield from _data_file(s, "prompt_data", s.prompt_data, s.input_key, s.label_key)
    try:
        for each in eval_sets({key: getattr(s, key) for key in EVAL_READ}):
            key = "eval_prompt_data" if s.eval_config is None else "eval_config"
            yield from _data_file(s, key, each.path, each.input_key, each.label_key, each.metadata)
    except ConfigError as error:
        yield from error.faults
    if s.chat_template_path and not os.path.isfile(s.chat_template_path):
        yield Fault("chat_template_path", s.chat_template_path, "there is no such file", "give a Jinja file")


def _server_groups(s: FlatSettings) -> Iterator[Fault]:
    try:
        servers_of_service({key: getattr(s, key) for key in READ})
    except ConfigError as error:
        yield from error.faults


def _data_file(
    s: FlatSettings,
    key: str,
    spec: str,
    input_key: str,
    label_key: str | None,
    metadata: Mapping[str, Any] | None = None,
) -> Iterator[Fault]:
    """`metadata` is what each row gets besides its own."""
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
        yield from _columns(s, key, path, input_key, label_key, metadata or {})


def _columns(
    s: FlatSettings,
    key: str,
    path: pathlib.Path,
    input_key: str,
    label_key: str | None,
    metadata: Mapping[str, Any],
) -> Iterator[Fault]:
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    row = None
    with contextlib.suppress(ValueError):
        row = json.loads(first)
    if not isinstance(row, dict):
        yield Fault(key, str(path), "its first line is not a JSON object", "write one JSON object a line")
        return
    prefix, columns = "eval_" if key.startswith("eval_") else "", ", ".join(sorted(row))
    for name, column in (("input_key", input_key), ("label_key", label_key)):
        if column is not None and column not in row:
            yield Fault(prefix + name, column, f"{path} has no such column", f"set it to one of {columns}")
    if REWARD_KEY not in metadata:
        yield from reward_faults(s, str(path), row)


def _checkpoint_to_load(s: FlatSettings) -> Iterator[Fault]:
    if s.load is None:
        return
    load, own = pathlib.Path(s.load), pathlib.Path(s.save or pathlib.Path(s.run_dir or ".") / "checkpoints")
    try:
        if s.train_backend == "megatron" and is_foreign(load):
            tensors_of(load)
        elif not _starts_afresh(load, own, s.hf_checkpoint) and newest(own).checkpoint is None:
            yield from _resumed_whole(s, to_load(load).checkpoint)
    except NoCheckpointError as error:
        yield Fault("load", s.load, error.problem, error.remedy)
    except OSError as error:
        yield Fault("load", s.load, f"it cannot be read ({error})", "check its permissions")


def _starts_afresh(load: pathlib.Path, own: pathlib.Path, hf_checkpoint: str | None) -> bool:
    return any(same_folder(load, each) for each in (own, pathlib.Path(hf_checkpoint or own)))


def _resumed_whole(s: FlatSettings, checkpoint: pathlib.Path | None) -> Iterator[Fault]:
    for key in ("finetune", "no_load_optim", "no_load_rng"):
        if getattr(s, key):
            problem = f"load holds {checkpoint}, which is resumed whole"
            yield Fault(key, True, problem, "leave it out, or start from an export (save_hf) as hf_checkpoint")


def _functions(s: FlatSettings) -> Iterator[Fault]:
    for key, entry in catalog().items():
        path = getattr(s, key)
        if entry.dotted_path is not None and path is not None and path not in entry.dotted_path.aliases:
            problem = why_not_importable(path)
            if problem is not None:
                yield Fault(key, path, problem, "check the name, and that its folder is on PYTHONPATH")


def _hosts(s: FlatSettings) -> Iterator[Fault]:
    for key in ("gateway_host", "host"):
        if not s.is_valid(key) or (key == "gateway_host" and not s.gateway):
            continue
        host = getattr(s, key)
        if why_not_host(host) is not None:
            s.refuse(key)  # a rule reports it
        elif (error := why_not_bindable(host, 0)) is not None:
            s.refuse(key)
            unknown = isinstance(error, socket.gaierror)
            problem = "it cannot be resolved" if unknown else f"it cannot be listened on ({error.strerror})"
            yield Fault(key, host, problem, "give a name or address of this machine")


def _ports(s: FlatSettings) -> Iterator[Fault]:
    wanted = [(key, getattr(s, key)) for key in SERVICE_PORTS]
    if s.rollout_port:
        beyond = min(s.rollout_port + s.rollout_num_workers - s.rollout_workers_elsewhere, 65536)
        wanted += [("rollout_port", port) for port in range(s.rollout_port, beyond)]
    for key, port in wanted:
        if port:
            yield from _port(key, s.host, port)
    if s.gateway and s.gateway_port:
        yield from _port("gateway_port", s.gateway_host, s.gateway_port)


def _port(key: str, host: str, port: int) -> Iterator[Fault]:
    if (error := why_not_bindable(host, port)) is not None:
        problem = f"{join_address(host, port)} cannot be listened on ({error.strerror})"
        yield Fault(key, port, problem, "choose another one, or 0 for any free one")


def _access_files(s: FlatSettings) -> Iterator[Fault]:
    for key in ("gateway_keys_file", "tls_cert", "tls_key", "tls_ca"):
        path = getattr(s, key)
        if path is not None and not os.access(path, os.R_OK):
            yield Fault(key, path, "it cannot be read", "check the path and its permissions")
    for path in s.gateway_allowed_root:
        if not os.path.isdir(path):
            yield Fault("gateway_allowed_root", path, "there is no such folder", "give a folder")
    tls = {key: getattr(s, key) for key in ("tls_cert", "tls_key", "tls_ca")}
    if any(path is not None and not os.access(path, os.R_OK) for path in tls.values()):
        return
    if s.tls_cert and s.tls_key and (problem := why_not_pair(s.tls_cert, s.tls_key)) is not None:
        yield Fault("tls_key", s.tls_key, problem, "give a certificate and its own key, as PEM files")
    if s.tls_ca and (problem := why_not_authorities(s.tls_ca)) is not None:
        yield Fault("tls_ca", s.tls_ca, problem, "give a PEM file of certificates")


_DEPLOYMENT_CHECKS: tuple[Rule, ...] = (_access_files, _hosts, _ports, gpu_faults)
_FILE_CHECKS: tuple[Rule, ...] = (
    _models,
    _adapter,
    draft_model_faults,
    *MODEL_CHECKS,
    variable_faults,
    _server_groups,
    _data_files,
    _checkpoint_to_load,
    output_faults,
    tracker_faults,
    _functions,
)
_CHECKS: tuple[Rule, ...] = (*_FILE_CHECKS, *_DEPLOYMENT_CHECKS, draft_device_faults)
