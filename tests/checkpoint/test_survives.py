"""Kills and refusing disks: what was whole stays whole, what was not is never taken for whole."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_llm.checkpoint.load import find_checkpoint, open_checkpoint
from dist_llm.checkpoint.names import checkpoint_name, list_checkpoints
from dist_llm.checkpoint.save import prune
from dist_llm.utils.errors import NoCheckpointError, StorageError

from .saving import holds, in_child, kill_at_every_call, make_tensors, names, save


def restore(copy: Path, root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(copy, root)


def test_a_kill_at_any_moment_of_a_save_loses_no_checkpoint(tmp_path: Path) -> None:
    root, before = tmp_path / "checkpoints", tmp_path / "before"
    save(before, 1)
    outcomes = []
    for moment in kill_at_every_call(lambda: save(root, 2), prepare=lambda: restore(before, root)):
        found, problems = find_checkpoint(root)
        assert found is not None, moment
        assert problems == [], moment
        assert holds(found, found.manifest.step), moment
        assert holds(open_checkpoint(root / checkpoint_name(1)), 1), moment
        outcomes.append(found.manifest.step)
    assert len(outcomes) > 40
    assert outcomes == sorted(outcomes), "once the new one is there it stays"
    assert set(outcomes) == {1, 2}


def test_a_kill_at_any_moment_of_the_first_save_leaves_it_whole_or_absent(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for moment in kill_at_every_call(lambda: save(root, 2), prepare=lambda: empty(root.parent)):
        found, problems = find_checkpoint(root)
        assert problems == [], moment
        assert found is None or holds(found, 2), moment


def test_a_kill_at_any_moment_of_saving_a_step_again_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    root, before = tmp_path / "checkpoints", tmp_path / "before"
    save(before, 1, seed=1)
    outcomes = set()
    for moment in kill_at_every_call(lambda: save(root, 1, seed=2), prepare=lambda: restore(before, root)):
        found, problems = find_checkpoint(root)
        assert found is not None, moment
        assert problems == [], moment
        assert holds(found, 1) or holds(found, 2), moment
        outcomes.add((found.directory.name.startswith("."), holds(found, 2)))
        if found.directory.name.startswith("."):  # it must also live through the next save
            save(root, 3)
            again = open_checkpoint(root / checkpoint_name(1))
            assert holds(again, 1) or holds(again, 2), moment
    # The old one in its place, the old one aside for a moment, the new one.
    assert outcomes == {(False, False), (True, False), (False, True)}


def test_the_next_save_removes_what_killed_ones_left_and_puts_back_what_they_moved(tmp_path: Path) -> None:
    root = tmp_path
    save(root, 1)
    save(root, 2)
    (root / "step-00000002").rename(root / ".step-00000002.77.old")
    shutil.copytree(root / "step-00000001", root / ".step-00000001.77.old")
    (root / ".step-00000003.77.tmp").mkdir()
    (root / ".step-00000003.77.tmp" / "weights-00000.safetensors").write_bytes(b"half")
    found, problems = find_checkpoint(root)
    assert found is not None
    assert holds(found, 2)
    assert problems == []
    save(root, 3)
    assert names(root) == ["latest", "step-00000001", "step-00000002", "step-00000003"]
    assert [holds(open_checkpoint(d), n) for n, d in enumerate(list_checkpoints(root), 1)] == [True, True, True]


def test_a_kill_at_any_moment_of_pruning_leaves_the_newest_and_nothing_that_only_looks_whole(tmp_path: Path) -> None:
    root, before = tmp_path / "checkpoints", tmp_path / "before"
    for step in (1, 2, 3):
        save(before, step)
    for moment in kill_at_every_call(lambda: prune(root, 1), prepare=lambda: restore(before, root)):
        found, _ = find_checkpoint(root)
        assert found is not None, moment
        assert holds(found, 3), moment
        for directory in list_checkpoints(root):
            if (directory / "manifest.json").exists():
                assert holds(open_checkpoint(directory), int(directory.name.split("-")[1])), moment
            else:
                with pytest.raises(NoCheckpointError, match="never finished"):
                    open_checkpoint(directory)


@pytest.mark.parametrize("limit", [0, 100, 300, 500, 1000])
def test_a_disk_that_refuses_is_one_clear_error_and_the_old_checkpoint_stays(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1)
    sizes = [path.stat().st_size for path in (tmp_path / "step-00000001").iterdir()]
    assert limit < max(sizes)
    tensors = make_tensors(2)
    passed = []

    def noted() -> Iterator[tuple[str, str, torch.Tensor]]:
        for item in tensors:
            passed.append(item)
            yield item

    def refused() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(StorageError, match=r"cannot save .*/step-00000002: .*File too large.*earlier checkpoints are untouched"):
            save(tmp_path, 2, tensors=noted())
        assert len(passed) == len(tensors), "the other ranks communicate to the end, so must this one"

    assert in_child(refused) == 0
    assert names(tmp_path) == ["latest", "step-00000001"]
    found, problems = find_checkpoint(tmp_path)
    assert found is not None
    assert holds(found, 1)
    assert problems == []


def test_a_directory_that_cannot_be_made_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot save .*/file/step-00000001: "):
        save(tmp_path / "file", 1)
    assert names(tmp_path) == ["file"]


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    assert prune(tmp_path, 0) == []
    assert prune(tmp_path, 4) == []
    assert [path.name for path in prune(tmp_path, 2)] == ["step-00000008", "step-00000009"]
    assert names(tmp_path) == ["latest", "step-00000010", "step-00000011"]


def test_pruning_counts_steps_as_numbers_and_leaves_other_names_alone(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    shutil.copytree(tmp_path / "step-99999999", tmp_path / "step-99999999.bak")
    (tmp_path / "step-notes.txt").write_text("mine")
    assert [path.name for path in prune(tmp_path, 1)] == ["step-99999999"]
    assert names(tmp_path) == ["latest", "step-100000000", "step-99999999.bak", "step-notes.txt"]


def test_pruning_never_removes_what_was_saved_last_below_a_damaged_one(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000020" / "weights-00000.safetensors", 10)
    save(tmp_path, 13)  # a run that went on from 10 and was asked to stop
    assert [path.name for path in prune(tmp_path, 1)] == ["step-00000010"]
    found, problems = find_checkpoint(tmp_path)
    assert found is not None
    assert holds(found, 13)
    assert len(problems) == 1


def test_pruning_that_fails_says_which_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    # A directory where the manifest should be cannot be unlinked by anybody; permissions would not stop root.
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    (tmp_path / "step-00000001" / "manifest.json").mkdir()
    with pytest.raises(StorageError, match=r"cannot remove the old checkpoint .*/step-00000001: .*checkpoint\.keep=0"):
        prune(tmp_path, 1)


def empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
