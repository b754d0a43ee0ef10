"""What a job's configuration may name on a deployment."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.config.schema.catalog import catalog
from miles.gateway.config_policy import review
from miles.gateway.config_schema import DEPLOYMENT, INDIRECT, body_schema, is_path, job_settings
from miles.gateway.options import GatewayOptions


@pytest.fixture
def policy(tmp_path: pathlib.Path) -> GatewayOptions:
    (tmp_path / "root").mkdir()
    root = (tmp_path / "root").resolve()
    return GatewayOptions(
        controller="c:1", allowed_roots=(root,), runs_dir=root / "runs", allowed_modules=("team.rewards",)
    )


def faults(policy: GatewayOptions, **body: Any) -> dict[str, str]:
    return {fault.field: fault.problem for fault in review(body, policy, "").faults}


def test_every_setting_that_names_files_is_confined(policy: GatewayOptions) -> None:
    """Also those that are added later: a name that sounds like a file must be known as one."""
    for key, entry in job_settings().items():
        sounds = key.endswith(("_path", "_dir", "_file", "load", "save", "_checkpoint", "_data", "save_hf"))
        if entry.kind in (str, tuple) and sounds and entry.dotted_path is None:
            assert is_path(entry), f"{key} needs Metavar('FILE') or Metavar('DIR')"
        if is_path(entry):
            outside: Any = "/etc/passwd" if entry.kind is str else ["name", "/etc/passwd"]
            assert "outside" in faults(policy, **{key: outside})[key]


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "a/../../b", "/", "~root", "//etc/passwd"])
def test_a_path_outside_the_roots_is_refused(policy: GatewayOptions, path: str) -> None:
    found = faults(policy, prompt_data=path)
    assert ("prompt_data" in found) == (path != "~root")


def test_a_path_inside_becomes_absolute_and_keeps_its_rows(policy: GatewayOptions) -> None:
    reviewed = review({"prompt_data": "d/../t.jsonl@[0:8]", "eval_prompt_data": ["a", "x/e.jsonl"]}, policy, "")
    root = policy.allowed_roots[0]
    assert reviewed.flat["prompt_data"] == f"{root}/t.jsonl@[0:8]"
    assert reviewed.flat["eval_prompt_data"] == ["a", f"{root}/x/e.jsonl"]


def test_named_folders_are_confined_and_keep_their_names(policy: GatewayOptions) -> None:
    reviewed = review({"opd_teacher_load": ["math=a/b", "code=/etc", "=/etc"]}, policy, "")
    assert reviewed.flat["opd_teacher_load"][0] == f"math={policy.allowed_roots[0]}/a/b"
    assert [fault.value for fault in reviewed.faults] == ["/etc"]


def test_a_link_that_leads_outside_is_refused(policy: GatewayOptions, tmp_path: pathlib.Path) -> None:
    (policy.allowed_roots[0] / "link").symlink_to(tmp_path)
    assert "outside" in faults(policy, hf_checkpoint="link/model")["hf_checkpoint"]


def test_a_folder_that_begins_like_a_root_is_outside(policy: GatewayOptions) -> None:
    assert "hf_checkpoint" in faults(policy, hf_checkpoint=f"{policy.allowed_roots[0]}-other/model")


@given(st.text(max_size=40))
def test_whatever_the_path_it_ends_below_a_root_or_is_refused(path: str) -> None:
    root = pathlib.Path("/srv/data")
    policy = GatewayOptions(controller="c:1", allowed_roots=(root,), runs_dir=root)
    reviewed = review({"chat_template_path": path}, policy, "")
    if "chat_template_path" not in reviewed.refused:
        assert pathlib.Path(reviewed.flat["chat_template_path"]).is_relative_to(root)


def test_without_roots_no_file_can_be_named(policy: GatewayOptions) -> None:
    closed = dataclasses.replace(policy, allowed_roots=(), runs_dir=None)
    assert set(faults(closed, hf_checkpoint="m")) == {"hf_checkpoint", "run_dir"}


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("team.rewards.score", True),
        ("team.rewards.math.score", True),
        ("team.rewardsx.score", False),
        ("team.score", False),
        ("os.system", False),
        ("score", False),
    ],
)
def test_functions_come_from_allowed_modules_only(policy: GatewayOptions, path: str, allowed: bool) -> None:
    assert ("custom_rm_path" not in faults(policy, custom_rm_path=path)) == allowed


def test_built_in_functions_are_always_allowed(policy: GatewayOptions) -> None:
    for key, entry in job_settings().items():
        if entry.dotted_path is not None:
            for alias in entry.dotted_path.aliases:
                assert key not in faults(policy, **{key: alias})


def test_flags_passed_through_must_be_allowed(policy: GatewayOptions) -> None:
    assert "sglang_port" in faults(policy, sglang_port=1)
    allowing = dataclasses.replace(policy, allowed_passthrough=("sglang_port",))
    assert "sglang_port" not in faults(allowing, sglang_port=1)


def test_jobs_may_say_what_engines_draft_with_and_name_a_draft_below_the_roots(policy: GatewayOptions) -> None:
    body = {"sglang_speculative_algorithm": "EAGLE", "sglang_speculative_num_steps": 3}
    assert faults(policy, **body) == {}
    assert "sglang_speculative_draft_model_path" in faults(policy, sglang_speculative_draft_model_path="/etc")
    reviewed = review({**body, "sglang_speculative_draft_model_path": "head"}, policy, "")
    assert reviewed.faults == []
    assert reviewed.flat["sglang_speculative_draft_model_path"] == str(policy.allowed_roots[0] / "head")
    for wrong in (["a"], {"a": 1}, 1):
        assert "sglang_speculative_draft_model_path" in faults(policy, sglang_speculative_draft_model_path=wrong)
    assert "sglang_speculative_num_steps" in faults(policy, sglang_speculative_num_steps={"a": 1})
    assert "sglang_speculative_token_map" in faults(policy, sglang_speculative_token_map="/etc/passwd")


def test_the_same_submission_has_the_same_run_folder(policy: GatewayOptions) -> None:
    folders = [review({"name": "a"}, policy, key).flat["run_dir"] for key in ("k", "k", "other", "", "")]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 4
    assert all(pathlib.Path(folder).parent == policy.runs_dir for folder in folders)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "..", "a b", "x" * 65, "é"])
def test_a_name_that_is_no_folder_name_is_refused(policy: GatewayOptions, name: str) -> None:
    reviewed = review({"name": name}, policy, "")
    assert "name" in reviewed.refused
    assert "run_dir" not in reviewed.flat


def test_settings_of_the_deployment_are_refused(policy: GatewayOptions) -> None:
    assert {"host", "redis_url", "controller_port", "gateway_port", "tls_key", "train_env_vars"} <= DEPLOYMENT
    for key in DEPLOYMENT:
        assert "services that run already" in faults(policy, **{key: "x"})[key]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"lr": "1e-6"}, "it must be a number"),
        ({"lr": True}, "it must be a number"),
        ({"lr": float("inf")}, "it must be a number"),
        ({"num_rollout": 1.5}, "it must be a whole number"),
        ({"num_rollout": 2**63}, "it must be a whole number"),
        ({"use_tensorboard": "true"}, "it must be true or false"),
        ({"name": 3}, "it must be text"),
        ({"rollout_stop": "x"}, "it must be a list"),
        ({"rollout_stop": [1]}, "each item must be text"),
        ({"input_key": "a\0b"}, "it must not contain a zero byte"),
    ],
)
def test_values_have_the_types_of_json(policy: GatewayOptions, body: dict[str, Any], problem: str) -> None:
    assert faults(policy, **body)[next(iter(body))] == problem


def test_a_whole_number_may_be_written_with_a_point_and_null_is_not_given(policy: GatewayOptions) -> None:
    reviewed = review({"num_rollout": 2.0, "lr": 1, "input_key": None}, policy, "")
    assert reviewed.faults == []
    assert "input_key" not in reviewed.flat


def test_the_schema_describes_every_setting_a_job_can_give() -> None:
    properties = body_schema()["properties"]
    assert set(properties) == set(catalog()) - DEPLOYMENT - INDIRECT
    assert properties["rollout_batch_size"]["exclusiveMinimum"] == 0
    assert properties["rollout_top_p"]["maximum"] == 1
    assert "null" in properties["lr"]["type"]
    assert all(described["description"] for described in properties.values())


@pytest.mark.parametrize("path", [".", "./", "runs", "runs/../", "{rollout_id}/../runs"])
def test_a_root_and_the_folder_of_runs_are_no_jobs_own(policy: GatewayOptions, path: str) -> None:
    for key in ("run_dir", "save", "save_hf"):
        assert faults(policy, **{key: path}) == {key: "other jobs use that folder too"}
        assert faults(policy, **{key: f"{path}/mine"}) == {}
    assert "load" not in faults(policy, load=path)


def test_a_file_that_names_other_files_is_refused(policy: GatewayOptions) -> None:
    assert "not compared with what jobs may use" in faults(policy, eval_config="eval.yaml")["eval_config"]


def test_dumps_of_a_job_are_in_its_own_folder(policy: GatewayOptions) -> None:
    found = faults(policy, run_dir="runs/a", dump_details="runs/a/dump", save_debug_rollout_data="b/{rollout_id}.pt")
    assert list(found) == ["save_debug_rollout_data"]
    assert "dumps replace files" in found["save_debug_rollout_data"]
    assert list(faults(policy, run_dir="runs/a", draft_recordings_dir="runs/b")) == ["draft_recordings_dir"]


def test_rows_of_a_data_file_are_no_way_out_of_the_roots(policy: GatewayOptions) -> None:
    path = "x@[/../../../../etc]"
    for key in ("save_hf", "run_dir", "prompt_data", "hf_checkpoint"):
        flat = review({key: path}, policy, "")
        inside = pathlib.Path(os.path.realpath(str(flat.flat[key]))).is_relative_to(policy.allowed_roots[0])
        assert inside or "outside" in faults(policy, **{key: path})[key]
