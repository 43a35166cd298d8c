from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.schema import ModelConfig
from dist_llm.models.decoder import Decoder, new_cache
from dist_llm.planning.count import count_params, parameter_shapes

from .models import ALL_KINDS, FUSED, REFERENCE, loss_and_grads, make_batch, make_config, make_model

KINDS = {"llama": {"tie_embeddings": False, "num_kv_heads": 2}, "gpt2": {"norm": "layer_norm", "position": "learned", "activation": "gelu", "bias": True}}  # fmt: skip


def name_of(kind: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" if not isinstance(value, str) else value for key, value in kind.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ALL_KINDS, ids=name_of)
def test_every_kind_of_model_runs_forward_and_backward(kind: dict[str, Any], dtype: torch.dtype) -> None:
    config = make_config(**kind)
    model = make_model(config, dtype=dtype)
    hidden, loss, grads = loss_and_grads(model, *make_batch(config))
    assert hidden.shape == (2, 13, config.d_model)
    assert hidden.dtype == dtype
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert (model.head_weight is model.embedding.weight) == config.tie_embeddings
    for name, grad in grads.items():
        assert grad is not None, name
        assert grad.dtype == torch.float32, name  # also in bf16: gradients accumulate in fp32
        assert grad.isfinite().all(), name
        # Without rotary positions a key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
        assert grad.any() or (name.endswith("key.bias") and config.position == "learned"), name


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    heads = draw(st.integers(1, 6))
    head_dim = draw(st.none() | st.integers(1, 4).map(lambda n: 2 * n))
    return ModelConfig(
        vocab_size=draw(st.integers(2, 50)),
        d_model=draw(st.integers(1, 30)) if head_dim is not None else heads * 2 * draw(st.integers(1, 4)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=heads,
        num_kv_heads=draw(st.none() | st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        head_dim=head_dim,
        ffn_dim=draw(st.none() | st.integers(1, 40)),
        max_seq_len=draw(st.integers(1, 20)),
        norm=draw(st.sampled_from(["rms_norm", "layer_norm"])),
        position=draw(st.sampled_from(["rotary", "learned"])),
        activation=draw(st.sampled_from(["swiglu", "gelu"])),
        bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(model_configs())
def test_the_planner_knows_every_parameter_by_name_order_and_shape(config: ModelConfig) -> None:
    model = Decoder(config, FUSED, compute_dtype=torch.float32)
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert built == list(parameter_shapes(config).items())
    assert sum(p.numel() for p in model.parameters()) == count_params(config).total


@pytest.mark.parametrize("ops", [REFERENCE, FUSED], ids=["reference", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_token_changes_no_hidden_state_before_it(kind: dict[str, Any], dtype: torch.dtype, ops: Any) -> None:
    config = make_config(**kind)
    model = make_model(config, dtype=dtype, ops=ops)
    tokens, _, positions = make_batch(config)
    with torch.no_grad():
        before = model(tokens, positions)
        for t in range(tokens.shape[1]):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 1) % config.vocab_size
            after = model(changed, positions)
            assert torch.equal(after[:, :t], before[:, :t]), t
            assert not torch.equal(after[:, t], before[:, t]), t
            assert not torch.equal(after[:, -1], before[:, -1]), t


LENGTHS = (5, 1, 4, 3)


def packed(config: ModelConfig) -> tuple[torch.Tensor, ...]:
    """One row of four documents: tokens, targets, positions that restart, document ids."""
    tokens, targets, _ = make_batch(config, batch=1, length=sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    doc_ids = torch.repeat_interleave(torch.arange(len(LENGTHS), dtype=torch.int32), torch.tensor(LENGTHS))[None]
    return tokens, targets, positions, doc_ids


@pytest.mark.parametrize("ops", [REFERENCE, FUSED], ids=["reference", "fused"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_packed_documents_give_what_each_gives_alone(kind: dict[str, Any], ops: Any) -> None:
    config = make_config(**kind)
    model = make_model(config, ops=ops)
    tokens, targets, positions, doc_ids = packed(config)
    hidden, loss, grads = loss_and_grads(model, tokens, targets, positions, doc_ids)
    summed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    alone, total = [], torch.zeros(())
    for part in torch.arange(sum(LENGTHS)).split(LENGTHS):
        one_hidden, one_loss, one_grads = loss_and_grads(model, tokens[:, part], targets[:, part], torch.arange(len(part))[None])
        alone.append(one_hidden)
        total = total + one_loss
        for name, grad in one_grads.items():
            assert grad is not None
            summed[name] += grad
    # Sums of a few dozen terms in another order: some ulps of the largest value.
    torch.testing.assert_close(hidden, torch.cat(alone, dim=1), rtol=0, atol=2e-6 * float(hidden.abs().max()))
    torch.testing.assert_close(loss, total, rtol=1e-6, atol=0)
    largest = max(float(g.abs().max()) for g in summed.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, summed[name], rtol=0, atol=2e-6 * largest, msg=name)


def test_without_document_ids_the_documents_of_a_row_see_each_other() -> None:
    config = make_config()
    model = make_model(config)
    tokens, _, positions, doc_ids = packed(config)
    with torch.no_grad():
        masked, open_ = model(tokens, positions, doc_ids), model(tokens, positions)
    first = LENGTHS[0]
    torch.testing.assert_close(masked[:, :first], open_[:, :first])
    assert (masked[:, first:] - open_[:, first:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_recomputation_changes_no_bit(kind: dict[str, Any], dtype: torch.dtype) -> None:
    config = make_config(**kind)
    tokens, targets, positions, doc_ids = packed(config)
    _, loss, grads = loss_and_grads(make_model(config, dtype=dtype), tokens, targets, positions, doc_ids)
    _, again, again_grads = loss_and_grads(make_model(config, dtype=dtype, recompute=True), tokens, targets, positions, doc_ids)
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        assert grad is not None
        assert torch.equal(grad, again_grads[name]), name


def test_recomputation_keeps_fewer_tensors_for_the_backward_pass() -> None:
    config = make_config(num_layers=4)
    tokens, _, positions = make_batch(config)
    kept = {}
    for recompute in (False, True):
        model = make_model(config, recompute=recompute)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            model(tokens, positions)
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_bf16_is_near_fp32(kind: dict[str, Any]) -> None:
    config = make_config(**kind)
    batch = make_batch(config)
    hidden, loss, grads = loss_and_grads(make_model(config), *batch)
    low_hidden, low_loss, low_grads = loss_and_grads(make_model(config, dtype=torch.bfloat16), *batch)
    # bf16 keeps 8 bits: 2**-8 a rounding, of which a value here passes about a dozen.
    assert float((low_hidden.float() - hidden).norm() / hidden.norm()) < 12 * 2**-8
    assert float(low_loss) == pytest.approx(float(loss), rel=2e-2)
    flat, low_flat = (torch.cat([g.flatten() for g in gs.values() if g is not None]) for gs in (grads, low_grads))
    assert float((low_flat - flat).norm() / flat.norm()) < 0.1


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_decoding_with_a_cache_equals_the_whole_row(kind: dict[str, Any], recompute: bool) -> None:
    config = make_config(**kind)
    model = make_model(config, recompute=recompute)
    tokens, _, positions = make_batch(config)
    whole = model(tokens, positions).detach()
    with torch.no_grad():
        caches = new_cache(model, batch=2, capacity=13)
        parts = [model(tokens[:, a:b], positions[:, a:b], caches=caches) for a, b in ((0, 6), (6, 7), (7, 10), (10, 13))]
    assert [cache.length for cache in caches] == [13] * config.num_layers
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-6 * float(whole.abs().max()))


def test_a_cache_is_not_dropped_by_recomputation() -> None:
    config = make_config()
    model = make_model(config, recompute=True).requires_grad_(False)
    tokens, _, positions = make_batch(config)
    caches = new_cache(model, batch=2, capacity=13)
    model(tokens[:, :6], positions[:, :6], caches=caches)  # gradients are enabled, as outside of no_grad
    after = model(tokens[:, 6:], positions[:, 6:], caches=caches)
    torch.testing.assert_close(after, model(tokens, positions)[:, 6:], rtol=0, atol=1e-5)


def test_weights_of_other_names_are_refused() -> None:
    model = make_model(make_config(tie_embeddings=False))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    unnamed = {name: w for name, w in weights.items() if name != "blocks.1.mlp.up.weight"}
    with pytest.raises(ValueError, match=r"missing \['blocks.1.mlp.up.weight'\], unknown \['up'\]"):
        model.load_weights({**unnamed, "up": weights["blocks.1.mlp.up.weight"]})


def test_weights_of_another_shape_are_refused_before_any_is_copied() -> None:
    model = make_model(make_config(tie_embeddings=False))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = {name: torch.zeros_like(w) for name, w in before.items()}
    with pytest.raises(ValueError, match=r"head.weight: shape \(24, 37\), the model has \(37, 24\)"):
        model.load_weights({**weights, "head.weight": weights["head.weight"].t()})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_initial_loss_is_that_of_knowing_nothing() -> None:
    config = make_config(vocab_size=512, d_model=64, num_heads=4)
    model = Decoder(config, FUSED, compute_dtype=torch.float32)
    model.load_weights(model.initial_weights(seed=1))
    tokens, targets, positions = make_batch(config, batch=4)
    _, loss, _ = loss_and_grads(model, tokens, targets, positions)
    assert float(loss) / int((targets >= 0).sum()) == pytest.approx(math.log(512), rel=0.02)


def test_alternate_layers_have_the_window_and_the_others_see_the_whole_row() -> None:
    config = make_config(window=3, window_layers="alternate", num_layers=4)
    model = make_model(config)
    assert [block.attention.window for block in model.blocks.values()] == [None, 3, None, 3]  # type: ignore[union-attr]
    tokens, _, positions = make_batch(config)
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % config.vocab_size

    def moved(layers: range) -> torch.Tensor:
        """How much the last token's hidden state depends on the first token."""
        part = Decoder(config, FUSED, compute_dtype=torch.float32, layers=layers)
        part.load_weights({name: dict(model.named_parameters())[name].data for name, _ in part.named_parameters()})
        table = model.embedding.weight
        outputs = [part(t, positions, hidden=table[t]) if layers.start else part(t, positions) for t in (tokens, changed)]
        return (outputs[0] - outputs[1])[:, -1].abs().max()

    assert moved(range(0, 1)) > 1e-3
    assert moved(range(1, 2)) == 0.0
