"""The rows of a step are the same whoever reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.comm.context import ParallelContext
from dist_llm.config.load import load_config
from dist_llm.engine.attempt import open_rows
from dist_llm.engine.batches import rows_of_rank, to_device
from dist_llm.engine.build import build_engine, choose_ops
from dist_llm.engine.held_out import evaluate_held_out


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_ranks_and_micro_batches_share_out_exactly_the_rows_of_the_step(ranks: int, micro: int, rounds: int, first: int) -> None:
    batch = ranks * micro * rounds
    parts = [rows_of_rank(first, batch_size=batch, micro=micro, rank=r, ranks=ranks) for r in range(ranks)]
    assert all(len(p) == rounds and all(len(m) == micro for m in p) for p in parts)
    assert sorted(n for p in parts for m in p for n in m) == list(range(first, first + batch))


def test_held_out_loss_predicts_every_token_once_whatever_the_micro_batch(corpus: Path) -> None:
    ctx = ParallelContext(device=torch.device("cpu"))
    answers = []
    for micro in (1, 4):
        config = load_config("configs/tiny/llama.yaml", [f"data.path={corpus}", f"train.micro_batch_size={micro}"]).config
        engine = build_engine(config, ctx, choose_ops(config, ctx), None)
        _, rows = open_rows(config)
        assert rows is not None
        answers.append(evaluate_held_out(engine, ctx, rows, config, limit=None))
        assert answers[-1].tokens == rows.num_eval_targets
        assert answers[-1].bytes == rows.text_bytes
    assert answers[0].loss == pytest.approx(answers[1].loss, rel=1e-6)
    # An untrained model is near the uniform distribution over its vocabulary.
    assert answers[0].loss == pytest.approx(np.log(512), rel=0.02)


def test_without_a_document_mask_positions_run_through_the_row(corpus: Path) -> None:
    config = load_config("configs/tiny/packed.yaml", [f"data.path={corpus}"]).config
    rows, _ = open_rows(config)
    numbers = next(range(n, n + 1) for n in range(rows.num_rows) if rows.row(n).doc_ids.max() > 0)
    batch = rows.batch(numbers)
    masked = to_device(batch, torch.device("cpu"), document_mask=True, samples=numbers)
    plain = to_device(batch, torch.device("cpu"), document_mask=False, samples=numbers)
    assert masked.doc_ids is not None and plain.doc_ids is None
    assert masked.positions.max() < plain.positions.max() == config.data.seq_len - 1
