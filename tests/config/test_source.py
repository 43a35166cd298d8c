from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_llm.config.load import load_config

from .configs import SMALLEST, problems_of, the_problem, write


def test_a_file_wins_over_what_it_extends(tmp_path: Path, smallest: Path) -> None:
    path = write(tmp_path, "a.yaml", "extends: smallest.yaml\noptim:\n  lr: 2e-3\n  clip_norm: 0.5\n")
    resolved = load_config(path)
    assert (resolved.config.optim.lr, resolved.config.optim.clip_norm, resolved.config.train.steps) == (2e-3, 0.5, 10)
    assert resolved.files == (path, smallest)
    assert resolved.origins["optim.lr"] == f"{path}:3"
    assert resolved.origins["train.steps"] == f"{smallest}:10"
    assert resolved.origins["log.every"] == "default"


def test_the_later_of_several_bases_wins(tmp_path: Path, smallest: Path) -> None:
    write(tmp_path, "one.yaml", "seed: 1\nname: one\n")
    write(tmp_path, "two.yaml", "seed: 2\n")
    config = load_config(write(tmp_path, "a.yaml", f"extends: [{smallest.name}, one.yaml, two.yaml]\n")).config
    assert (config.seed, config.name) == (2, "one")


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path, smallest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "deep/er/b.yaml", "extends: ../../smallest.yaml\nseed: 5\n")
    write(tmp_path, "a.yaml", "extends: deep/er/b.yaml\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resolved = load_config("../a.yaml")
    assert resolved.config.seed == 5
    assert resolved.origins["seed"] == f"{Path('../deep/er/b.yaml')}:2"
    assert resolved.origins["train.steps"] == "../smallest.yaml:10"


def test_a_base_shared_by_two_bases_is_read_once(tmp_path: Path, smallest: Path) -> None:
    write(tmp_path, "one.yaml", "extends: smallest.yaml\nseed: 1\n")
    write(tmp_path, "two.yaml", "extends: smallest.yaml\nname: two\n")
    resolved = load_config(write(tmp_path, "a.yaml", "extends: [one.yaml, two.yaml]\n"))
    assert (resolved.config.seed, resolved.config.name) == (1, "two")
    assert [file.name for file in resolved.files] == ["a.yaml", "one.yaml", "smallest.yaml", "two.yaml"]


def test_files_that_extend_each_other_are_refused_naming_the_chain(tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "seed: 1\nextends: c.yaml\n")
    write(tmp_path, "c.yaml", "extends: [a.yaml]\n")
    assert str(the_problem(a)) == f"{c}:1: extends: the files extend each other in a circle: {a} -> {b} -> {c} -> {a}"


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "extends: ./a.yaml\n")
    assert the_problem(a).message == f"the files extend each other in a circle: {a} -> {a}"


def test_a_missing_base_names_who_extends_it_and_the_nearest_file(tmp_path: Path, smallest: Path) -> None:
    a = write(tmp_path, "a.yaml", "seed: 1\nextends: smalest.yaml\n")
    problem = the_problem(a)
    assert str(problem) == f"{tmp_path / 'smalest.yaml'}: no such file (extended by {a}:2); did you mean {smallest}?"


def test_what_a_broken_base_leaves_readable_is_still_checked(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "extends: gone.yaml\noptim: {lrr: 1, lr: -1}\n")
    assert [problem.key for problem in problems_of(a)] == ["optim.lrr", "optim.lr", ""]


@pytest.mark.parametrize("value", ["3", "[]", "", "[a.yaml, 3]", "{a: b}", "''"])
def test_extends_must_be_file_names(tmp_path: Path, value: str) -> None:
    problem = the_problem(write(tmp_path, "a.yaml", f"seed: 1\nextends: {value}\n"))
    assert (problem.line, problem.key, problem.message) == (2, "extends", "must be a file name or a list of them, relative to this file")


def test_extends_inside_a_section_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST + "log:\n  extends: b.yaml\n")
    assert str(the_problem(path)) == f"{path}:16: log.extends: extends stands at the top level of a file, not in a section"


def test_a_missing_file_suggests_the_nearest(tmp_path: Path, smallest: Path) -> None:
    assert str(the_problem(tmp_path / "smalest.yml")) == f"{tmp_path / 'smalest.yml'}: no such file; did you mean {smallest}?"
    assert the_problem(tmp_path / "smallest").nearest == str(smallest)


def test_a_missing_file_without_a_near_one_lists_what_is_there(tmp_path: Path, smallest: Path) -> None:
    assert the_problem(tmp_path / "qqq").message == f"no such file; {tmp_path} has smallest.yaml"
    assert the_problem(tmp_path / "no" / "x.yaml").message == f"no such file; there is no directory {tmp_path / 'no'}"
    (tmp_path / "void").mkdir()
    assert the_problem(tmp_path / "void" / "x.yaml").message == f"no such file; there is no .yaml file in {tmp_path / 'void'}"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n"])
def test_an_empty_file_is_one_message(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "a.yaml", text)
    assert str(the_problem(path)) == f"{path}: the file is empty; a config is a mapping of keys to values"


@pytest.mark.parametrize(("text", "kind"), [("- 1\n- 2\n", "a list"), ("hello\n", "a single value"), ("3\n", "a single value")])
def test_a_file_that_is_no_mapping_is_one_message(tmp_path: Path, text: str, kind: str) -> None:
    path = write(tmp_path, "a.yaml", text)
    assert str(the_problem(path)).startswith(f"{path}:1: holds {kind}; a config is a mapping of keys to values")


def test_a_tab_is_one_message_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "model:\n\tvocab_size: 3\n")
    assert str(the_problem(path)) == f"{path}:2: not valid YAML: a tab where YAML allows only spaces; indent with spaces"


def test_bytes_that_are_not_utf8_are_one_message_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"seed: 1\nname: caf\xe9\n")
    assert str(the_problem(path)) == f"{path}:2: byte 0xe9 is not UTF-8; save the file as UTF-8"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode())
    assert load_config(path).origins["optim.lr"] == f"{path}:14"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert the_problem(tmp_path).message == "is a directory; name a file in it"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_one_message(smallest: Path) -> None:
    smallest.chmod(0)
    assert the_problem(smallest).message == "cannot be read: Permission denied"


def test_a_path_through_a_file_is_one_message(smallest: Path) -> None:
    assert the_problem(smallest / "x.yaml").message == "cannot be read: Not a directory"


def test_a_section_without_lines_changes_nothing(tmp_path: Path, smallest: Path) -> None:
    path = write(tmp_path, "a.yaml", "extends: smallest.yaml\noptim:\n  # lr: 3\neval:\n")
    assert load_config(path).config == load_config(smallest).config


@pytest.mark.parametrize(("name", "reason"), [("loop.yaml", "Too many levels of symbolic links"), ("x" * 300, "File name too long")])
def test_a_name_that_the_system_refuses_is_one_message(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    path = write(tmp_path, "a.yaml", f"extends: {name}\n")
    assert str(the_problem(path)) == f"{tmp_path / name}: cannot be read: {reason} (extended by {path}:1)"


def test_a_name_with_a_null_character_is_one_message(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", 'extends: "b\\0.yaml"\n')
    problem = the_problem(path)
    assert (problem.file, problem.line) == (str(path), 1) and "cannot be the name of a file" in problem.message
