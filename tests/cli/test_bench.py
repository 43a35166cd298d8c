"""``dist-llm bench`` as a person runs it: one case of a kernel from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dist_llm.bench.kernels import rms_norm
from dist_llm.bench.kernels.case import raced
from dist_llm.cli.main import main
from dist_llm.kernels.impl import Impl
from tests.conftest import Run

Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "bench needs a CASE"),
        (["--all", "rms_norm"], "leave rms_norm out"),
        (["--threads", "1", "rms_norm"], "--threads belongs behind the case"),
        (["rms_norm", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--all", "--out", "no/such/place.md"], "the directory no/such is not there"),
    ],
)
def test_bad_arguments_get_one_message_and_status_2(dist_llm: Run, words: list[str], message: str) -> None:
    done = dist_llm("bench", *words)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_case_answers_with_the_documented_fields(dist_llm: Run) -> None:
    done = dist_llm("bench", "rms_norm", "--json", "--threads", 1, "--rounds", 1, "--peer", "eager")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["case"] == "rms_norm" and answer["ok"] and answer["threads"] == 1 and answer["peers"].keys() == {"eager"}
    assert answer["ratio"] == pytest.approx(answer["peers"]["eager"] / answer["ours_ms"])
    assert answer["pct_of_ceiling"] > 0 and 0 < answer["err"] <= 1.1 * answer["peer_err"] < 0.01
    assert [race["title"] for race in answer["races"]] == ["RMSNorm bf16 4096 x 1024", "RMSNorm bf16 3072 x 384"]
    assert "bench: rms_norm: RMSNorm bf16 4096 x 1024 (1 of 2)" in done.stderr


def slightly_off(norm: Norm) -> Norm:
    return lambda x, weight, eps: norm(x, (weight.float() * 1.01).to(weight.dtype), eps)


def not_a_number(norm: Norm) -> Norm:
    return lambda x, weight, eps: norm(x, weight, eps) * math.nan


@pytest.mark.parametrize("mistake", [slightly_off, not_a_number])
def test_ours_being_the_less_accurate_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mistake: Callable[[Norm], Norm]
) -> None:
    races = rms_norm.races

    def planted(table: tuple[Impl, ...], device: torch.device, dtype: torch.dtype) -> Impl:
        impl = raced(table, device, dtype)
        return replace(impl, fn=mistake(impl.fn))

    monkeypatch.setattr(rms_norm, "raced", planted)
    monkeypatch.setattr(rms_norm, "races", lambda device: races(device, tiny=True))
    words = ["bench", "rms_norm", "--json", "--rounds", "1", "--peer", "eager", "--malloc", "default", "--device", "cpu"]
    assert main(words) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["err"] == "inf" if mistake is not_a_number else answer["err"] > 2 * answer["peer_err"]
