from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dist_llm.kernels.dropout.reference import dropout_reference, site_number
from dist_llm.layers.dropout import Dropout

B, T, D = 4, 12, 20


def dropout(p: float = 0.4, name: str = "layers.1.mlp", seed: int = 5) -> Dropout:
    return Dropout(p, seed=seed, name=name, fn=dropout_reference)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, T, D, requires_grad=True), torch.arange(40, 40 + B), torch.arange(T)


def test_training_drops_by_seed_name_and_position() -> None:
    x, samples, columns = inputs()
    expected = dropout_reference(x, 0.4, seed=5, site=site_number("layers.1.mlp"), samples=samples, columns=columns)
    assert torch.equal(dropout()(x, samples, columns), expected)
    assert not torch.equal(dropout(name="layers.2.mlp")(x, samples, columns), expected)
    assert not torch.equal(dropout(seed=6)(x, samples, columns), expected)


def test_eval_mode_and_probability_zero_are_the_identity() -> None:
    x, samples, columns = inputs()
    assert dropout().eval()(x, samples, columns) is x
    assert dropout(0.0)(x, samples, columns) is x


def test_ranks_that_hold_parts_drop_what_one_process_drops() -> None:
    x, samples, columns = inputs()
    layer = dropout()
    whole = layer(x, samples, columns)
    by_rows = torch.cat([layer(x[r], samples[r], columns) for r in (slice(0, 1), slice(1, 4))], 0)
    by_columns = torch.cat([layer(x[:, c], samples, columns[c]) for c in (slice(0, 5), slice(5, 12))], 1)
    by_features = torch.cat([layer(x[..., :7], samples, columns), layer(x[..., 7:], samples, columns, feature_start=7)], 2)
    for parts in (by_rows, by_columns, by_features):
        assert torch.equal(parts, whole)


def test_recomputation_in_backward_drops_the_same() -> None:
    x, samples, columns = inputs()
    layer, weight = dropout(), torch.randn(D, D)

    def block(x: torch.Tensor) -> torch.Tensor:
        return layer((x @ weight).tanh(), samples, columns)

    plain = torch.autograd.grad(block(x).square().sum(), x)[0]
    # No random state is kept for the second forward: none is needed.
    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False, preserve_rng_state=False).square().sum(), x)[0]
    assert torch.equal(again, plain)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    x, samples, columns = inputs()
    before = torch.get_rng_state()
    first = dropout()(x, samples, columns)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(dropout()(x, samples, columns), first)


def test_a_wrong_probability_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"dropout probability of layers.1.mlp must be in \[0, 1\), it is 1.0"):
        dropout(1.0)
