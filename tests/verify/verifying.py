"""What the tests of ``dist-llm verify`` share: small copies of the tiny configs, and a comparison with planted mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from dist_llm.config.load import load_config
from dist_llm.config.schema import RunConfig
from dist_llm.parallel.ranks import run_on_ranks
from dist_llm.topology.layout import parse_layout
from dist_llm.verify.figures import Difference
from dist_llm.verify.program import plain_program
from dist_llm.verify.run import TOLERANCES, Outcome
from dist_llm.verify.shrink import apply_layout, refusal, shrink
from tests.conftest import ROOT
from tests.verify.mutants import mutants_program

TOLERANCE = TOLERANCES["fp32"]


def tiny(name: str, *overrides: str) -> RunConfig:
    """The tiny config of that name."""
    return load_config(str(ROOT / "configs" / "tiny" / f"{name}.yaml"), list(overrides)).config


def verify_mutants(config: RunConfig, cases: Iterable[tuple[str, str]], directory: Path) -> dict[tuple[str, str], Outcome]:
    """What verify finds at each pair of a mutant and a layout's name: all pairs of a world size in one launch."""
    small = shrink(config)
    layouts = {case: parse_layout(case[1]) for case in cases}
    for case, layout in layouts.items():
        assert (reason := refusal(small, layout)) is None, f"{case}: {reason}"
    plain, done = str(directory / "plain.safetensors"), str(directory / "done")
    run_on_ranks(plain_program, args=(small.model_dump(mode="json"), plain))
    outcomes = {}
    for world_size in sorted({layout.world_size for layout in layouts.values()}):
        these = [case for case in layouts if layouts[case].world_size == world_size]
        planted = [(mutant, apply_layout(small, layouts[mutant, name]).model_dump(mode="json")) for mutant, name in these]
        answers = run_on_ranks(mutants_program, dp=world_size, args=(planted, plain, TOLERANCE, done), deadline_s=60.0 + 20.0 * len(these))[
            0
        ]
        outcomes |= {case: Outcome(layouts[case], Difference(**answer)) for case, answer in zip(these, answers, strict=True)}
    written = Path(done).read_text(encoding="utf-8").splitlines()
    assert len([json.loads(line) for line in written]) == len(outcomes)
    return outcomes
