"""What a plan takes for granted of ``kernels.*: auto``, held to what a run chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dist_llm.kernels.impl import Impl, always, select
from dist_llm.kernels.table import LAYOUT_TABLES, TABLES
from dist_llm.planning import implementations
from dist_llm.planning.cluster import cluster_names, load_cluster
from dist_llm.planning.implementations import BEST_FIRST, Device, implementation_of
from dist_llm.planning.saving import AUTO, Kernels, saving_of
from dist_llm.planning.shapes import ModelShape

GROUPED = ModelShape(
    num_layers=8, d_model=1024, num_heads=8, num_kv_heads=2, head_dim=128, ffn_dim=2816, gated=True, vocab_size=32000, seq_len=2048,
    tied=False,
)  # fmt: skip
HEADS = replace(GROUPED, num_kv_heads=8)


def without_vendors(table: tuple[Impl, ...]) -> tuple[Impl, ...]:
    """``table`` on a machine where all of it can run but what others make for CUDA."""
    return tuple(replace(impl, why_not=always) for impl in table if impl.name not in ("flash_attn", "apex", "onednn"))


@pytest.mark.parametrize("op", BEST_FIRST)
def test_the_plan_knows_the_implementations_in_the_order_of_their_tables(op: str) -> None:
    tables = [table for table in (*TABLES.values(), *LAYOUT_TABLES.values()) if table[0].op == op]
    assert tables and all(tuple(impl.name for impl in table) == BEST_FIRST[op] for table in tables)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_planned_as_it_is_chosen(device: Device) -> None:
    for function, table in TABLES.items():
        if table[0].op in BEST_FIRST:
            chosen = select(without_vendors(table), "auto", torch.device(device), torch.bfloat16)
            assert implementation_of(table[0].op, "auto", device) == chosen.name, function


def test_what_has_run_on_gpus_is_planned_for_as_soon_as_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [implementation_of(op, "auto", "cuda") for op in ("attention", "rms_norm")] == ["sdpa", "reference"]
    monkeypatch.setitem(implementations.NEVER_RUN, "cuda", frozenset({"flash_attn", "apex"}))
    assert {implementation_of(op, "auto", "cuda") for op in BEST_FIRST} == {"native"}


def test_on_a_gpu_auto_saves_what_plain_pytorch_does_but_for_attention() -> None:
    gpu, cpu = (saving_of(AUTO, GROUPED, device, "bf16") for device in ("cuda", "cpu"))
    assert gpu.plain == {"norm", "activation", "cross_entropy", "attention_block"} and gpu.attention == "fused"
    assert cpu.plain == set() and cpu.attention == cpu.windowed == "fused"


def test_what_is_named_is_planned_for_op_by_op() -> None:
    native = Kernels(norm="native", activation="native", attention="native", cross_entropy="native")
    assert saving_of(native, GROUPED, "cuda", "bf16") == saving_of(AUTO, GROUPED, "cpu", "bf16")
    assert saving_of(replace(AUTO, norm="native"), GROUPED, "cuda", "bf16").plain == {"activation", "cross_entropy", "attention_block"}
    assert saving_of(replace(AUTO, attention="native"), GROUPED, "cuda", "bf16").plain == {"norm", "activation", "cross_entropy"}
    assert saving_of(replace(AUTO, norm="apex", activation="reference"), GROUPED, "cpu", "bf16").plain == {"activation"}
    assert saving_of(replace(AUTO, attention="reference"), GROUPED, "cpu", "bf16").attention == "math"


def test_torchs_attention_keeps_a_mask_or_falls_back_where_its_kernels_cannot() -> None:
    window, documents = replace(HEADS, window=512), replace(AUTO, documents=True)
    assert (saving_of(AUTO, window, "cuda", "bf16").attention, saving_of(AUTO, window, "cuda", "bf16").windowed) == ("fused", "one_mask")
    assert saving_of(documents, HEADS, "cuda", "bf16").attention == "row_masks"
    # Grouped heads, with a mask or in fp32.
    assert saving_of(AUTO, replace(GROUPED, window=512), "cuda", "bf16").windowed == "math"
    assert saving_of(documents, GROUPED, "cuda", "bf16").attention == saving_of(AUTO, GROUPED, "cuda", "fp32").attention == "math"
    assert saving_of(replace(documents, attention="sdpa"), GROUPED, "cpu", "fp32").attention == "row_masks"
    assert saving_of(replace(documents, attention="native"), GROUPED, "cuda", "fp32").attention == "fused"


def test_each_described_cluster_is_a_cpu_or_has_gpus() -> None:
    assert {name for name in cluster_names() if load_cluster(name).kind == "cpu"} == {"cpu"}
