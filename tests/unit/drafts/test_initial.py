from __future__ import annotations

import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

from draft_trainer_process import draft_config
from trainer_cases import write_dense_model

from miles.drafts.folders import initial_dir
from miles.drafts.initial import ensure_initial


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_hosts_that_share_nothing_begin_with_the_same_head(tmp_path: pathlib.Path) -> None:
    model = write_dense_model(tmp_path / "model")
    first = draft_config(model, run_dir=str(tmp_path / "a"))
    second = draft_config(model, run_dir=str(tmp_path / "b"))
    for config in (first, second, first):
        ensure_initial(config)
    made = files(initial_dir(tmp_path / "a"))
    assert {"config.json", "model.safetensors"} <= made.keys()
    assert made == files(initial_dir(tmp_path / "b"))
    assert list((tmp_path / "a" / "drafts").iterdir()) == [initial_dir(tmp_path / "a")]
    assert first.rollout.sglang_args["speculative_draft_model_path"] == str(initial_dir(tmp_path / "a"))


def test_many_may_need_it_at_the_same_time(tmp_path: pathlib.Path) -> None:
    model = write_dense_model(tmp_path / "model")
    ensure_initial(draft_config(model, run_dir=str(tmp_path / "first")))  # imports what it needs
    config = draft_config(model, run_dir=str(tmp_path / "run"))
    together = threading.Barrier(4)

    def ensure(_: int) -> None:
        together.wait()
        ensure_initial(config)

    with ThreadPoolExecutor(4) as pool:  # with one process id, as in containers that share the run's folder
        list(pool.map(ensure, range(4)))
    made = initial_dir(tmp_path / "run")
    assert list(made.parent.iterdir()) == [made]
    assert {"config.json", "model.safetensors"} <= files(made).keys()


def test_a_head_that_is_given_is_left_alone(tmp_path: pathlib.Path) -> None:
    model = write_dense_model(tmp_path / "model")
    ensure_initial(draft_config(model, sglang_speculative_draft_model_path="head", run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
