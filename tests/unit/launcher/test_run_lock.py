"""A run folder has one launcher at a time."""

from __future__ import annotations

import os
import pathlib

import pytest

from miles.launcher.cluster import lock_run_dir
from miles.rpc.exit_codes import ExitCode, ServiceExit


def test_a_second_launcher_is_told_who_runs_in_the_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new" / "run")
    first = lock_run_dir(tmp_path / "new" / "run")
    with pytest.raises(ServiceExit, match=rf"process id {os.getpid()} on \S+, since 20") as refused:
        lock_run_dir(tmp_path / "link")
    assert refused.value.code is ExitCode.RUN_DIR_BUSY
    os.close(first)
    os.close(lock_run_dir(tmp_path / "link"))


def test_a_link_that_leads_nowhere_yet_is_followed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    os.close(lock_run_dir(tmp_path / "link"))
    assert (tmp_path / "disk" / "run" / "run.lock").is_file()
