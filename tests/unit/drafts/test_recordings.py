"""Recordings are read as they were written, by however many ranks, and anything else is said to be what it is."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import pytest
import torch
from config_cases import MINIMAL
from recorded import part_of, random_samples, samples_of, write_recording

from miles.config import JobConfig
from miles.drafts import recording_files as files
from miles.drafts.recording import RecordedSample
from miles.drafts.recordings import RecordingDamaged, RecordingGone, read, root_of, steps


def _assert_same(found: list[RecordedSample], expected: list[RecordedSample]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.prompt_length == other.prompt_length
        assert one.hidden_TD.keys() == other.hidden_TD.keys()
        for layer, hidden_TD in other.hidden_TD.items():
            assert torch.equal(one.hidden_TD[layer], hidden_TD)
        for name in ("tokens_T", "top_tokens_RK", "top_log_probs_RK", "loss_mask_R"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("layers", [(), (-1, 1, 3)])
def test_what_was_written_is_read(tmp_path: pathlib.Path, ranks: int, layers: tuple[int, ...]) -> None:
    samples = random_samples(layers=layers)
    write_recording(tmp_path, 12, samples, ranks=ranks)
    assert steps(tmp_path) == [12]
    _assert_same(read(tmp_path, 12), samples)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000012"]


def test_hidden_states_keep_their_type(tmp_path: pathlib.Path) -> None:
    samples = [
        dataclasses.replace(s, hidden_TD={layer: x.bfloat16() for layer, x in s.hidden_TD.items()})
        for s in random_samples()
    ]
    write_recording(tmp_path, 0, samples)
    _assert_same(read(tmp_path, 0), samples)


def test_a_recording_of_the_same_step_replaces_the_former_one(tmp_path: pathlib.Path) -> None:
    write_recording(tmp_path, 4, random_samples(0))
    write_recording(tmp_path, 4, random_samples(1))
    _assert_same(read(tmp_path, 4), random_samples(1))


def test_there_are_no_steps_without_a_folder_and_parts_are_none(tmp_path: pathlib.Path) -> None:
    assert steps(tmp_path / "nothing") == []
    files.write_part(files.partial_folder(tmp_path, 3), 0, part_of(random_samples(), 0, 1))
    assert steps(tmp_path) == []


def test_the_newest_are_kept(tmp_path: pathlib.Path) -> None:
    for step in (9, 10, 100_000_000):
        write_recording(tmp_path, step, random_samples())
    files.keep_newest(tmp_path, 2)
    assert steps(tmp_path) == [10, 100_000_000]
    with pytest.raises(RecordingGone, match="step 9"):
        read(tmp_path, 9)


def test_later_steps_and_leftovers_of_crashes_are_deleted(tmp_path: pathlib.Path) -> None:
    for step in (4, 5, 6):
        write_recording(tmp_path, step, random_samples())
    files.write_part(files.partial_folder(tmp_path, 7), 0, part_of(random_samples(), 0, 1))
    (tmp_path / "step-00000001.partial.deleted").mkdir()
    others = ["notes", "step-00000009", "step-last.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    files.discard_from(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "step-00000004"])
    files.discard_from(tmp_path / "nothing", 0)


def _truncate(folder: pathlib.Path) -> None:
    path = folder / files.part_name(0)
    path.write_bytes(path.read_bytes()[:-8])


def _lose_a_part(folder: pathlib.Path) -> None:
    (folder / files.part_name(1)).unlink()


def _lose_a_row(folder: pathlib.Path) -> None:
    part = part_of(random_samples(), 1, 2)
    files.write_part(
        folder,
        1,
        dataclasses.replace(
            part, rows_N2=part.rows_N2[1:], hidden_ND={layer: x[1:] for layer, x in part.hidden_ND.items()}
        ),
    )


def _lose_a_layer(folder: pathlib.Path) -> None:
    for rank in range(2):
        part = part_of(random_samples(), rank, 2)
        files.write_part(folder, rank, dataclasses.replace(part, hidden_ND={-1: part.hidden_ND[-1]}))


def _name_a_sample_that_is_not_there(folder: pathlib.Path) -> None:
    part = part_of(random_samples(), 1, 2)
    files.write_part(folder, 1, dataclasses.replace(part, top_rows_M2=part.top_rows_M2 + 1))


def _be_of_another_version(folder: pathlib.Path) -> None:
    path = folder / files.SAMPLES
    path.write_bytes(path.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 7'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, r"part-00000|SafetensorError"),
        (_lose_a_part, "part-00001"),
        (_lose_a_row, r"17 of 18 rows of -1"),
        (_lose_a_layer, r"0 of 18 rows of 1"),
        (_name_a_sample_that_is_not_there, "samples that are not there"),
        (_be_of_another_version, "another version"),
    ],
)
def test_damage_is_an_error_with_the_reason(
    tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None], reason: str
) -> None:
    write_recording(tmp_path, 1, random_samples(), ranks=2)
    damage(files.step_folder(tmp_path, 1))
    with pytest.raises(RecordingDamaged, match=reason) as caught:
        read(tmp_path, 1)
    assert "step-00000001" in str(caught.value)


def test_samples_that_are_not_finite_are_left_out(tmp_path: pathlib.Path) -> None:
    samples = random_samples()
    samples[0].hidden_TD[1][2, 3] = torch.inf
    samples[1].top_log_probs_RK[0] = torch.nan
    write_recording(tmp_path, 1, samples)
    _assert_same(read(tmp_path, 1), samples[2:])


def test_a_recording_that_cannot_be_written_is_an_os_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        files.write_part(tmp_path / "taken" / "step", 0, part_of(random_samples(), 0, 1))
    folder = tmp_path / "step-00000000.partial"
    (folder / files.SAMPLES).mkdir(parents=True)
    with pytest.raises(OSError, match=files.SAMPLES):
        files.complete(tmp_path, files.Facts(0, (), 4, ()), samples_of(random_samples()))


def test_recordings_are_in_the_runs_folder_unless_another_is_given() -> None:
    run = pathlib.Path("run")
    assert root_of(JobConfig.from_flat(MINIMAL), run) == run / "drafts" / "recordings"
    on = {"enable_draft_training": True, "sglang_speculative_algorithm": "EAGLE3", "draft_recordings_dir": "/shared"}
    shared = JobConfig.from_flat(MINIMAL | on)
    assert root_of(shared, run) == pathlib.Path("/shared/run")
    assert root_of(shared, pathlib.Path("/runs/another")) == pathlib.Path("/shared/another"), "no run has another's"
