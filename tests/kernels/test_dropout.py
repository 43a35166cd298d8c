from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_llm.kernels.dropout import IMPLS, site_number
from dist_llm.kernels.dropout.native import dropout_add_native, dropout_native, why_not_native
from dist_llm.kernels.dropout.philox import philox_4x32
from dist_llm.kernels.dropout.reference import dropout_add_reference, dropout_reference, keep_mask, mask_key
from dist_llm.kernels.impl import select

CPU = torch.device("cpu")
B, T, D = 5, 123, 123
SEED, SITE = 1234, site_number("layers.0.attention")

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def mask(p: float = 0.3, *, b: slice = slice(None), t: slice = slice(None), f: tuple[int, int] = (0, D), **changed: int) -> torch.Tensor:
    """Part of one (B, T, D) mask; samples and columns count from numbers that need more than 32 bits and do not start at zero."""
    samples = torch.arange(2**33 - 2, 2**33 - 2 + B)[b]
    columns = torch.arange(7, 7 + T)[t]
    args = {"seed": SEED, "site": SITE, **changed}
    return keep_mask(f[1] - f[0], p, samples=samples, columns=columns, feature_start=f[0], **args)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the three vectors "philox4x32 10" of Random123's kat_vectors
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_numbers(counter: str, key: str, expected: str) -> None:
    def numbers(words: str) -> tuple[int, ...]:
        return tuple(int(word, 16) for word in words.split())

    made = philox_4x32(tuple(torch.tensor([n]) for n in numbers(counter)), numbers(key))  # type: ignore[arg-type]
    assert tuple(int(word) for word in made) == numbers(expected)


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox 4x32-10 written from the paper, on Python's integers, which do not wrap."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b % 2**32, (a >> 32) ^ c[3] ^ k1, a % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def test_words_that_vary_along_different_dimensions_broadcast() -> None:
    words = [torch.randint(0, 2**32, shape) for shape in ((1, 1, 6), (1, 5, 1), (3, 1, 1), (1, 1, 1))]
    key = (0xDEADBEEF, 0xFFFFFFFE)
    made = torch.stack(philox_4x32(tuple(words), key), -1)  # type: ignore[arg-type]
    whole = [w.expand(3, 5, 6) for w in words]
    for i, j, k in itertools.product(range(3), range(5), range(6)):
        assert made[i, j, k].tolist() == philox_in_integers(tuple(int(w[i, j, k]) for w in whole), key)


def test_an_elements_number_comes_from_its_sample_column_and_feature() -> None:
    keep = mask(0.3)
    for b, t, f in ((0, 0, 0), (1, 5, 3), (2, 60, 4), (4, 122, 122), (3, 17, 101)):
        sample, column = 2**33 - 2 + b, 7 + t
        number = philox_in_integers((f // 4, column, sample % 2**32, sample >> 32), mask_key(SEED, SITE))[f % 4]
        assert bool(keep[b, t, f]) == (number >= round(0.3 * 2**32))


def test_any_part_of_a_mask_is_that_part_of_the_whole() -> None:
    whole = mask()
    for cut in (1, 2, 3, 4, 61, 64, 122):
        assert torch.equal(torch.cat([mask(t=slice(0, cut)), mask(t=slice(cut, None))], 1), whole)
        assert torch.equal(torch.cat([mask(f=(0, cut)), mask(f=(cut, D))], 2), whole)
    assert torch.equal(torch.cat([mask(b=slice(i, i + 1)) for i in range(B)]), whole)
    assert torch.equal(mask(b=slice(None, None, 2), t=slice(100, 120), f=(50, 59)), whole[::2, 100:120, 50:59])


def test_columns_in_any_order_carry_their_own_mask() -> None:
    samples, order = torch.tensor([3]), torch.tensor([5, 0, 3, 4, 1, 2])
    args = {"seed": 0, "site": 0, "samples": samples}
    plain = keep_mask(D, 0.5, columns=torch.arange(6), **args)  # type: ignore[arg-type]
    assert torch.equal(keep_mask(D, 0.5, columns=order, **args), plain[:, order])  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_kept_is_1_minus_p_everywhere(p: float) -> None:
    keep = mask(p).double()
    for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        means = keep.mean(dims)
        deviation = math.sqrt(p * (1 - p) / (keep.numel() / means.numel()))
        # 5 standard deviations; the numbers are fixed, so this cannot fail by chance after it has passed once.
        assert ((means - (1 - p)).abs() < 5 * deviation).all()


@pytest.mark.parametrize(("dim", "lag"), [(0, 1), (1, 1), (2, 1), (2, 2), (2, 3), (2, 4), (1, 2)])
def test_neighbours_are_independent(dim: int, lag: int) -> None:
    x = mask(0.5).double() * 2 - 1
    n = x.shape[dim] - lag
    correlation = (x.narrow(dim, 0, n) * x.narrow(dim, lag, n)).mean()
    assert abs(correlation) < 5 / math.sqrt(x.numel() * n / x.shape[dim])  # 5 standard deviations


@pytest.mark.parametrize("changed", [{"seed": SEED + 1}, {"seed": SEED + 2**32}, {"site": SITE + 1}, {"site": site_number("layers.0.mlp")}])
def test_another_seed_or_site_has_an_unrelated_mask(changed: dict[str, int]) -> None:
    x, y = mask(0.5).double() * 2 - 1, mask(0.5, **changed).double() * 2 - 1
    assert abs((x * y).mean()) < 5 / math.sqrt(x.numel())


def test_site_numbers_are_the_same_in_every_process_and_fit_63_bits() -> None:
    code = "from dist_llm.kernels.dropout import site_number; print(site_number('layers.11.mlp'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert int(other.stdout) == site_number("layers.11.mlp")
    numbers = {site_number(f"layers.{i}.{part}") for i in range(500) for part in ("attention", "mlp")}
    assert len(numbers) == 1000
    assert all(0 <= n < 2**63 for n in numbers)
    assert max(numbers) > 2**62


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradient_are_mask_over_1_minus_p(dtype: torch.dtype) -> None:
    p = 0.3
    samples, columns = torch.arange(B) * 1000, torch.arange(T)
    x = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    grad = torch.randn(B, T, D, dtype=dtype)
    y = dropout_reference(x, p, seed=SEED, site=SITE, samples=samples, columns=columns)
    y.backward(grad)
    keep = keep_mask(D, p, seed=SEED, site=SITE, samples=samples, columns=columns)
    assert y.dtype == dtype
    # A tensor times a number is computed in at least fp32 and rounded once, here and there.
    assert torch.equal(y, torch.where(keep, x * (1 / (1 - p)), 0))
    assert torch.equal(y == 0, ~keep | (x == 0))
    assert torch.equal(x.grad, torch.where(keep, grad * (1 / (1 - p)), 0))


def test_a_dropped_element_is_zero_whatever_it_was() -> None:
    x = torch.full((1, 64, 64), float("nan"))
    y = dropout_reference(x, 0.5, seed=0, site=0, samples=torch.zeros(1, dtype=torch.int64), columns=torch.arange(64))
    assert torch.equal(y == 0, ~y.isnan())
    assert 0.4 < float(y.isnan().float().mean()) < 0.6


def test_no_tensor_of_the_size_of_x_is_kept_for_backward() -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(B, T, D, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = dropout_reference(x, 0.5, seed=0, site=0, samples=torch.arange(B), columns=torch.arange(T))
    assert y.requires_grad
    assert sorted(t.numel() for t in kept) == [B, T]


def test_probability_zero_is_the_same_tensor() -> None:
    x = torch.randn(B, T, D)
    assert dropout_reference(x, 0.0, seed=0, site=0, samples=torch.arange(B), columns=torch.arange(T)) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_outside_0_to_1_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), it is"):
        dropout_reference(torch.ones(1, 2, 3), p, seed=0, site=0, samples=torch.arange(1), columns=torch.arange(2))


def test_positions_that_do_not_fit_are_refused_with_all_shapes() -> None:
    with pytest.raises(ValueError, match=r"they are \(2, 3, 4\), \(3,\) and \(2,\)"):
        dropout_reference(torch.ones(2, 3, 4), 0.5, seed=0, site=0, samples=torch.arange(3), columns=torch.arange(2))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("fn", [dropout_add_reference, dropout_add_native])
def test_a_residual_of_another_shape_is_refused(fn: Callable[..., torch.Tensor], p: float) -> None:
    place: dict[str, Any] = {"seed": 0, "site": 0, "samples": torch.arange(2), "columns": torch.arange(3)}
    with pytest.raises(ValueError, match=r"residual \(1, 3, 4\) must have the shape of x \(2, 3, 4\)"):
        fn(torch.ones(2, 3, 4), torch.ones(1, 3, 4), p, **place)


def test_dropout_add_is_the_residual_plus_the_dropout_rounded_once() -> None:
    x, residual = (torch.randn(B, T, D).bfloat16() for _ in range(2))
    place: dict[str, Any] = {"seed": SEED, "site": SITE, "samples": torch.arange(B), "columns": torch.arange(T)}
    expected = (residual.double() + dropout_reference(x.double(), 0.3, **place)).bfloat16()
    difference = (dropout_add_reference(x, residual, 0.3, **place).double() - expected.double()).abs()
    assert (difference > 0).double().mean() < 1e-3  # fp32 inside: a tie in ten thousand falls to the other side
    assert torch.equal(dropout_add_reference(x, residual, 0.0, **place), residual + x)


@needs_native
@pytest.mark.parametrize("feature_start", [0, 1, 2, 3, 4, 131])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [1, 33, 123, 1024, 2081])
def test_native_has_the_bits_of_the_reference(features: int, dtype: torch.dtype, feature_start: int) -> None:
    x = torch.randn(2, 3, features).to(dtype)
    samples, columns = torch.tensor([2**33 + 5, 0]), torch.tensor([2**32 - 1, 0, 77])
    place: dict[str, Any] = {"seed": SEED, "site": SITE, "samples": samples, "columns": columns, "feature_start": feature_start}
    for p in (0.1, 0.2, 0.5, 1 - 1e-12):  # 1 / (1 - 0.2) is 1.25: ties of bf16, which go to even; the last drops everything
        results = []
        for fn in (dropout_reference, dropout_native):
            leaf = x.detach().requires_grad_()
            y = fn(leaf, p, **place)
            results.append((y, *torch.autograd.grad(y, leaf, x.flip(-1))))
        for theirs, ours in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


@needs_native
def test_native_zeroes_a_dropped_element_whatever_it_was() -> None:
    place: dict[str, Any] = {"seed": 0, "site": 0, "samples": torch.zeros(1, dtype=torch.int64), "columns": torch.arange(64)}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((1, 64, 70), float("nan")).to(dtype)
        y = dropout_native(x, 0.5, **place)
        assert torch.equal(y == 0, dropout_reference(torch.ones(1, 64, 70), 0.5, **place) == 0)
        assert torch.equal(y == 0, ~y.isnan())
        residual = torch.ones_like(x)
        assert torch.equal(dropout_add_native(x, residual, 0.5, **place) == 1, y == 0)


@needs_native
def test_native_keeps_no_tensor_of_the_size_of_x_for_backward() -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(B, T, D, requires_grad=True)
    place: dict[str, Any] = {"seed": 0, "site": 0, "samples": torch.arange(B), "columns": torch.arange(T)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert dropout_native(x, 0.5, **place).requires_grad
        assert dropout_add_native(x, x, 0.5, **place).requires_grad
    assert sorted(t.numel() for t in kept) == [B, B, T, T]


@needs_native
def test_native_compiles_once_more_for_another_seed_or_site() -> None:
    compiled = torch.compile(dropout_native, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8)
    for seed, site, feature_start in ((1, 2, 0), (1, 3, 0), (2, 2**62 + 5, 4), (2**65, 7, 4)):
        place: dict[str, Any] = {"seed": seed, "site": site, "samples": torch.arange(2), "columns": torch.arange(3)}
        assert torch.equal(
            compiled(x, 0.5, **place, feature_start=feature_start), dropout_reference(x, 0.5, **place, feature_start=feature_start)
        )


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 4, dtype=torch.float64)}, "dropout on CPU takes fp32 or bf16, not Double"),
        ({"x": torch.ones(3, 4)}, r"dropout needs x \(B, T, D\), not \(3, 4\)"),
        ({"p": 1.0}, r"must be in \[0, 1\), it is 1"),
        ({"key0": 2**32}, r"keys must be in \[0, 2\^32\), they are 4294967296 and 2"),
        (
            {"samples": torch.arange(3)},
            r"samples \(3\) must be int64 with one number for each of the 2 indices of dimension 0 of x \(2, 3, 4\)",
        ),
        ({"columns": torch.arange(3.0)}, r"columns \(3\) must be int64"),
        ({"feature_start": -4}, "feature_start must be at least 0 and below 2.34, it is -4"),
    ],
)
def test_the_op_refuses_what_it_cannot_do(change: dict[str, Any], message: str) -> None:
    place = {"samples": torch.arange(2), "columns": torch.arange(3), "feature_start": 0}
    arguments = {"x": torch.ones(2, 3, 4), "p": 0.5, "key0": 1, "key1": 2, **place}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dist_llm.dropout(**{**arguments, **change})


def test_the_table_gives_what_can_run() -> None:
    assert select(IMPLS, "reference", CPU, torch.float32).fn is dropout_reference
    assert select(IMPLS, "auto", CPU, torch.float64).fn is dropout_reference
    native = why_not_native(CPU, torch.float32) is None
    assert select(IMPLS, "auto", CPU, torch.float32).fn is (dropout_native if native else dropout_reference)
