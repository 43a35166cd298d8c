"""``bench step``: nobody wins by computing something else."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from dist_llm.bench.peers import hugging_face
from dist_llm.bench.peers.gpt import PlainGPT, PlainStep
from dist_llm.bench.step import _distance, _inductor_cache, check_same_function
from dist_llm.config.schema import ModelConfig, OptimConfig

TINY = ModelConfig(
    vocab_size=17, d_model=16, num_layers=2, num_heads=2, max_seq_len=8, norm="layer_norm", position="learned", activation="gelu",
    bias=True, tie_embeddings=True,
)  # fmt: skip


def tiny_weights() -> dict[str, torch.Tensor]:
    """Ours, by logical name; all different from what a model starts with by itself."""
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (17, 16), "positions.weight": (8, 16)}
    for i in range(2):
        for part in ("query", "key", "value", "output"):
            shapes |= {f"blocks.{i}.attention.{part}.weight": (16, 16), f"blocks.{i}.attention.{part}.bias": (16,)}
        shapes |= {f"blocks.{i}.mlp.up.weight": (TINY.ffn_size, 16), f"blocks.{i}.mlp.up.bias": (TINY.ffn_size,)}
        shapes |= {f"blocks.{i}.mlp.down.weight": (16, TINY.ffn_size), f"blocks.{i}.mlp.down.bias": (16,)}
        shapes |= {f"blocks.{i}.{norm}.{kind}": (16,) for norm in ("attention_norm", "mlp_norm") for kind in ("weight", "bias")}
    shapes |= {"final_norm.weight": (16,), "final_norm.bias": (16,)}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_hugging_faces_gradients_are_those_of_the_plain_model() -> None:
    pytest.importorskip("transformers")
    weights, tokens, targets = tiny_weights(), torch.arange(16).view(2, 8), torch.arange(1, 17).view(2, 8)
    exact = PlainGPT(TINY, weights).double()
    torch.nn.functional.cross_entropy(exact(tokens).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
    truth = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    for model in (PlainGPT(TINY, weights), hugging_face.HuggingFaceGPT(TINY, weights)):
        step = PlainStep(model, OptimConfig(lr=1e-3), masters=False)
        step.backward(tokens, targets)
        assert _distance(step.gradients(), truth) < 0.02  # bf16 under autocast
        step.update()


def test_a_weight_that_hugging_face_does_not_get_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    names = list(hugging_face._names(TINY.num_layers))
    monkeypatch.setattr(hugging_face, "_names", lambda num_layers: [row for row in names if row[0] != "blocks.1.up.weight"])
    with pytest.raises(RuntimeError, match=r"missing .*transformer.h.1.mlp.c_fc.weight"):
        hugging_face.HuggingFaceGPT(TINY, tiny_weights())


def test_a_peer_that_computes_something_else_is_refused() -> None:
    same = {"ours": [4.25, 4.3], "peer": [4.25, 4.3001]}
    check_same_function({"ours": 0.009, "peer": 0.01}, same)
    for wrong in (0.5, math.nan):
        with pytest.raises(RuntimeError, match=r"not the same function: .*'peer'"):
            check_same_function({"ours": 0.009, "peer": wrong}, same)
    for loss in (4.305, math.nan):
        with pytest.raises(RuntimeError, match="not the same training"):
            check_same_function({"ours": 0.009}, {"ours": [4.25, 4.3], "peer": [4.25, loss]})


def test_the_compilers_cache_is_where_it_was_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for before in (None, "/elsewhere"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(before))
        if before is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        with _inductor_cache(tmp_path):
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
