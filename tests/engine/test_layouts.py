"""The same run at any layout: its curve, and its checkpoints, which go on at any other one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dist_llm.parallel.ranks import run_on_ranks
from tests.engine.layout_program import ALONE, SAVED_AT, Curve, checkpoints_at_layouts, config_at, continued, whole_run
from tests.engine.processes import complete, launched, numbers, records, train_command

LLAMA = "configs/tiny/llama.yaml"
STEPS = 100

# On 4 ranks; "packed" has document masks, a tied embedding and one key-value head, of which tensor-parallel ranks hold copies.
OWN = {
    "tp2-pp2": ("packed", ["parallel.tp=2", "parallel.pp=2", "parallel.zero=0"]),
    "dp4-zero1": ("packed", ["parallel.zero=1"]),
    "tp2-sp-dp2-zero3": ("packed", ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.zero=3"]),
    "cp2-ring-dp2-zero2": ("packed", ["parallel.cp=2", "parallel.zero=2"]),
    "pp2-interleaved-dp2": ("packed", ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2", "parallel.zero=1"]),
}
CROSSINGS = [
    *(("plain", name) for name in ("tp2-pp2", "tp2-sp-dp2-zero3", "pp2-interleaved-dp2")),
    *(("tp2-pp2", name) for name in OWN if name != "tp2-pp2"),
    *((name, "tp2-pp2") for name in OWN if name != "tp2-pp2"),
]


def worst(ours: Curve, theirs: Curve) -> float:
    """Largest relative difference of a loss."""
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for (a, _), (b, _) in zip(ours, theirs, strict=True))


def test_a_run_under_the_launcher_at_tp2_pp2_follows_the_curve_of_one_process(corpus: Path, tmp_path: Path) -> None:
    words = [
        LLAMA,
        f"data.path={corpus}",
        f"train.steps={STEPS}",
        "train.batch_size=4",  # two micro-batches a step
        "optim.eps=1e-5",
        "train.threads=1",
        "log.every=1000",
        "checkpoint.every=50",
    ]
    plain, divided, log = tmp_path / "plain", tmp_path / "tp2-pp2", tmp_path / "log"
    assert complete(train_command(*words, f"run_dir={plain}"), log) == 0, log.read_text()[-3000:]
    layout = ("parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true")
    assert complete(launched(*words, f"run_dir={divided}", *layout, ranks=4), log) == 0, log.read_text()[-3000:]
    ours, theirs = numbers(divided), numbers(plain)
    assert [step for step, _, _ in ours] == list(range(1, STEPS + 1)) == [step for step, _, _ in theirs]
    difference = max(abs(a - b) / b for (_, a, _), (_, b, _) in zip(ours, theirs, strict=True))
    print(f"largest relative difference of a loss over {STEPS} steps: {difference:.1e}")
    assert theirs[-1][1] < 0.8 * theirs[0][1]  # it has learnt something
    # Rounding (6e-8 a sum) grows with the steps as training amplifies it; a mistake in a gradient is orders of magnitude more.
    assert difference < 1e-4
    (mine,), (other,) = records(divided, "eval"), records(plain, "eval")
    assert mine["tokens"] == other["tokens"] and mine["bytes"] == other["bytes"]
    assert abs(mine["loss"] - other["loss"]) < 1e-4 * other["loss"]

    # Its checkpoint goes on in one process: the second half of the curve again.
    (divided / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").unlink()
    assert complete(train_command(*words, f"run_dir={divided}"), log) == 0, log.read_text()[-3000:]
    assert "going on from" in log.read_text()
    again = numbers(divided)
    assert [step for step, _, _ in again] == list(range(1, STEPS + 1))
    assert max(abs(a - b) / b for (_, a, _), (_, b, _) in zip(again, theirs, strict=True)) < 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def plain(root: Path) -> Curve:
    """One process, never interrupted."""
    return whole_run(config_at("packed", []), ALONE, root / "plain")


@pytest.fixture(scope="module")
def divided(root: Path, plain: Curve) -> list[tuple[dict[str, Curve], dict[str, Curve]]]:
    """All layouts in one launch."""
    return run_on_ranks(checkpoints_at_layouts, dp=4, args=(str(root), OWN, CROSSINGS), deadline_s=180)


def test_every_layout_takes_the_steps_of_one_process(divided: list[tuple[dict[str, Curve], dict[str, Curve]]], plain: Curve) -> None:
    whole, _ = divided[0]
    assert all(answer == divided[0] for answer in divided)  # every rank reports the same numbers
    errors = {name: worst(curve, plain) for name, curve in whole.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    # A few fp32 roundings of a loss, over ten steps.
    assert max(errors.values()) < 1e-6, errors


def test_going_on_at_the_same_layout_gives_the_same_digits(divided: list[tuple[dict[str, Curve], dict[str, Curve]]]) -> None:
    whole, rest = divided[0]
    for name in OWN:
        assert rest[f"{name} > {name}"] == whole[name][SAVED_AT:], name


def test_a_checkpoint_of_any_layout_goes_on_at_any_other(
    divided: list[tuple[dict[str, Curve], dict[str, Curve]]], plain: Curve, root: Path
) -> None:
    _, rest = divided[0]
    for origin in OWN:  # and in one process
        rest[f"{origin} > plain"] = continued(config_at("packed", []), ALONE, root / origin / f"step-{SAVED_AT:08d}")
    errors = {crossing: worst(curve, plain[SAVED_AT:]) for crossing, curve in rest.items()}
    assert len(errors) == len(OWN) + len(CROSSINGS) + len(OWN)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-6, errors


def test_checkpoint_files_hold_the_same_logical_tensors_whatever_wrote_them(
    divided: list[tuple[dict[str, Curve], dict[str, Curve]]], root: Path
) -> None:
    del divided
    directory = f"step-{SAVED_AT:08d}"
    reference = {path.name: load_file(path) for path in sorted((root / "plain" / directory).glob("*.safetensors"))}
    assert {name.split("-")[0] for name in reference} == {"weights", "exp_avg", "exp_avg_sq"}
    for layout in OWN:
        assert {path.name for path in (root / layout / directory).glob("*.safetensors")} == set(reference), layout
        for file, tensors in reference.items():
            theirs = load_file(root / layout / directory / file)
            assert {n: (t.shape, t.dtype) for n, t in theirs.items()} == {n: (t.shape, t.dtype) for n, t in tensors.items()}
            largest = max(float(t.abs().max()) for t in tensors.values())
            for name, tensor in tensors.items():
                scale = max(float(tensor.abs().max()), 1e-3 * largest)
                # Sums in another order in each of five steps; a second moment squares the error of a gradient.
                assert float((theirs[name] - tensor).abs().max()) < 1e-5 * scale, (layout, file, name)
    manifests = {json.loads((root / layout / directory / "manifest.json").read_text())["step"] for layout in OWN}
    assert manifests == {SAVED_AT}
