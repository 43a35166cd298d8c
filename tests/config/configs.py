"""What the config tests share: a smallest valid config, and files written from text."""

from __future__ import annotations

import textwrap
from pathlib import Path

from dist_llm.config.load import ConfigErrors, Problem, load_config

ROOT = Path(__file__).resolve().parents[2]
TINY = sorted((ROOT / "configs" / "tiny").glob("*.yaml"))
GPT2, LLAMA = (ROOT / "configs" / "tiny" / name for name in ("gpt2.yaml", "llama.yaml"))

SMALLEST = """\
model:
  vocab_size: 300
  d_model: 16
  num_layers: 2
  num_heads: 4
  max_seq_len: 32
data:
  seq_len: 32
train:
  steps: 10
  batch_size: 8
  micro_batch_size: 2
optim:
  lr: 1e-3
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str, ranks: int | None = None) -> list[Problem]:
    """Every problem, or an empty list for a config that loads."""
    try:
        load_config(path, overrides, ranks=ranks)
    except ConfigErrors as errors:
        return list(errors.problems)
    return []


def the_problem(path: Path, *overrides: str, ranks: int | None = None) -> Problem:
    problems = problems_of(path, *overrides, ranks=ranks)
    assert len(problems) == 1, "\n".join(map(str, problems))
    return problems[0]
