from __future__ import annotations

import pathlib

import pytest
from torch_engine_models import save_checkpoint

from miles.services.rollout.engines.sglang import ServerUnstartable, SglangEngine, SglangOptions
from miles.services.rollout.engines.sglang.server import replica


async def test_a_server_that_ends_while_it_starts_is_tried_again_and_the_end_of_its_log_is_shown(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "START_AGAIN_S", (0.0, 0.0))
    save_checkpoint(tmp_path / "model", "qwen3")
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho the port is taken\nexit 3\n")
    interpreter.chmod(0o755)
    given = SglangOptions(
        hf_checkpoint=str(tmp_path / "model"), device="cpu", python=str(interpreter), log_dir=tmp_path / "logs"
    )
    with pytest.raises(ServerUnstartable, match=r"ended with status 3(.|\n)*the port is taken"):
        await SglangEngine(given).start()
    [log] = (tmp_path / "logs").iterdir()
    assert log.read_text().count("the port is taken") == 3
