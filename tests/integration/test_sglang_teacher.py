"""Teachers behind real SGLang servers on the CPU: what they say of responses, and what a death does."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import socket
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
import torch
from sglang_kit import CPU_FLAGS, CPU_PYTHON, ON_GPU, have_sglang
from torch_engine_models import prompt_of, save_checkpoint

from miles.config.sections.distillation import DistillationConfig
from miles.services.rollout.engines.sglang.server.process import ServerProcess
from miles.services.rollout.groups.waits import teacher_waits
from miles.services.rollout.teachers.group_teaching import GroupTeaching
from miles.services.rollout.teachers.served import PROBE, ServedTeachers
from miles.services.rollout.teachers.server import TeacherFailed, TeacherRefused
from miles.types import Sample

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(ON_GPU or not have_sglang(), reason="needs SGLang for the CPU: make test-engines"),
    pytest.mark.asyncio(loop_scope="module"),
]
KEY = "secret of the teacher"


@dataclasses.dataclass
class Teacher:
    """A server and the model that it serves."""

    name: str
    folder: pathlib.Path
    model: torch.nn.Module
    port: int
    process: ServerProcess

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/generate"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def start(folder: pathlib.Path, port: int) -> ServerProcess:
    flags = {**CPU_FLAGS, "model_path": folder, "host": "127.0.0.1", "port": port, "api_key": KEY, "device": "cpu"}
    flags |= {"dtype": "float32", "disable_overlap_schedule": None, "skip_server_warmup": None}
    words = [
        word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value) if word is not None
    ]
    command = [CPU_PYTHON, "-m", "sglang.launch_server", *words]
    return await ServerProcess.start([str(word) for word in command], folder.with_suffix(".log"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def taught(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Teacher]]:
    """Two teachers of other weights, on their way up."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    for seed, name in enumerate(("math", "code")):
        model, port = save_checkpoint(folder / name, "qwen3", seed, initializer_range=0.1), free_port()
        found[name] = Teacher(name, folder / name, model.double(), port, await start(folder / name, port))
    yield found
    for teacher in found.values():
        await teacher.process.stop()


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text(KEY + "\n")
    return path


def config_of(taught: dict[str, Teacher], key_file: pathlib.Path, **changes: object) -> DistillationConfig:
    urls = tuple(f"{teacher.name}={teacher.url}" for teacher in taught.values())
    given = {"opd_teacher_urls": urls, "opd_teacher_key_file": str(key_file), **changes}
    return DistillationConfig(use_opd=True, opd_type="sglang", **given)


def sample_of(index: int, teacher: str, response: int = 45) -> Sample:
    """Longer than a piece of what is asked for at once."""
    tokens = np.array(prompt_of(7 + index + response, index), np.int32)
    return Sample(
        group_id=0, index=index, prompt="p", tokens=tokens, response_length=response, metadata={"opd_teacher": teacher}
    )


def expected(teacher: Teacher, sample: Sample) -> torch.Tensor:
    """log p of every token at each response position, float64 [R, V]."""
    with torch.no_grad():
        logits = teacher.model(torch.tensor(sample.tokens[None].astype(np.int64))).logits[0]
    return logits[sample.prompt_length - 1 : -1].log_softmax(-1)


@pytest_asyncio.fixture(loop_scope="module")
async def teachers(taught: dict[str, Teacher], key_file: pathlib.Path) -> AsyncIterator[ServedTeachers]:
    found = ServedTeachers(config_of(taught, key_file))
    await found.open()
    yield found
    await found.close()


async def test_each_sample_is_scored_by_its_teacher(taught: dict[str, Teacher], teachers: ServedTeachers) -> None:
    samples = [sample_of(i, name) for i, name in enumerate(["math", "code"] * 3)]
    teaching = GroupTeaching(teachers, samples)
    for position in range(len(samples)):
        teaching.begin(position)
    await teaching.finish()
    for sample in samples:
        tokens = torch.from_numpy(sample.response_tokens.astype(np.int64))
        exact = expected(taught[sample.metadata["opd_teacher"]], sample).gather(1, tokens[:, None])[:, 0]
        np.testing.assert_allclose(sample.teacher_log_probs, exact.numpy(), atol=2e-5)


@pytest.mark.parametrize("strategy", ["only-student", "only-teacher", "intersection", "union", "xor"])
async def test_sets_have_the_teachers_log_probs(
    taught: dict[str, Teacher], key_file: pathlib.Path, strategy: str
) -> None:
    config = config_of(taught, key_file, opd_log_prob_top_k=3, opd_top_k_strategy=strategy)
    served = ServedTeachers(config)
    await served.open()
    sample = sample_of(1, "code")
    exact = expected(taught["code"], sample)
    theirs = exact.topk(3).indices.numpy()
    own = np.where(np.arange(45)[:, None] % 2, theirs[:, ::-1], (theirs + 1) % exact.shape[1]).astype(np.int32)
    sample.teacher_tokens = own.copy()
    try:
        await served.score(sample)
    finally:
        await served.close()
    assert served.is_scored(sample)
    assert sample.teacher_tokens is not None
    assert sample.teacher_token_log_probs is not None
    for r, ids in enumerate(sample.teacher_tokens):
        student, teacher = set(own[r].tolist()), set(theirs[r].tolist())
        wanted = {
            "only-student": student,
            "only-teacher": teacher,
            "intersection": student & teacher,
            "union": student | teacher,
            "xor": student ^ teacher,
        }[strategy]
        assert sorted(ids[ids >= 0].tolist()) == sorted(wanted)
        for token, log_prob in zip(ids, sample.teacher_token_log_probs[r], strict=True):
            if token >= 0:
                assert log_prob == pytest.approx(exact[r, token].item(), abs=2e-5)


async def test_tokenizers_are_compared_and_refusals_are_not_repeated(
    taught: dict[str, Teacher], teachers: ServedTeachers
) -> None:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(taught["math"].folder).encode(PROBE, add_special_tokens=False)
    await teachers.check(ids)
    with pytest.raises(TeacherRefused, match="another tokenizer than the policy"):
        await teachers.check([*ids, 1])
    with pytest.raises(TeacherRefused, match="with 400"):
        await teachers.score(sample_of(0, "math", response=9000))


async def test_a_key_is_needed_where_the_server_has_one(taught: dict[str, Teacher], teachers: ServedTeachers) -> None:
    await teachers.score(sample_of(0, "code"))  # it is up
    keyless = ServedTeachers(config_of({"code": taught["code"]}, pathlib.Path("/dev/null")))
    await keyless.open()
    try:
        with pytest.raises(TeacherRefused, match="401"):
            await keyless.score(sample_of(0, "code"))
    finally:
        await keyless.close()


async def test_a_teacher_that_is_killed_is_waited_for(
    taught: dict[str, Teacher], teachers: ServedTeachers, key_file: pathlib.Path
) -> None:
    teacher = taught["math"]
    before = sample_of(3, "math")
    await teachers.score(before)
    teacher.process.kill()
    await teacher.process.wait()
    hurried = ServedTeachers(config_of(taught, key_file, opd_teacher_timeout_s=0.2))
    await hurried.open()
    with pytest.raises(TeacherFailed, match=f"teacher math at {teacher.url} did not answer for 0.2 s"):
        await hurried.score(sample_of(3, "math"))
    await hurried.close()
    again = sample_of(3, "math")
    waiting = asyncio.create_task(teachers.score(again))
    while not (waits := list(teacher_waits(teachers.servers.values()))):
        assert not waiting.done()
        await asyncio.sleep(0.05)
    assert [wait.what for wait in waits] == [f"teacher math at {teacher.url}"]
    assert waits[0].samples == 1
    assert waits[0].gives_up_unix_ns > time.time_ns()
    teacher.process = await start(teacher.folder, teacher.port)
    await waiting
    np.testing.assert_allclose(again.teacher_log_probs, before.teacher_log_probs, atol=1e-6)
    assert list(teacher_waits(teachers.servers.values())) == []
