"""Rules that refuse settings without an effect: somebody meant something by them that would not happen."""

from __future__ import annotations

from collections.abc import Iterator

from miles.config.rules.registry import rule
from miles.config.schema.catalog import catalog
from miles.config.schema.faults import Fault
from miles.config.schema.flat_settings import FlatSettings

_EXTERNAL_ENGINES_HAVE = ("rollout_engine_python", "rollout_num_gpus_per_engine", "sglang_config")


def _without_effect(s: FlatSettings, key: str, why: str, remedy: str) -> Iterator[Fault]:
    """Yield a fault when a setting was given, and not its default."""
    value = getattr(s, key)
    if s.given(key) and value is not False and value != catalog()[key].default:
        yield Fault(key, value, why, remedy)


@rule
def a_run_without_steps_saves_nothing(s: FlatSettings) -> Iterator[Fault]:
    if s.num_rollout == 0:
        for key in ("save", "save_interval", "save_hf", "async_save", "no_save_optim"):
            yield from _without_effect(s, key, "num_rollout = 0 trains nothing that could be saved", "leave it out")


@rule
def whole_samples_are_samples(s: FlatSettings) -> Iterator[Fault]:
    if s.log_samples_per_step == 0:
        why = "log_samples_per_step = 0 records no samples"
        yield from _without_effect(s, "log_whole_samples", why, "raise log_samples_per_step, or leave it out")


@rule
def changes_of_weights_are_written_by_one_transport(s: FlatSettings) -> Iterator[Fault]:
    mode, folder = s.update_weight_transfer_mode, s.update_weight_disk_dir
    why, remedy = f"update_weight_transfer_mode = {mode} writes no files", "set it to disk_delta, or leave this out"
    if mode == "auto":
        why, remedy = "no files are written without update_weight_disk_dir", "set that folder, or leave this out"
    if mode == "disk_delta" or (mode == "auto" and folder is not None):
        return
    for key in ("update_weight_disk_dir", "update_weight_delta_encoding", "update_weight_full_interval"):
        yield from _without_effect(s, key, why, remedy)


@rule
def drill_settings_need_a_drill(s: FlatSettings) -> Iterator[Fault]:
    if s.chaos is None:
        yield from _without_effect(
            s, "chaos_interval_s", "there is no drill without chaos", "set chaos, or leave it out"
        )


@rule
def external_engines_have_their_own_settings(s: FlatSettings) -> Iterator[Fault]:
    addresses = s.rollout_external_engine_addrs
    if addresses is None or s.rollout_backend != "sglang":
        return
    why = "rollout_external_engine_addrs names servers that run already"
    for key in _EXTERNAL_ENGINES_HAVE:
        yield from _without_effect(s, key, why, "give it to those servers, and leave it out")
    for name, value in s.sglang_args.items():
        yield Fault(f"sglang_{name}", value, why, "give it to those servers, and leave it out")
    for address in sorted({each for each in addresses if addresses.count(each) > 1}):
        yield Fault("rollout_external_engine_addrs", address, "it is named twice", "name each server once")


@rule
def the_trainer_leaves_the_gpu_in_one_way(s: FlatSettings) -> Iterator[Fault]:
    if s.offload_train and s.fsdp_cpu_offload:
        yield Fault("offload_train", True, "fsdp_cpu_offload keeps all in host memory already", "leave one of them out")


@rule
def kernels_fit_the_device(s: FlatSettings) -> Iterator[Fault]:
    if s.train_backend != "fsdp":
        return  # another rule reports them
    if s.attn_implementation == "varlen" and (s.device == "cpu" or s.train_dtype == "float32"):
        where = "device is cpu" if s.device == "cpu" else "train_dtype is float32"
        yield Fault("attn_implementation", "varlen", f"it needs CUDA and 16-bit numbers, and {where}", "set it to auto")
    if s.fsdp_cpu_offload and s.device == "cpu":
        yield Fault("fsdp_cpu_offload", True, "device is cpu, so that all is there already", "leave it out")
