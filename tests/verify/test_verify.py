"""``dist-llm verify``: every layout computes what one process computes, and what the command says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_llm.config.write import config_hash
from dist_llm.topology.layout import STANDARD, Layout, parse_layout
from dist_llm.verify.run import TOLERANCES, Verification, verify_layouts
from dist_llm.verify.shrink import shrink
from tests.conftest import ROOT, Run
from tests.verify.verifying import TOLERANCE, tiny

LLAMA = ROOT / "configs" / "tiny" / "llama.yaml"
# One launch of each world size, and of each size what is least like the others.
_SOME = ("recompute-full", "tp2-sp", "pp2", "cp2-ring", "cp2-a2a", "zero3-dp2", "tp4", "tp2-pp2", "tp2-zero1-dp2")


def _layouts(names: tuple[str, ...]) -> list[Layout]:
    return [parse_layout(name) for name in names]


def _differing(result: Verification) -> dict[str, object]:
    return {str(o.layout): o.difference or o.error for o in result.outcomes if not o.holds(result.tolerance)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "packed"])
def test_the_whole_certificate_of_a_tiny_config_holds(name: str, dist_llm: Run, tmp_path: Path) -> None:
    done = dist_llm("verify", ROOT / f"configs/tiny/{name}.yaml", "--json", "--out", tmp_path / "c.json", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is True and answer["refused"] == []
    layouts = {layout["layout"]: layout for layout in answer["layouts"]}
    assert layouts.keys() == {"single", *map(str, STANDARD)} and len(layouts) >= 12
    for layout in layouts.values():
        assert layout["ok"] is True and layout["differs_first"] is None, layout
        figures = [layout[figure] for figure in ("loss", "grad_norm", "gradient", "weight")]
        assert layout["max_rel_err"] == max(figures) <= TOLERANCE
        assert layout["worst"] in (layout["gradient_of"], layout["weight_of"])
    # Sums in another order do not agree to the last digit (a pipeline has the same order): what is compared has really been divided.
    assert all(layouts[divided]["max_rel_err"] > 0 for divided in ("tp2", "cp2-ring", "cp2-a2a", "zero1-dp2", "zero3-dp4"))

    certificate = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    config = tiny(name)
    assert {key: certificate[key] for key in answer} == answer
    assert (certificate["config"], certificate["config_sha256"]) == (config.name, config_hash(config))
    assert certificate["compared_as"] == shrink(config).model_dump(mode="json")
    assert {"dist_llm", "torch", "deepspeed"} <= certificate["code"].keys()
    assert certificate["seconds"] > 0 and certificate["written"].endswith("Z")


def test_layers_with_a_window_compute_the_same_and_a_ring_is_refused() -> None:
    small = shrink(tiny("banded"))
    names = ("recompute-full", "tp2-sp", "pp2", "cp2-a2a", "zero3-dp2", "tp4", "pp4", "tp2-pp2", "tp2-cp2-a2a")
    result = verify_layouts(small, _layouts((*names, "cp2-ring", "tp2-cp2-ring")))
    assert _differing(result) == {} and result.ok and [str(o.layout) for o in result.outcomes] == list(names)
    assert {str(layout) for layout, _ in result.refused} == {"cp2-ring", "tp2-cp2-ring"}
    assert all("model.window: 12 cannot be had with parallel.cp (2) in a ring" in reason for _, reason in result.refused)


def test_with_dropout_layouts_drop_the_same_elements() -> None:
    result = verify_layouts(shrink(tiny("llama", "model.dropout=0.1")), _layouts(_SOME))
    assert _differing(result) == {} and len(result.outcomes) == len(_SOME)


def test_an_interleaved_pipeline_computes_the_same() -> None:
    names = ("pp2-interleaved2", "pp2-interleaved2-recompute-full", "tp2-pp2-interleaved2", "pp2-interleaved2-zero1-dp2")
    result = verify_layouts(shrink(tiny("gpt2")), _layouts(names))
    assert _differing(result) == {} and len(result.outcomes) == len(names)


def test_in_bf16_layouts_differ_by_its_rounding_and_no_more() -> None:
    small = shrink(tiny("llama")).model_copy(update={"precision": "bf16"})
    result = verify_layouts(small, _layouts(("tp2", "tp2-sp", "pp2", "cp2-ring", "zero1-dp2", "zero3-dp2")))
    assert _differing(result) == {} and result.tolerance == TOLERANCES["bf16"]
    spread = {str(o.layout): o.difference.largest for o in result.outcomes if o.difference is not None}
    # It was bf16 that was compared: sums of what was rounded to 8 bits do not agree to 1e-5.
    assert spread["tp2"] > 1e-4 and spread["cp2-ring"] > 1e-4, spread


def test_what_cannot_be_had_is_said_before_anything_runs_and_is_no_success(dist_llm: Run, tmp_path: Path) -> None:
    done = dist_llm("verify", LLAMA, "--json", "--layout", "pp2-zero3", "--layout", "tp3", "--out", tmp_path / "c.json")
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    reasons = {refused["layout"]: refused["reason"] for refused in answer["refused"]}
    assert answer["ok"] is False and answer["layouts"] == []
    assert "gather the parameters of a stage anew" in reasons["pp2-zero3"] and "use parallel.zero 1" in reasons["pp2-zero3"]
    assert "must divide model.num_heads (4)" in reasons["tp3"] and "1, 2 or 4 would" in reasons["tp3"]
    assert "2 cannot be had with this config" in done.stderr


def test_a_layout_beyond_the_tolerance_is_exit_code_1_and_says_what_differs_first(dist_llm: Run, tmp_path: Path) -> None:
    words = ("verify", LLAMA, "--layout", "tp2", "--tolerance", "1e-12", "--out", tmp_path / "c.json")
    done = dist_llm(*words, "--json")
    assert done.returncode == 1
    (layout,) = json.loads(done.stdout)["layouts"]
    assert layout["ok"] is False and layout["differs_first"].startswith("output of ")
    assert f"differs first: {layout['differs_first']}" in done.stderr
    # A second run replaces the certificate of the first.
    assert dist_llm(*words[:-3], "1e-5", *words[-2:]).returncode == 0
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["ok"] is True


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--layout", "tp2-pq2"], 2, "no word pq2"),
        (["--layout", "sp"], 2, "needs tp of at least 2"),
        (["--tolerance", "0"], 2, "must be more than 0"),
        (["model.num_headz=4"], 2, "num_heads"),
        (["--out", "no/such/directory/c.json"], 74, "no/such/directory"),
        (["--out", "."], 74, "is a directory"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_at_once(words: list[str], code: int, said: str, dist_llm: Run, tmp_path: Path) -> None:
    done = dist_llm("verify", LLAMA, *words, cwd=tmp_path, timeout=20)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not (tmp_path / "certificate.json").exists()
