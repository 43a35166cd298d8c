"""The small copy keeps the structure of whatever a user trains, and divides over the layouts that are compared."""

from __future__ import annotations

import pytest

from dist_llm.config.rules import broken_rules
from dist_llm.topology.layout import STANDARD, parse_layout
from dist_llm.verify.shrink import MAX_RANKS, apply_layout, own_layout, refusal, shrink
from tests.verify.verifying import tiny

_USERS = {
    "one head": ["model.num_heads=1", "model.num_kv_heads=1"],
    "one layer": ["model.num_layers=1"],
    "a head size that is not width / heads": ["model.head_dim=20"],
    "grouped heads in odd numbers": ["model.num_heads=6", "model.num_kv_heads=2", "model.d_model=96"],
    "groups of eight": ["model.num_heads=64", "model.num_kv_heads=8", "model.d_model=512"],
    "multi-query with a prime number of heads": ["model.num_heads=71", "model.num_kv_heads=1", "model.d_model=4544"],
    "a narrow MLP of odd width": ["model.ffn_dim=7"],
    "many large layers": ["model.num_layers=80", "model.d_model=8192", "model.num_heads=64", "model.num_kv_heads=8", "model.ffn_dim=28672"],
    "a batch of one row": ["train.batch_size=1", "train.micro_batch_size=1"],
    "offload and recomputation of some layers": [
        "parallel.zero=3",
        "parallel.offload_optimizer=cpu",
        "parallel.recompute=full",
        "parallel.recompute_layers=2",
    ],
    "the plain engine": ["train.engine=plain", "parallel.zero=0"],
    "no clipping, no momentum": ["optim.clip_norm=0", "optim.beta1=0"],
}


@pytest.mark.parametrize("overrides", _USERS.values(), ids=_USERS.keys())
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_copy_of_any_config_runs_at_every_standard_layout(name: str, overrides: list[str]) -> None:
    if name == "gpt2" and (heads := [o for o in overrides if "num_heads" in o]):
        overrides = [*overrides, f"model.num_kv_heads={heads[0].split('=')[1]}"]  # multi-head, as it is
    config = tiny(name, *overrides)
    small = shrink(config)
    assert broken_rules(small) == []
    assert {layout.name: refusal(small, layout) for layout in (own_layout(config), *STANDARD) if refusal(small, layout)} == {}


@pytest.mark.parametrize("name", ["llama", "gpt2", "packed"])
def test_structure_is_kept(name: str) -> None:
    config = tiny(name, "model.dropout=0.2", "optim.clip_norm=0.5", "optim.weight_decay=0.3")
    small = shrink(config)
    for field in ("norm", "norm_eps", "position", "activation", "bias", "tie_embeddings", "init_std", "dropout"):
        assert getattr(small.model, field) == getattr(config.model, field), field
    assert small.data.document_mask == config.data.document_mask
    assert small.kernels == config.kernels and small.seed == config.seed
    assert (small.optim.clip_norm, small.optim.weight_decay, small.optim.beta2) == (0.5, 0.3, config.optim.beta2)
    heads, small_heads = (c.model.num_heads // c.model.kv_heads for c in (config, small))
    assert heads == small_heads and (config.model.kv_heads == 1) == (small.model.kv_heads == 1)
    assert (config.model.head_size * config.model.num_heads == config.model.d_model) == (
        small.model.head_size * small.model.num_heads == small.model.d_model
    )


def test_a_head_size_of_its_own_stays_one() -> None:
    small = shrink(tiny("llama", "model.head_dim=20"))
    assert small.model.head_size * small.model.num_heads != small.model.d_model


@pytest.mark.parametrize(
    ("window", "seq_len", "small"), [(24, 64, 12), (4096, 32768, 4), (4096, 8192, 16), (1, 64, 1), (64, 4096, 2), (64, 64, 32)]
)
def test_a_window_keeps_its_share_of_the_row(window: int, seq_len: int, small: int) -> None:
    config = tiny("banded", f"model.window={window}", f"data.seq_len={seq_len}", f"model.max_seq_len={seq_len}")
    copy = shrink(config)
    assert copy.model.window == small and copy.model.window_layers == "alternate"
    assert (copy.model.window < copy.data.seq_len) == (window < seq_len)


def test_a_window_is_refused_in_a_ring_and_nowhere_else() -> None:
    small = shrink(tiny("banded"))
    reasons = {layout: refusal(small, layout) for layout in STANDARD}
    assert {x for x, reason in reasons.items() if reason} == {x for x in STANDARD if x.cp > 1 and x.cp_kind == "ring"}
    assert all("use parallel.cp_kind all_to_all" in reason for reason in reasons.values() if reason)


def test_under_mup_the_copy_is_as_many_times_wider_than_its_base() -> None:
    small = shrink(tiny("llama", "model.d_model=512", "model.mup_base_width=128"))
    assert small.model.mup_base_width is not None and small.model.d_model == 4 * small.model.mup_base_width
    assert small.model.head_size == 4 * small.model.mup_base_head_size


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["parallel.tp=8", "model.num_heads=8", "model.num_kv_heads=8", "parallel.zero=0"], "tp4"),
        (["parallel.tp=3", "model.num_heads=6", "model.num_kv_heads=3", "model.d_model=96"], "tp2-zero1-dp2"),
        (["parallel.tp=2", "parallel.sequence_parallel=true"], "tp2-sp-zero1-dp2"),
        (["parallel.pp=3", "model.num_layers=6"], "pp2-zero1-dp2"),
        (["parallel.dp=64", "train.batch_size=128"], "zero1-dp4"),
        (["parallel.pp=4", "parallel.schedule=interleaved", "parallel.chunks=4", "model.num_layers=32"], "pp4-interleaved2-zero1-dp2"),
        (
            ["parallel.tp=2", "parallel.cp=2", "parallel.pp=4", "parallel.cp_kind=all_to_all", "parallel.recompute=full"],
            "tp2-pp2-cp2-a2a-recompute-full-zero1",
        ),
    ],
)
def test_the_own_layout_keeps_its_axes_within_the_ranks_of_a_machine(overrides: list[str], name: str) -> None:
    config = tiny("llama", *overrides)
    own = own_layout(config)
    assert own == parse_layout(name)
    assert own.world_size <= MAX_RANKS
    assert refusal(shrink(config), own) is None


def test_named_layouts_get_the_layers_and_heads_they_need_where_the_config_has_them() -> None:
    layouts = [parse_layout(name) for name in ("pp8", "pp4-interleaved4", "tp8", "tp4-cp2-a2a")]
    large = tiny("llama", "model.num_heads=32", "model.num_kv_heads=16", "model.d_model=512", "model.num_layers=32")
    small = shrink(large, layouts)
    assert [refusal(small, layout) for layout in layouts] == [None] * 4
    assert small.model.num_heads // small.model.kv_heads == 2
    # Four heads do not divide over eight ranks in the user's run either.
    assert "must divide model.num_heads (4)" in (refusal(shrink(tiny("llama"), layouts), parse_layout("tp8")) or "")


@pytest.mark.parametrize(
    ("layout", "reason", "way_out"),
    [
        ("tp3", "3 must divide model.num_heads (4)", "1, 2 or 4 would"),
        ("pp2-zero3", "would gather the parameters of a stage anew", "use parallel.zero 1"),
        ("pp2-zero2", "would reduce gradients after every micro-batch", "use parallel.zero 1"),
        ("cp3", "need data.seq_len (32) divisible by 6", "each holds an early and a late part"),
        ("cp8-a2a", "cannot exchange the 4 heads", "use parallel.cp_kind ring, or fewer ranks"),
        ("zero1-dp3", "must be divisible by", "would be"),
        ("zero1-dp32", "more than one machine", "compare a smaller layout"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason_and_what_works(layout: str, reason: str, way_out: str) -> None:
    said = refusal(shrink(tiny("llama")), parse_layout(layout)) or ""
    assert reason in said and way_out in said


def test_one_interleaved_rank_has_a_micro_batch_for_every_stage() -> None:
    small = shrink(tiny("llama", "model.num_layers=8"), [layout := parse_layout("pp4-interleaved2-dp2")])
    applied = apply_layout(small, layout)
    assert applied.train.micro_batch_size == 1 and refusal(small, layout) is None
