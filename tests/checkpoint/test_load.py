"""Damage is found and named, and the checkpoint before it is taken."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_llm.checkpoint.load import find_checkpoint, open_checkpoint
from dist_llm.utils.errors import ExitCode, NoCheckpointError

from .saving import holds, names, save


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=1, sort_keys=True) + "\n")


WEIGHTS = "weights-00002.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit in a tensor": (lambda d: flip(d / WEIGHTS, -7), rf"{WEIGHTS} is damaged: its SHA-256"),
    "a flipped bit in a header": (lambda d: flip(d / WEIGHTS, 12), rf"{WEIGHTS} is damaged: its SHA-256"),
    "a truncated file": (lambda d: os.truncate(d / WEIGHTS, 100), rf"{WEIGHTS} has 100 bytes, the manifest says \d+"),
    "an empty file": (lambda d: os.truncate(d / WEIGHTS, 0), rf"{WEIGHTS} has 0 bytes"),
    "a file that grew": (lambda d: os.truncate(d / WEIGHTS, 9999), rf"{WEIGHTS} has 9999 bytes"),
    "a missing file": (lambda d: (d / WEIGHTS).unlink(), rf"{WEIGHTS} is missing"),
    "a directory in place of a file": (lambda d: ((d / WEIGHTS).unlink(), (d / WEIGHTS).mkdir()), rf"{WEIGHTS} is missing"),
    "a missing manifest": (lambda d: (d / "manifest.json").unlink(), r"no manifest.json, so this checkpoint was never finished"),
    "a manifest that cannot be read": (
        lambda d: ((d / "manifest.json").unlink(), (d / "manifest.json").mkdir()),
        r"manifest.json cannot be read: Is a directory",
    ),
    "a truncated manifest": (lambda d: os.truncate(d / "manifest.json", 700), r"manifest.json is damaged"),
    "an empty manifest": (lambda d: os.truncate(d / "manifest.json", 0), r"manifest.json is damaged"),
    "a manifest of other bytes": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe{}"), r"manifest.json is damaged"),
    "a manifest that is a list": (lambda d: (d / "manifest.json").write_text("[]"), r"manifest.json is damaged"),
    "another position in the data": (lambda d: edit_manifest(d, next_sample=17), r"manifest.json is damaged: its SHA-256"),
    "another hash": (lambda d: edit_manifest(d, sha256="0" * 64), r"manifest.json is damaged: its SHA-256"),
    "an unknown format": (lambda d: edit_manifest(d, format=99), r"manifest.json: format 99, this version reads 1"),
}


@pytest.mark.parametrize(("harm", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_with_the_file_named_and_the_older_checkpoint_taken(
    tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    harm(damaged)
    with pytest.raises(NoCheckpointError, match=re.escape(str(damaged)) + ".*" + message) as caught:
        open_checkpoint(damaged)
    assert caught.value.exit_code == ExitCode.NO_CHECKPOINT
    found, problems = find_checkpoint(tmp_path)
    assert found is not None
    assert found.directory == tmp_path / "step-00000001"
    assert holds(found, 1)
    assert problems == [str(caught.value)]


def test_every_flipped_bit_of_a_manifest_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    manifest = open_checkpoint(directory).manifest
    path = directory / "manifest.json"
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            assert open_checkpoint(directory, verify=False).manifest == manifest, position
        except NoCheckpointError:
            refused += 1
    assert refused > 0.8 * len(range(0, len(whole), 7))


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match=r"step-00000001: no such checkpoint"):
        open_checkpoint(tmp_path / "step-00000001")


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) == (None, [])
    assert find_checkpoint(tmp_path / "absent") == (None, [])


def test_all_problems_are_told_when_no_checkpoint_is_valid(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        os.truncate(save(tmp_path, step) / WEIGHTS, 1)
    found, problems = find_checkpoint(tmp_path)
    assert found is None
    assert [re.search(r"step-\d+", problem)[0] for problem in problems] == ["step-00000003", "step-00000002", "step-00000001"]


def test_the_listing_is_the_truth_and_latest_only_a_hint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    for hint in ("step-00000001\n", "../../elsewhere\n", "\x00"):
        (tmp_path / "latest").write_text(hint)
        found, problems = find_checkpoint(tmp_path)
        assert found is not None
        assert (found.manifest.step, problems) == (2, [])


def test_copies_under_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    for name in ("step-00000002.bak", "step-2", "old-step-00000002", "step-0000000x"):
        shutil.copytree(directory, tmp_path / name)
    (tmp_path / "step-00000009").write_text("a file")
    found, problems = find_checkpoint(tmp_path)
    assert found is not None
    assert (found.directory, problems) == (directory, [])


def test_the_newest_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 7):
        save(tmp_path, step, seed=1)
    assert names(tmp_path)[1] == "step-00000007"
    found, _ = find_checkpoint(tmp_path)
    assert found is not None
    assert found.manifest.step == 100_000_000


def test_opening_without_verification_reads_the_manifest_only(tmp_path: Path) -> None:
    directory = save(tmp_path, 1)
    (directory / WEIGHTS).unlink()
    trusting = open_checkpoint(directory, verify=False)
    with pytest.raises(NoCheckpointError, match=rf"{WEIGHTS} cannot be read"):
        list(trusting.tensors("weights"))


def test_a_section_that_is_not_there_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 1))
    with pytest.raises(NoCheckpointError, match=r"holds no ema, only exp_avg, exp_avg_sq, weights"):
        list(checkpoint.tensors("ema"))
