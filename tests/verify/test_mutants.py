"""A certificate is worth what it would catch: planted mistakes are found, named, and blamed on no layout that is free of them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from dist_llm.config.schema import RunConfig
from dist_llm.topology.layout import parse_layout
from dist_llm.verify.certificate import outcome_lines
from dist_llm.verify.run import Outcome, verify_layouts
from dist_llm.verify.shrink import shrink
from tests.verify.mutants import MUTANTS, pipeline_breaks_program, row_sum_left_out_program
from tests.verify.verifying import TOLERANCE, tiny, verify_mutants

# mutant, config, what verify must say differs first at which layout (a pattern), layouts that the mistake does not touch
_CASES: tuple[tuple[str, str, dict[str, str], tuple[str, ...]], ...] = (
    # The same part of the model is named whatever the engine or the number of ranks beneath.
    ("row_sum_left_out", "llama", {"tp2": "output of blocks.2.mlp in step 1", "tp4": "output of blocks.2.mlp in step 1"}, ("pp2",)),
    # Biases begin at zero: only after the first step does it matter how often one is added.
    ("row_bias_on_every_rank", "gpt2", {"tp2": "output of blocks.0.attention in step 2"}, ("cp2-ring",)),
    # The first gradient on the way back that is wrong; those of block 1's own MLP are right.
    ("column_gradient_not_summed", "llama", {"tp2": "gradient of blocks.1.mlp_norm.weight in step 1"}, ("pp2",)),
    ("norms_not_synchronised", "llama", {"tp2-sp": "gradient of final_norm.weight in step 1"}, ("tp2",)),
    ("norms_not_synchronised", "gpt2", {"tp2-sp": "gradient of final_norm.bias in step 1"}, ("tp2",)),
    ("wrong_key_value_heads", "llama", {"tp4": "output of blocks.0.attention in step 1"}, ("tp2",)),
    ("key_value_copies_not_summed", "packed", {"tp2": "gradient of blocks.3.attention.value.weight in step 1"}, ("pp2",)),
    ("key_value_copies_not_summed", "llama", {"tp4": "gradient of blocks.3.attention.value.weight in step 1"}, ("tp2",)),
    ("vocabulary_off_by_one", "llama", {"tp2": "loss in step 1"}, ("cp2-ring",)),
    (
        "norm_counts_replicated_twice",
        "llama",
        {"tp2": "gradient norm in step 1", "tp2-zero1-dp2": "gradient norm in step 1"},
        ("zero1-dp2", "pp2"),
    ),
    ("norm_counts_replicated_twice", "gpt2", {"tp2": "gradient norm in step 1"}, ("cp2-ring",)),
    (
        "dropout_differs_across_tp",
        "gpt2 dropout",
        {"tp2": "output of embedding_dropout in step 1", "tp2-sp": "output of embedding_dropout in step 1"},
        ("pp2",),
    ),
    (
        "recomputed_with_other_random_state",
        "gpt2 dropout",
        {"recompute-full": "gradient of blocks.3.mlp.down.weight in step 1"},
        ("recompute-selective",),
    ),
    ("gradients_scaled_by_stages", "llama", {"pp2": "gradient of head.weight in step 1"}, ("tp2",)),
    ("gradients_scaled_by_own_tokens", "llama", {"zero1-dp2": "gradient of head.weight in step 1"}, ("tp2",)),
    ("mean_of_means", "llama", {"zero1-dp2-mb1-uneven": "gradient of head.weight in step 1"}, ("tp2-mb8",)),
    ("tied_gradient_not_summed", "gpt2", {"pp2": "gradient of embedding.weight in step 1"}, ("tp2",)),
    # A head one small step behind moves the loss by about the tolerance, its gradients by more.
    ("tied_head_goes_stale", "gpt2", {"pp2": "(loss|gradient norm) in step 2"}, ("tp2",)),
    (
        "ring_misses_a_step",
        "llama",
        {"cp2-ring": "output of blocks.0.attention in step 1", "cp4-ring": "output of blocks.0.attention in step 1"},
        ("cp2-a2a",),
    ),
    ("ring_loses_gradients_of_others", "llama", {"cp2-ring": "gradient of blocks.3.attention.value.weight in step 1"}, ("cp2-a2a",)),
    ("ring_forgets_documents", "packed", {"cp2-ring": "output of blocks.0.attention in step 1"}, ("cp2-a2a",)),
    (
        "positions_begin_on_every_rank",
        "llama",
        {"cp2-ring": "output of blocks.0.attention in step 1", "cp2-a2a": "output of blocks.0.attention in step 1"},
        ("tp2",),
    ),
    # Two layers a stage begin as the model does; one layer a stage is always the first.
    ("window_by_place_on_the_stage", "banded", {"pp4": "output of blocks.1.attention in step 1"}, ("pp2",)),
    ("all_to_all_forgets_the_window", "banded", {"cp2-a2a": "output of blocks.1.attention in step 1"}, ("tp2",)),
)


@cache
def _config(name: str) -> RunConfig:
    name, *rest = name.split()
    return tiny(name, *(["model.dropout=0.1"] if rest else []))


@cache
def _outcomes(config: str) -> dict[tuple[str, str], Outcome]:
    cases = [(mutant, layout) for mutant, of, differ, hold in _CASES if of == config for layout in (*differ, *hold)]
    every = dict.fromkeys([*(("nothing", layout) for _, layout in cases), *cases])
    with TemporaryDirectory() as directory:
        return verify_mutants(_config(config), every, Path(directory))


@pytest.mark.parametrize(("mutant", "config", "differ", "hold"), _CASES, ids=[f"{c[0]}-{c[1].replace(' ', '-')}" for c in _CASES])
def test_a_planted_mistake_is_found_and_named_where_it_is(mutant: str, config: str, differ: dict[str, str], hold: tuple[str, ...]) -> None:
    outcomes = _outcomes(config)
    for layout, first in differ.items():
        found = outcomes[mutant, layout]
        assert outcomes["nothing", layout].holds(TOLERANCE), f"{layout} differs without the mistake: {outcomes['nothing', layout]}"
        assert not found.holds(TOLERANCE), f"{mutant} is not seen at {layout}: {found.difference}"
        assert found.difference is not None and found.difference.first is not None
        assert re.fullmatch(first, found.difference.first), found.difference
        assert outcome_lines(found, TOLERANCE).splitlines()[-1] == f"    differs first: {found.difference.first}"
        # Well beyond rounding. The least visible is the norm: gains of norms have a 1e-4 share in it, counting them twice shows as 8e-5.
        assert found.difference.largest > 5 * TOLERANCE
    for layout in hold:
        assert outcomes[mutant, layout].holds(TOLERANCE), f"{mutant} is blamed on {layout}: {outcomes[mutant, layout].difference}"


def test_every_mutant_is_planted_somewhere() -> None:
    assert {case[0] for case in _CASES} == MUTANTS.keys() - {"nothing"}


def test_a_mistake_in_one_layout_makes_the_verification_fail() -> None:
    result = verify_layouts(shrink(_config("llama")), [parse_layout("pp2"), parse_layout("tp2")], program=row_sum_left_out_program)
    assert [outcome.holds(result.tolerance) for outcome in result.outcomes] == [True, False]
    assert not result.ok


def test_a_layout_that_breaks_its_launch_is_named_and_the_others_are_compared() -> None:
    layouts = [parse_layout(name) for name in ("tp2", "pp2", "cp2-a2a")]
    broken = {}
    result = verify_layouts(
        shrink(_config("llama")), layouts, program=pipeline_breaks_program, on_outcome=lambda o: broken.update({o.layout.name: o.error})
    )
    assert [outcome.holds(result.tolerance) for outcome in result.outcomes] == [True, False, True]
    assert broken["tp2"] is None and broken["cp2-a2a"] is None
    assert broken["pp2"] is not None and "rank 1" in broken["pp2"] and "planted: no pipeline today" in broken["pp2"]
    assert "BROKEN" in outcome_lines(result.outcomes[1], result.tolerance)
