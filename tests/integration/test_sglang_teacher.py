"""Teachers behind real SGLang servers on the CPU: what they say of responses, and what a death does."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import time
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
import torch
from sglang_kit import ON_GPU, have_sglang
from sglang_teacher import KEY, free_port, start_teacher
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


async def teacher_of(folder: pathlib.Path, name: str, seed: int) -> Teacher:
    model, port = save_checkpoint(folder / name, "qwen3", seed, initializer_range=0.1), free_port()
    return Teacher(name, folder / name, model.double(), port, await start_teacher(folder / name, port))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def taught(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Teacher]]:
    """A teacher on its way up."""
    teacher = await teacher_of(tmp_path_factory.mktemp("teacher"), "code", 0)
    yield {"code": teacher}
    await teacher.process.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def both(taught: dict[str, Teacher], tmp_path: pathlib.Path) -> AsyncIterator[dict[str, Teacher]]:
    """That one, and another of other weights."""
    teacher = await teacher_of(tmp_path, "math", 1)
    yield {**taught, "math": teacher}
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


def sampled(taught: dict[str, Teacher], sample: Sample) -> np.ndarray:
    """log p of the response tokens under the sample's teacher."""
    tokens = torch.from_numpy(sample.response_tokens.astype(np.int64))
    exact = expected(taught[sample.metadata["opd_teacher"]], sample)
    return exact.gather(1, tokens[:, None])[:, 0].numpy()


@pytest_asyncio.fixture(loop_scope="module")
async def teachers(taught: dict[str, Teacher], key_file: pathlib.Path) -> AsyncIterator[ServedTeachers]:
    found = ServedTeachers(config_of(taught, key_file))
    await found.open()
    yield found
    await found.close()


async def test_a_response_has_the_teachers_log_probs(taught: dict[str, Teacher], teachers: ServedTeachers) -> None:
    sample = sample_of(0, "code")
    await teachers.score(sample)
    np.testing.assert_allclose(sample.teacher_log_probs, sampled(taught, sample), atol=2e-5)


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

    ids = AutoTokenizer.from_pretrained(taught["code"].folder).encode(PROBE, add_special_tokens=False)
    await teachers.check(ids)
    with pytest.raises(TeacherRefused, match="another tokenizer than the policy"):
        await teachers.check([*ids, 1])
    with pytest.raises(TeacherRefused, match="with 400"):
        await teachers.score(sample_of(0, "code", response=9000))


async def test_a_key_is_needed_where_the_server_has_one(taught: dict[str, Teacher], teachers: ServedTeachers) -> None:
    await teachers.score(sample_of(0, "code"))  # it is up
    keyless = ServedTeachers(config_of({"code": taught["code"]}, pathlib.Path("/dev/null")))
    await keyless.open()
    try:
        with pytest.raises(TeacherRefused, match="401"):
            await keyless.score(sample_of(0, "code"))
    finally:
        await keyless.close()


@pytest.mark.slow
async def test_each_sample_has_its_teacher_and_one_that_is_killed_is_waited_for(
    both: dict[str, Teacher], key_file: pathlib.Path
) -> None:
    teachers = ServedTeachers(config_of(both, key_file))
    await teachers.open()
    samples = [sample_of(i, name) for i, name in enumerate(["math", "code"] * 3)]
    teaching = GroupTeaching(teachers, samples)
    for position in range(len(samples)):
        teaching.begin(position)
    await teaching.finish()
    for sample in samples:
        np.testing.assert_allclose(sample.teacher_log_probs, sampled(both, sample), atol=2e-5)
    teacher = both["math"]
    teacher.process.kill()
    await teacher.process.wait()
    hurried = ServedTeachers(config_of(both, key_file, opd_teacher_timeout_s=0.2))
    await hurried.open()
    with pytest.raises(TeacherFailed, match=f"teacher math at {teacher.url} did not answer for 0.2 s"):
        await hurried.score(sample_of(0, "math"))
    await hurried.close()
    again = sample_of(0, "math")
    waiting = asyncio.create_task(teachers.score(again))
    while not (waits := list(teacher_waits(teachers.servers.values()))):
        assert not waiting.done()
        await asyncio.sleep(0.05)
    assert [wait.what for wait in waits] == [f"teacher math at {teacher.url}"]
    assert waits[0].samples == 1
    assert waits[0].gives_up_unix_ns > time.time_ns()
    teacher.process = await start_teacher(teacher.folder, teacher.port)
    await waiting
    np.testing.assert_allclose(again.teacher_log_probs, samples[0].teacher_log_probs, atol=1e-6)
    assert list(teacher_waits(teachers.servers.values())) == []
    await teachers.close()
