"""`train --dry-run` shows the layout a launch would have, and refuses what it could not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_llm.engine.dry_run import resolve
from dist_llm.planning.memory import rank_memory
from tests.conftest import Run
from tests.engine.layout_program import config_at

LLAMA = "configs/tiny/llama.yaml"


def planned(corpus: Path, run_dir: Path, ranks: int, *words: str) -> dict[str, Any]:
    return resolve(config_at("llama", [f"data.path={corpus}", f"run_dir={run_dir}", *words]), ranks=ranks)


def test_the_grid_the_stages_and_the_rows_of_rank_0_are_those_of_the_layout(corpus: Path, tmp_path: Path) -> None:
    answer = planned(corpus, tmp_path / "run", 8, "parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true")
    layout = answer["layout"]
    assert {axis: layout[axis] for axis in ("tp", "cp", "dp", "pp")} == {"tp": 2, "cp": 1, "dp": 2, "pp": 2}
    assert (layout["zero"], layout["sequence_parallel"], layout["schedule"]) == (1, True, "1f1b")
    assert layout["stages"] == [[[0, 1]], [[2, 3]]]
    # 8 rows over two data-parallel ranks in micro-batches of 2: rank 0 has the first of each pair.
    assert answer["first_batch"]["rank_0_rows"] == [[0, 1], [4, 5]]
    assert not (tmp_path / "run").exists()


def test_interleaved_stages_are_dealt_out_in_turn(corpus: Path, tmp_path: Path) -> None:
    words = ("parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2")
    answer = planned(corpus, tmp_path / "run", 4, *words)
    assert answer["layout"]["stages"] == [[[0, 0], [2, 2]], [[1, 1], [3, 3]]]
    context = planned(corpus, tmp_path / "run", 4, "parallel.cp=2", "parallel.zero=2")
    assert (context["layout"]["cp"], context["layout"]["dp"], context["layout"]["cp_kind"]) == (2, 2, "ring")


def test_memory_is_that_of_the_fullest_rank_of_the_layout(corpus: Path, tmp_path: Path) -> None:
    words = ("parallel.tp=2", "parallel.pp=2")
    answer, alone = planned(corpus, tmp_path / "run", 8, *words), planned(corpus, tmp_path / "run", 1)
    expected = rank_memory(config_at("llama", list(words)), 8, plain=False)
    assert answer["memory_per_rank"]["total"] == expected.total
    assert 0 < answer["memory_per_rank"]["total_on_cpu"] < expected.total
    # A stage of two blocks and a head, halved by tp: above a quarter of the model, below a third.
    assert 0.25 < answer["memory_per_rank"]["parameters"] / alone["memory_per_rank"]["parameters"] < 0.34


def test_the_text_names_axes_engine_stages_and_offload(dist_llm: Run, corpus: Path, tmp_path: Path) -> None:
    words = (f"data.path={corpus}", f"run_dir={tmp_path / 'run'}", "parallel.tp=2", "parallel.pp=2", "parallel.offload_optimizer=cpu")
    done = dist_llm("train", LLAMA, "--dry-run", "--ranks", 8, *words)
    assert done.returncode == 0, done.stderr
    assert "8 rank(s) = tp 2 x dp 2 x pp 2, deepspeed, ZeRO-1, optimizer offloaded to cpu" in done.stdout
    assert "1f1b; layers 0-1 on rank 0; 2-3 on rank 1" in done.stdout and "on the fullest rank" in done.stdout
    as_json = dist_llm("train", LLAMA, "--dry-run", "--ranks", 8, "--json", *words)
    assert json.loads(as_json.stdout)["layout"]["pp"] == 2


@pytest.mark.parametrize(
    ("ranks", "words", "said"),
    [
        (8, ["parallel.tp=3"], "parallel.tp: 3 must divide model.num_heads (4)"),
        (6, ["parallel.tp=2", "parallel.pp=2"], "takes tp 2 x pp 2 = 4 ranks, and 6 were started"),
        (4, ["parallel.pp=2", "parallel.zero=2"], "with parallel.pp 2 use parallel.zero 1"),
        (8, ["parallel.pp=8"], "8 stages need as many layers, and model.num_layers is 4"),
        (4, ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2", "train.batch_size=12"], "needs a multiple of parallel.pp (2)"),
        (2, ["parallel.cp=2", "data.seq_len=62"], "data.seq_len (62) divisible by 4"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_with_the_rule(dist_llm: Run, tmp_path: Path, ranks: int, words: list[str], said: str) -> None:
    done = dist_llm("train", LLAMA, "--dry-run", "--ranks", ranks, f"run_dir={tmp_path / 'run'}", *words)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert said in done.stderr
