from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_llm.cli.main import main
from dist_llm.config.load import load_config
from dist_llm.planning import write
from dist_llm.planning.cluster import load_cluster
from dist_llm.planning.count_shapes import shape_params
from dist_llm.planning.rank_memory import memory_of
from dist_llm.planning.search import Search
from dist_llm.planning.shapes import from_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/tiny/llama.yaml"
GPUS = ("--gpus", "8xH100-80G")
Capture = pytest.CaptureFixture[str]


def plan(*words: object, code: int = 0) -> None:
    assert main(["plan", *map(str, words)]) == code


def answer(capsys: Capture, *words: object, code: int = 0) -> dict[str, Any]:
    plan(*words, "--json", code=code)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    return json.loads(said)  # type: ignore[no-any-return]


def refusal(capsys: Capture, *words: object) -> str:
    plan(*words, code=2)
    caught = capsys.readouterr()
    assert caught.out == "" and caught.err.count("\n") == 1
    return caught.err


def test_json_for_devices_and_days_says_model_tokens_and_layouts(capsys: Capture) -> None:
    said = answer(capsys, *GPUS, "--days", 2)
    model, best = said["model"], said["layouts"][0]
    assert model["params_total"] == model["params_active"] > 1e9
    assert said["flops"] == pytest.approx(6 * model["params_total"] * said["tokens"], rel=1e-6)
    assert 47.9 < best["hours"] <= 48
    assert best["hours"] == pytest.approx(best["steps"] * best["step_s"] / 3600)
    assert best["gpu_hours"] == pytest.approx(8 * best["hours"]) and best["jobs"] == 2
    assert best["step_interval_s"][0] < best["step_s"] < best["step_interval_s"][1]
    assert [row["step_s"] for row in said["layouts"]] == sorted(row["step_s"] for row in said["layouts"])
    assert len({(r["tp"], r["pp"], r["cp"], r["ep"]) for r in said["layouts"]}) == len(said["layouts"]) == 5
    for row in said["layouts"]:
        assert max(stage["total"] for stage in row["memory_of_stages"]) == row["memory_bytes"] <= 80e9
        assert row["memory_of_stages"][row["fullest_stage"]]["total"] == row["memory_bytes"]
        assert row["tp"] * row["pp"] * row["cp"] * row["dp"] == row["gpus"] == 8
        parts = row["compute_s"] + row["bubble_s"] + row["optimizer_s"] + row["straggler_s"]
        parts += sum(axis["seconds"] for axis in row["communication"].values())
        assert parts == pytest.approx(row["step_s"])
        assert 0.2 < row["mfu"] < 0.7
    low, high = said["law"]["params_within_0.01_nat"]
    assert low < model["params_total"] < high
    assert said["pareto"][0]["step_s"] == best["step_s"]
    assert {row["gpus"] for row in said["pareto"]} == {2, 4, 8}


def test_a_config_is_planned_with_its_own_batch_and_precision(capsys: Capture) -> None:
    said = answer(capsys, "--model", TINY, "--tokens", "1M", *GPUS)
    config = load_config(TINY).config
    shape = from_config(config.model, config.data.seq_len)
    assert said["model"]["params_total"] == shape_params(shape).total
    assert (said["batch_size"], said["precision"], said["tokens"]) == (8, "fp32", 1_000_000)
    best = Search(shape, 8, load_cluster("h100-80g"), 8, "fp32").best(1)[0]
    assert said["layouts"][0]["step_s"] == best.step.total_s
    assert said["layouts"][0]["memory_bytes"] == memory_of(shape, best.layout, precision="fp32").total


def test_without_devices_there_is_a_table_over_their_number(capsys: Capture) -> None:
    said = answer(capsys, "--params", "1B", "--tokens", "20B", "--days", 3)
    counts = [row["gpus"] for row in said["layouts"]]
    assert counts == [1 << k for k in range(15)]
    assert said["device"] == "H100-80G"
    first = said["smallest_in_time"]
    assert all((row["hours"] <= 72) >= (row["gpus"] >= first) for row in said["layouts"][: counts.index(first) + 1])
    plan("--params", "1B", "--tokens", "20B", "--days", 3)
    text = capsys.readouterr().out
    assert f"{first} devices are enough for 3 days" in text and "16,384" in text


def test_experts_are_planned_and_divided(capsys: Capture) -> None:
    said = answer(capsys, "--flops", "1e21", "--moe", "8x2", *GPUS)
    model = said["model"]
    assert model["params_total"] > 2 * model["params_active"] and model["num_experts"] == 8
    assert said["flops"] == pytest.approx(1e21, rel=1e-6)
    assert any(row["ep"] > 1 for row in said["layouts"])


def test_text_says_layouts_links_memory_and_what_was_left_out(capsys: Capture) -> None:
    plan("--params", "13B", "--tokens", "100B", "--gpus", "16xH100-80G")
    text = capsys.readouterr().out
    for words in (
        "law     L =", "90 % within", "MFU", "over the network", "stage 1", "GPU-hours", "does not fit even with one row",
        "parallel.zero: 2 would reduce gradients after every micro-batch", "what trades against what", "disk    a checkpoint",
    ):  # fmt: skip
        assert words in text
    assert re.search(r"tp\d+|pp\d+|zero\d", text)


def test_an_impossible_question_gets_a_no_with_the_smallest_cluster(capsys: Capture) -> None:
    question = ("--params", "1T", "--gpus", "1xV100-32G", "--gpu-memory", "16G", "--hours", 1)
    plan(*question, code=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("no: 996B parameters do not fit on 1 x V100") and "16.0 GB" in lines[0]
    assert lines[1].startswith("The smallest cluster that holds it: 2,048 x V100")
    assert "None of up to 16,384 is done in 1 hour" in lines[2]
    said = answer(capsys, *question, code=1)
    assert said["layouts"] == [] and said["impossible"]["reason"] == "memory"
    fits = said["impossible"]["fits"]
    assert fits["memory_bytes"] <= 16e9 and said["impossible"]["in_time"] is None
    half = Search(_shape(said), fits["gpus"] // 2, load_cluster("v100-32g"), said["batch_size"], limit_bytes=16e9)
    assert half.best(1) == []


def _shape(said: dict[str, Any]) -> Any:
    from dist_llm.planning.shapes import ModelShape

    return ModelShape(**{name: said["model"][name] for name in ModelShape.__dataclass_fields__})


def test_too_little_time_gets_a_no_with_the_cluster_that_would_do(capsys: Capture) -> None:
    said = answer(capsys, "--params", "7B", "--tokens", "100B", *GPUS, "--days", 5, code=1)
    no = said["impossible"]
    assert no["reason"] == "time" and said["layouts"][0]["hours"] > 120
    assert no["in_time"]["hours"] <= 120 and no["in_time"]["gpus"] > 8
    plan("--params", "7B", "--tokens", "100B", *GPUS, "--days", 5, code=1)
    assert "The smallest that is done in 5 days: " in capsys.readouterr().out


def test_a_batch_that_cannot_be_divided_is_a_no_with_the_rules(capsys: Capture) -> None:
    plan("--model", TINY, "--tokens", "1M", "--gpus", "7xH100-80G", code=1)
    text = capsys.readouterr().out
    assert text.startswith("no: the trainer has no layout") and "7 must divide model.num_heads (4)" in text and "--batch-size" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "64xH10O", "--days", "3"), "did you mean H100"),
        ((*GPUS, "--days", "-3"), "--days -3: must be above zero"),
        ((*GPUS, "--days", "soon"), "--days soon: not a number of days"),
        ((*GPUS,), "say what to plan"),
        ((), "say what to plan"),
        (("--flops", "1e22x"), "--flops 1e22x: not a number of FLOPs"),
        (("--flops", "1e22", "--params", "7B"), "--params and --flops both say which model"),
        (("--flops", "1e22", "--tokens", "1B"), "--flops says how many tokens already"),
        (("--flops", "1e8"), "less than the smallest"),
        ((*GPUS, "--days", "1", "--hours", "2"), "--days and --hours"),
        ((*GPUS, "--days", "1", "--tokens", "1B"), "--tokens needs a model"),
        (("--flops", "1e20", "--moe", "2x8"), "--moe 2x8"),
        (("--flops", "1e20", "--device", "H1000"), "no device is called H1000; did you mean H100"),
        (("--gpus", "12xH100-80G", "--days", "1"), "8 or 16 would"),
        ((*GPUS, "--days", "1", "--batch-size", "0"), "--batch-size must be at least 1"),
        ((*GPUS, "--days", "1", "--plot", "x.txt"), "--plot x.txt"),
        (("--flops", "1e20", "--write", "x"), "--write needs --gpus"),
        ((*GPUS, "--days", "1", "--moe", "8x2", "--write", "x"), "cannot train a mixture of experts yet"),
        (("--model", "no.yaml", "--tokens", "1B"), "no.yaml"),
        (("--params", "1e20", "--tokens", "1B"), "the ladder of shapes goes from"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line_and_exit_code_2(capsys: Capture, words: tuple[str, ...], said: str) -> None:
    assert said in refusal(capsys, *words)


def test_a_written_config_is_the_layout_and_the_trainer_accepts_it(capsys: Capture, tmp_path: Path) -> None:
    said = answer(capsys, "--gpus", "16xH100-80G", "--params", "13B", "--tokens", "100B", "--write", tmp_path / "run", "--name", "big")
    config = load_config(said["written"]["config"], ranks=16).config
    best = said["layouts"][0]
    p = config.parallel
    assert (p.tp, p.pp, p.cp, p.dp, p.zero, p.chunks, p.schedule) == tuple(
        best[k] for k in ("tp", "pp", "cp", "dp", "zero", "chunks", "schedule")
    )
    assert (config.train.micro_batch_size, config.train.batch_size, config.train.steps) == (
        best["micro_batch_size"], best["batch_size"], best["steps"],
    )  # fmt: skip
    assert config.name == "big" and config.optim.warmup_steps == 2000 and 1e-4 < config.optim.lr < 1e-3
    assert shape_params(from_config(config.model, config.data.seq_len)).total == said["model"]["params_total"]
    assert main(["config", "validate", said["written"]["config"], "--ranks", "16"]) == 0


def test_a_given_config_keeps_what_the_plan_does_not_decide(capsys: Capture, tmp_path: Path) -> None:
    said = answer(capsys, "--model", TINY, "--tokens", "1M", "--gpus", "4xH100-80G", "--write", tmp_path)
    config, before = load_config(said["written"]["config"], ranks=4).config, load_config(TINY).config
    assert config.model == before.model and config.seed == before.seed and config.precision == before.precision
    assert config.optim.model_copy(update={"warmup_steps": before.optim.warmup_steps}) == before.optim
    assert config.train.steps == -(-1_000_000 // (8 * 64))


def test_train_dry_run_accepts_a_written_config(capsys: Capture, corpus: Path, dist_llm: Any, tmp_path: Path) -> None:
    said = answer(capsys, "--gpus", "2xcpu", "--hours", "0.5", "--seq-len", "256", "--data", corpus, "--write", tmp_path)
    assert said["model"]["vocab_size"] == 512  # the corpus' own
    done = dist_llm("train", said["written"]["config"], "--dry-run", "--ranks", 2)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "words"), [("a b", "String should match"), ("", "String should match")])
def test_a_bad_name_is_refused_before_anything_is_written(capsys: Capture, tmp_path: Path, name: str, words: str) -> None:
    folder = tmp_path / "run"
    assert words in refusal(capsys, *GPUS, "--params", "1B", "--tokens", "1B", "--write", folder, "--name", name)
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_exit_code_74(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan(*GPUS, "--params", "1B", "--tokens", "1B", "--write", tmp_path / "file" / "run", code=74)
    assert "cannot make the directory" in capsys.readouterr().err


def test_a_changed_sbatch_template_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dist_llm.planning.amounts import parse_fleet

    script = write.sbatch_script(tmp_path / "c.yaml", parse_fleet("16xH100-80G"), name="n", job_hours=36.5)
    assert "#SBATCH --time=1-12:30:00\n" in script and "#SBATCH --nodes=2\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    assert "--gpus-per-node" not in write.sbatch_script(tmp_path / "c.yaml", parse_fleet("2xcpu"), name="n", job_hours=1)
    changed = tmp_path / "t.sbatch"
    changed.write_text((ROOT / "slurm/train.sbatch").read_text().replace("set -uo pipefail", "set -u"))
    monkeypatch.setattr(write, "_TEMPLATE", changed)
    with pytest.raises(AssertionError, match="it changed"):
        write.sbatch_script(tmp_path / "c.yaml", parse_fleet("2xcpu"), name="n", job_hours=1)


def test_scaling_curves_are_drawn(capsys: Capture, tmp_path: Path) -> None:
    plan("--model", TINY, "--tokens", "1M", *GPUS, "--plot", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_help_needs_little_time_and_neither_pydantic_nor_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "dist_llm", "plan", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--gpus" in done.stdout and "predict" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "pydantic", "numpy", "scipy", "matplotlib", "yaml"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 0.3


def test_a_plan_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from dist_llm.cli.main import main; main(['plan', '--flops', '1e20', '--gpus', '8xH100-80G']);"
        "sys.exit(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_every_cluster_description_can_be_planned_on(capsys: Capture) -> None:
    for path in sorted((ROOT / "configs/clusters").glob("*.yaml")):
        device = yaml.safe_load(path.read_text())["name"]
        said = answer(capsys, "--params", "100M", "--tokens", "1B", "--gpus", f"2x{device}", "--seq-len", 1024)
        assert said["layouts"] and said["layouts"][0]["hours"] > 0
