from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dist_llm.planning.accuracy import accuracy_of, percentile
from dist_llm.planning.calibrate import Prediction, fit_calibration, fit_scale, predict_runs
from dist_llm.planning.calibration import CALIBRATION
from dist_llm.planning.published import Run, SkipRow, parse_row, read_rows
from dist_llm.utils.errors import DataError

TABLE = Path(__file__).parents[1] / "data" / "published_runs.csv"
ROWS = {row["id"]: row for row in read_rows(TABLE)}


def runs_of(rows: dict[str, dict[str, str]]) -> list[Run]:
    runs = []
    for row in rows.values():
        try:
            runs.append(parse_row(row))
        except SkipRow:
            continue
    return runs


@pytest.fixture(scope="module")
def predictions() -> list[Prediction]:
    return predict_runs(runs_of(ROWS))


def test_only_doubtful_rows_and_rows_without_layout_or_architecture_are_skipped() -> None:
    reasons: dict[str, list[str]] = {}
    for row in ROWS.values():
        try:
            parse_row(row)
        except SkipRow as reason:
            reasons.setdefault(str(reason), []).append(row["id"])
    assert len(reasons.pop("marked doubtful")) == 6
    assert reasons == {
        "tp is not given": ["mlm-h100-177B-strong-96", "deepseek-v3-h800"],
        "n_layers is not given": ["moefold-Qwen2-57B-A14B-MCore", "moefold-Qwen2-57B-A14B-MCore+Folding"],
    }


def test_published_runs_are_predicted(predictions: list[Prediction]) -> None:
    accuracy = accuracy_of(predictions)
    assert accuracy.rows == 329
    assert accuracy.median <= 0.10
    assert accuracy.p90 <= 0.25
    assert accuracy.pairs >= 150
    assert accuracy.order >= 0.75


@pytest.mark.parametrize("generation", ["ampere", "hopper", "blackwell"])
def test_no_generation_is_predicted_badly(predictions: list[Prediction], generation: str) -> None:
    errors = [abs(p.rel_err) for p in predictions if p.run.cluster.generation == generation]
    assert percentile(errors, 0.5) <= 0.15
    assert percentile(errors, 0.9) <= 0.40


def test_a_document_does_not_enter_its_own_predictions(predictions: list[Prediction]) -> None:
    # Twice the published step times of one document: its predictions stay, others on the generation may move.
    def slower(run: Run) -> Run:
        return replace(run, measured=run.measured * (2.0 if run.unit == "s/iter" else 0.5)) if "llm-foundry" in run.source else run

    changed = predict_runs([slower(p.run) for p in predictions])
    for before, after in zip(predictions, changed, strict=True):
        if "llm-foundry" in before.run.source:
            assert after.seconds == pytest.approx(before.seconds, rel=1e-12)


def test_the_shipped_constants_are_those_of_the_fit(predictions: list[Prediction]) -> None:
    fitted = fit_calibration([p.run for p in predictions])
    assert set(fitted) == set(CALIBRATION)
    for generation, shipped in CALIBRATION.items():
        assert fitted[generation].scale == pytest.approx(shipped.scale, abs=0.002)  # three digits are shipped
        assert fitted[generation].spread == pytest.approx(shipped.spread, abs=0.002)


def test_a_table_of_one_row_does_not_predict_itself() -> None:
    row = {**ROWS["bridge-25.11-LLAMA3_8B-B200-FP8-CS-8-gbs128"], "measured": "1000"}
    (prediction,) = predict_runs([parse_row(row)])
    assert prediction.predicted > 10_000


def test_documents_weigh_the_same_whatever_their_rows() -> None:
    many = [("a", math.log(1.0))] * 99
    assert fit_scale([*many, ("b", math.log(4.0))]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("nemo2407-LLAMA2-7B-8", 779.0),  # model FLOPs with the whole square of attention
        ("bridge-25.11-LLAMA3_8B-H100-FP8-CS-8-gbs128", 744.0),  # with its causal half
        ("bridge-26.06-LLAMA3.1_405B-GB200-FP8-256-gbs1536", 2129.0),
        ("gpt-neox-20B", 117.0),
    ],
)
def test_printed_flops_are_counted_as_their_source_counts(name: str, printed: float) -> None:
    run = parse_row(ROWS[name])
    flops = run.flops_per_token * run.layout.global_batch * run.model.seq_len / run.layout.ranks / run.measured_s
    assert flops / 1e12 == pytest.approx(printed, rel=0.03)


def test_hardware_flops_follow_the_papers_formula() -> None:
    # Narayanan et al., arXiv:2104.04473, equation 3: 96 B s l h^2 (1 + s/6h + V/16lh).
    run = parse_row(ROWS["sc21-t2-PTD-P-174.6B-768"])
    m = run.model
    paper = 96 * m.num_layers * m.d_model**2 * (1 + m.seq_len / (6 * m.d_model) + m.vocab_size / (16 * m.num_layers * m.d_model))
    assert run.flops_per_token == pytest.approx(paper, rel=1e-9)


def test_rates_and_times_convert_back_and_forth() -> None:
    for name in ("sc21-t1-1.7B", "megascale-530B-MegaScale-4480", "mpt-7b-H100-8-s4096-bf16-gbs256", "mtnlg-530B-2800"):
        run = parse_row(ROWS[name])
        assert run.seconds_or_unit(run.measured_s) == pytest.approx(run.measured)


def test_gpt_neox_counts_the_recomputed_forward() -> None:
    run = parse_row(ROWS["gpt-neox-20B"])
    assert run.flops_per_token > 7.5 * run.weight_flops_per_token / 6


def test_what_a_row_leaves_unsaid_gets_the_frameworks_default() -> None:
    titan = parse_row(ROWS["titan-T5-405B-1F1B"])
    assert titan.layout.num_micro == 8  # torchtitan: as many micro-batches as stages
    megatron = parse_row(ROWS["mlm-h100-314B"])
    assert megatron.layout.micro_batch == 1
    assert parse_row({**ROWS["sc21-t1-39B"], "recompute": ""}).layout.recompute == "full"  # counted, hence done
    assert parse_row({**ROWS["sc21-t1-39B"], "dp": ""}).layout.dp == 32
    assert parse_row({**ROWS["sc21-t1-39B"], "ffn_hidden": ""}).model.ffn_dim == 32768


def test_low_rank_attention_and_odd_heads_are_read() -> None:
    deepseek = parse_row(ROWS["bridge-26.06-DeepSeekV3-GB300-MXFP8-256-gbs15360"]).model
    # 671 B parameters, 37 B active, with one more layer for multi-token prediction beside (arXiv:2412.19437).
    total = deepseek.num_layers * deepseek.attention_weights + 3 * deepseek.mlp_weights + 2 * deepseek.head_weights
    total += deepseek.moe_layers * (257 * deepseek.expert_weights + deepseek.router_weights)
    assert total == pytest.approx(671e9, rel=0.005)
    oss = parse_row(ROWS["bridge-26.06-GPTOSS120B-GB300-MXFP8-64-gbs1280"]).model
    assert oss.head_dim == 64
    qwen = parse_row(ROWS["bridge-26.08-Qwen3_30B_a3B-GB300-MXFP8-8-gbs512"]).model
    assert (qwen.head_dim, qwen.expert_ffn, qwen.moe_layers) == (128, 768, 48)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"note": "[doubtful] a rumour"}, "marked doubtful"),
        ({"hardware": "MI300X"}, "no cluster description for hardware 'MI300X'"),
        ({"hardware": "GH200 96G"}, "no cluster description"),
        ({"hardware": ""}, "no cluster description for hardware ''"),
        ({"unit": "parsecs"}, "unit 'parsecs' is not one of"),
        ({"measured": ""}, "measured is not given"),
        ({"measured": "-3"}, "measured must be finite and not negative"),
        ({"measured": "nan"}, "measured must be finite"),
        ({"hidden": "wide"}, "hidden 'wide' is not a number"),
        ({"dp": "7"}, "is not 512 GPUs"),
        ({"kv_heads": "5"}, "must be a multiple of num_kv_heads"),
        ({"moe": "many"}, "is not experts/top-k/shared"),
        ({"precision": "int2"}, "precision 'int2' is not one of"),
        ({"recompute": "sometimes"}, "recompute 'sometimes'"),
        ({"micro_batch": "", "global_batch_seqs": ""}, "neither micro_batch nor global_batch_seqs"),
    ],
)
def test_a_row_that_cannot_be_predicted_says_why(change: dict[str, str], reason: str) -> None:
    with pytest.raises(SkipRow, match=reason):
        parse_row({**ROWS["sc21-t1-39B"], **change})


@pytest.mark.parametrize("name", ["sc21-t1-39B", "bridge-26.06-DeepSeekV3-GB300-MXFP8-256-gbs15360", "fms-l2-7b-H100", "titan-T6-405B-cp8"])
def test_any_field_may_be_blank_or_garbage_without_a_crash(name: str) -> None:
    for column in ROWS[name]:
        for text in ("", "?", "0", "-1", "1e400", "3.7", "full"):
            try:
                run = parse_row({**ROWS[name], column: text})
            except SkipRow as reason:
                assert str(reason)
            else:
                assert math.isfinite(predict_runs([run])[0].predicted)


def test_a_table_with_the_named_columns_only_is_read(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("id,hardware,measured,unit\na,H100,1,s/iter\n", encoding="utf-8")
    (row,) = read_rows(path)
    with pytest.raises(SkipRow, match="is not given"):
        parse_row(row)


@pytest.mark.parametrize(("text", "message"), [("id,measured\na,1\n", "missing column hardware, unit"), ("", "missing column id")])
def test_a_table_without_its_columns_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "none.csv")
    path = tmp_path / "runs.csv"
    path.write_bytes(b"id,hardware\n\xff\xfe\x00")
    with pytest.raises(DataError, match="not a CSV in UTF-8"):
        read_rows(path)
