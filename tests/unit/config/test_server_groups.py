"""Groups of servers that differ."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
from config_cases import MINIMAL

from miles.config import ConfigError, JobConfig
from miles.config.server_groups import Server, servers_of_service


def servers(folder: pathlib.Path, text: str, **changes: Any) -> tuple[Server, ...]:
    path = folder / "servers.yaml"
    path.write_text(text)
    config = JobConfig.from_flat({**MINIMAL, "sglang_config": str(path), **changes})
    assert config.rollout.rollout_backend == "sglang"
    return servers_of_service(config.to_flat())


def of_model(*groups: str, **keys: str) -> str:
    given = "".join(f", {key}: {value}" for key, value in keys.items())
    return f"sglang: [{{name: actor{given}, server_groups: [{', '.join(groups)}]}}]"


def test_a_group_has_servers_of_its_own_size_and_flags(tmp_path: pathlib.Path) -> None:
    small, large = (
        "{worker_type: regular, num_gpus: 4}",
        "{num_gpus: 4, num_gpus_per_engine: 4, overrides: {page_size: 1}}",
    )
    assert servers(tmp_path, of_model(small, large), rollout_num_gpus_per_engine=2, rollout_num_gpus=8) == (
        *(Server(2, {}),) * 2,
        Server(4, {"page_size": 1}),
    )
    assert servers(tmp_path, of_model(small, num_gpus_per_engine="1"), rollout_num_workers=2) == (Server(1, {}),) * 2


def test_without_a_file_servers_are_alike() -> None:
    flat = JobConfig.from_flat({**MINIMAL, "rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 2}).to_flat()
    assert servers_of_service(flat) == (Server(2, {}),) * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "it is not YAML"),
        ("a: 1", "it lists no model under the key sglang"),
        ("sglang: [{name: a, server_groups: []}, {name: b}]", "it has the models a, b, and a run serves the one"),
        (of_model(), "its model has no server_groups"),
        (of_model("{num_gpus: 1}", update_weights="false"), "update_weights is false"),
        (of_model("{num_gpus: 1}", model_path="/other"), "its model_path is /other"),
        (of_model("{num_gpus: 1}", router="x"), "its model has a key router that is not known"),
        (of_model("3"), "server_groups[0] is no mapping"),
        (of_model("{num_gpus: 0}"), "num_gpus of server_groups[0] is 0"),
        (of_model("{num_gpus: 3, num_gpus_per_engine: 2}"), "are no multiple of num_gpus_per_engine = 2"),
        (of_model("{worker_type: prefill, num_gpus: 1}"), "prefill and decode on different servers is not supported"),
        (of_model("{worker_type: placeholder, num_gpus: 1}"), "GPUs that no group asks for stay free"),
        (of_model("{num_gpus: 1, speed: 2}"), "has a key speed that is not known"),
        (of_model("{num_gpus: 1, overrides: {tp_size: 2}}"), "sets tp_size of server_groups[0] itself"),
        (of_model("{num_gpus: 1, overrides: {speculative_algorithm: EAGLE}}"), "all servers have the same speculative"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: pathlib.Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        servers(tmp_path, text)
    assert words in str(raised.value)


def test_groups_fit_the_other_settings(tmp_path: pathlib.Path) -> None:
    group = of_model("{num_gpus: 3}")
    with pytest.raises(ConfigError, match="a group of 3 servers does not divide over rollout_num_workers = 2"):
        servers(tmp_path, group, rollout_num_workers=2)
    with pytest.raises(ConfigError, match="rollout_num_gpus = 4, but the groups of sglang_config have 3"):
        servers(tmp_path, group, rollout_num_gpus=4)
