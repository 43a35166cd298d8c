from __future__ import annotations

from pathlib import Path

import pytest

from dist_llm.config.keys import KEYS
from dist_llm.config.load import load_config
from dist_llm.config.rules import RULES, problems_for_ranks
from dist_llm.config.schema import RunConfig

from .configs import ROOT, SMALLEST, problems_of, the_problem, write


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (
            ["model.d_model=18"],
            "model.d_model",
            "18 must be divisible by model.num_heads (4); change one of them, or give model.head_dim",
        ),
        (["model.num_kv_heads=3"], "model.num_kv_heads", "3 must divide model.num_heads (4)"),
        (["model.num_kv_heads=8"], "model.num_kv_heads", "8 must divide model.num_heads (4)"),
        (["model.head_dim=3"], "model.position", "must be even, not 3 = model.head_dim"),
        (["model.d_model=12"], "model.position", "must be even, not 3 = model.d_model (12) / model.num_heads (4)"),
        (["model.mup_base_head_dim=8"], "model.mup_base_head_dim", "8 has no meaning without muP; give model.mup_base_width as well"),
        (["data.seq_len=33"], "data.seq_len", "33 must be at most model.max_seq_len (32)"),
        (["train.batch_size=7"], "train.batch_size", "7 must be divisible by train.micro_batch_size (2); 6 or 8 would be"),
        (["train.micro_batch_size=16"], "train.batch_size", "8 must be divisible by train.micro_batch_size (16); 16 would be"),
        (
            ["parallel.dp=3"],
            "train.batch_size",
            "8 must be divisible by train.micro_batch_size (2) times parallel.dp (3) = 6; 6 or 12 would be",
        ),
        (["optim.warmup_steps=11"], "optim.warmup_steps", "11 must be at most train.steps (10)"),
        (
            ["optim.schedule=wsd", "optim.warmup_steps=6", "optim.decay_steps=5"],
            "optim.decay_steps",
            "5 and optim.warmup_steps (6) together must be at most train.steps (10)",
        ),
        (
            ["optim.schedule=wsd", "optim.warmup_steps=9"],
            "optim.decay_steps",
            "2 (the default, a fifth of the run) and optim.warmup_steps (9) together must be at most train.steps (10)",
        ),
        (["optim.decay_steps=2"], "optim.decay_steps", "2 has no meaning with optim.schedule cosine; use optim.schedule wsd"),
        (["train.engine=plain", "parallel.zero=2"], "parallel.zero", "2 cannot be had with train.engine plain"),
        (["train.engine=plain", "parallel.zero=3"], "parallel.zero", "3 cannot be had with train.engine plain"),
        (["train.engine=plain", "parallel.dp=2"], "train.engine", "plain runs on one rank, and parallel asks for 2"),
        (["parallel.tp=3"], "parallel.tp", "3 must divide model.num_heads (4)"),
        (["parallel.tp=4", "model.num_kv_heads=4", "model.ffn_dim=66"], "parallel.tp", "4 must divide the MLP's inner width (66)"),
        (["parallel.sequence_parallel=true"], "parallel.sequence_parallel", "needs parallel.tp of at least 2"),
        (["parallel.cp=3", "train.batch_size=24"], "parallel.cp", "divisible by 6"),
        (["parallel.cp=4", "parallel.tp=2", "parallel.cp_kind=all_to_all"], "parallel.cp", "cannot exchange the 2 heads"),
        (["parallel.pp=100"], "parallel.pp", "100 stages need as many layers"),
        (["parallel.chunks=2"], "parallel.chunks", "only with parallel.schedule interleaved"),
        (["parallel.schedule=interleaved"], "parallel.schedule", "of at least 2"),
        (["parallel.pp=2", "parallel.zero=3"], "parallel.zero", "use parallel.zero 1"),
        (["parallel.offload_parameters=cpu"], "parallel.zero", "needs parallel.zero 3"),
        (["parallel.recompute_layers=2"], "parallel.recompute_layers", "no meaning with parallel.recompute none"),
    ],
)
def test_a_broken_rule_names_both_keys_and_values(smallest: Path, overrides: list[str], key: str, message: str) -> None:
    problem = the_problem(smallest, *overrides)
    assert problem.key == key and message in problem.message
    assert problem.file in ("command line", str(smallest))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.d_model=18", "model.head_dim=6"],
        ["model.num_kv_heads=1"],
        ["model.num_kv_heads=4"],
        ["model.head_dim=3", "model.position=learned"],
        ["data.seq_len=31"],
        ["train.micro_batch_size=8"],
        ["parallel.dp=4"],
        ["optim.warmup_steps=10"],
        ["optim.schedule=wsd", "optim.warmup_steps=5", "optim.decay_steps=5"],
        ["optim.schedule=wsd", "optim.warmup_steps=8"],
        ["train.engine=plain"],
        ["train.engine=plain", "parallel.zero=1", "parallel.dp=1"],
        ["train.engine=deepspeed", "parallel.zero=3"],
    ],
)
def test_what_keeps_the_rules_is_accepted(smallest: Path, overrides: list[str]) -> None:
    assert problems_of(smallest, *overrides) == []


def test_a_broken_rule_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", SMALLEST.replace("num_heads: 4", "num_heads: 3"))
    assert str(the_problem(path)).startswith(f"{path}:3: model.d_model: 16 must be divisible by model.num_heads (3)")


def test_a_rule_broken_by_a_default_points_at_the_key_that_was_given(smallest: Path) -> None:
    # model.position is rotary by default; what a person can change is the override.
    problem = the_problem(smallest, "model.head_dim=5")
    assert (problem.key, problem.file) == ("model.position", "command line")


def test_a_rule_is_left_out_when_a_key_it_reads_is_bad(smallest: Path) -> None:
    # d_model has no value to divide: only that is said, and the rule of the rows beside it still is.
    keys = [problem.key for problem in problems_of(smallest, "model.d_model=x", "data.seq_len=99")]
    assert sorted(keys) == ["data.seq_len", "model.d_model"]


def test_rules_are_left_out_when_a_whole_section_is_bad(smallest: Path) -> None:
    assert [problem.key for problem in problems_of(smallest, "model=3")] == ["model"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.broken_by.__name__)
def test_a_rule_reads_only_the_keys_it_names(rule: object) -> None:
    config = load_config(ROOT / "configs" / "tiny" / "packed.yaml").config
    bare = config.model_copy(deep=True)
    for key in set(KEYS) - set(rule.keys):  # type: ignore[attr-defined]
        *sections, name = key.split(".")
        owner = bare
        for section in sections:
            owner = getattr(owner, section)
        del owner.__dict__[name]
    assert rule.broken_by(bare) is None  # type: ignore[attr-defined]


def test_a_bare_config_gives_away_a_key_that_a_rule_does_not_name() -> None:
    model = load_config(ROOT / "configs" / "tiny" / "packed.yaml").config.model.model_copy()
    del model.__dict__["num_heads"]
    with pytest.raises(AttributeError, match="num_heads"):
        _ = model.num_heads


def smallest_config(path: Path, *overrides: str) -> RunConfig:
    return load_config(path, overrides).config


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_that_divide_the_batch_fit(smallest: Path, ranks: int) -> None:
    assert problems_for_ranks(smallest_config(smallest), ranks) == []


@pytest.mark.parametrize(("ranks", "fits"), [(3, "6 or 12"), (8, "16")])
def test_a_batch_not_divisible_by_the_ranks_is_refused(smallest: Path, ranks: int, fits: str) -> None:
    (problem,) = problems_for_ranks(smallest_config(smallest), ranks)
    portion = 2 * ranks
    message = f"8 must be divisible by train.micro_batch_size (2) times ranks ({ranks}) = {portion}; {fits} would be"
    assert (problem.key, problem.message) == ("train.batch_size", message)


def test_dp_must_equal_the_ranks_started(smallest: Path) -> None:
    (problem,) = problems_for_ranks(smallest_config(smallest, "parallel.dp=2"), 4)
    assert str(problem) == "parallel.dp: 2 must equal the number of ranks started (4); start 2, or leave parallel.dp out to use all"
    assert problems_for_ranks(smallest_config(smallest, "parallel.dp=4"), 4) == []


def test_the_plain_engine_is_refused_on_several_ranks(smallest: Path) -> None:
    (problem,) = problems_for_ranks(smallest_config(smallest, "train.engine=plain"), 2)
    assert problem.key == "train.engine" and "plain runs on one rank, and 2 were started" in problem.message


def test_no_ranks_is_a_mistake_of_the_caller(smallest: Path) -> None:
    with pytest.raises(ValueError, match="world_size must be at least 1, not 0"):
        problems_for_ranks(smallest_config(smallest), 0)


def test_ranks_are_checked_with_file_and_line_beside_everything_else(smallest: Path) -> None:
    problems = problems_of(smallest, "seed=-1", ranks=3)
    assert str(problems[0]).startswith(f"{smallest}:11: train.batch_size: 8 must be divisible")
    assert [problem.key for problem in problems] == ["train.batch_size", "seed"]


def test_dp_and_ranks_complain_about_the_batch_once(smallest: Path) -> None:
    assert the_problem(smallest, "parallel.dp=3", ranks=3).key == "train.batch_size"
