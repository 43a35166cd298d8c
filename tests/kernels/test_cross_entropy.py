"""Cross-entropy: the definition against torch, and the compiled kernels against the definition, by their error from float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dist_llm.kernels.cross_entropy.native import (
    cross_entropy_backward_native,
    cross_entropy_native,
    cross_entropy_partials_native,
    linear_cross_entropy_native,
    linear_forward,
    why_not_native,
)
from dist_llm.kernels.cross_entropy.reference import (
    cross_entropy_backward_reference,
    cross_entropy_partials_reference,
    cross_entropy_reference,
    linear_cross_entropy_reference,
)
from tests.kernels.recorder import Recorder

CPU = torch.device("cpu")
IGNORE = -100
DLOSS = 0.37
# Rows of less than a vector, of a vector and one, around the block that is read twice, and of a usual vocabulary.
SHAPES = [(5, 1), (7, 3), (3, 33), (9, 123), (6, 1000), (4, 8191), (3, 8193), (2, 50257), (0, 16)]
DTYPES = [torch.float32, torch.bfloat16]
# (standard deviation, mean) of the logits: a fresh model, a sure one, drifted ones, all negative.
SPREADS = [(0.1, 0.0), (4.0, 0.0), (30.0, 0.0), (3.0, 50.0), (2.0, -70.0), (2.0, 20000.0)]

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def make_inputs(shape: tuple[int, int], dtype: torch.dtype, spread: tuple[float, float] = (4.0, 0.0)) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets of which the first is ignored where there are others."""
    generator = torch.Generator().manual_seed(11)
    logits = (spread[0] * torch.randn(shape, generator=generator) + spread[1]).to(dtype)
    targets = torch.randint(0, shape[1], shape[:1], generator=generator)
    targets[: min(1, shape[0] - 1)] = IGNORE
    return logits, targets


def results(fn: Callable[..., torch.Tensor], logits: torch.Tensor, targets: torch.Tensor, z_loss: float) -> list[torch.Tensor]:
    """loss, dlogits."""
    logits = logits.clone().requires_grad_()
    loss = fn(logits, targets, ignore=IGNORE, z_loss=z_loss)
    return [loss.detach(), *torch.autograd.grad(loss, [logits], torch.tensor(DLOSS, dtype=loss.dtype))]


def assert_close_to_float64(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, terms: float) -> None:
    """At most twice the reference's error, or two fp32 roundings of ``terms``, the size of what is added and subtracted."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    if exact.numel() == 0:
        return
    error, reference_error = ((t.double() - exact).abs().max().item() for t in (ours, theirs))
    assert error <= max(2 * reference_error, 2 * torch.finfo(torch.float32).eps * terms)


def assert_at_most_twice_the_reference_error(logits: torch.Tensor, targets: torch.Tensor, z_loss: float) -> None:
    exact = results(cross_entropy_reference, logits.double(), targets, z_loss)
    expected = results(cross_entropy_reference, logits, targets, z_loss)
    measured = results(cross_entropy_native, logits, targets, z_loss)
    assert_close_to_float64(measured[0], expected[0], exact[0], exact[0].abs().item())
    # The gradient is dloss * p * (1 + 2 z_loss lse) - dloss * [target].
    largest_lse = logits.double().logsumexp(-1).abs().max().item() if logits.numel() else 0.0
    assert_close_to_float64(measured[1], expected[1], exact[1], DLOSS * (1 + 2 * z_loss * largest_lse))


def test_reference_equals_torch_in_float64() -> None:
    logits, targets = make_inputs((6, 33), torch.float64)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(cross_entropy_reference(logits, targets, ignore=IGNORE), expected, rtol=1e-13, atol=0)
    with_z = expected + 0.5 * logits.logsumexp(-1)[1:].square().sum()
    torch.testing.assert_close(cross_entropy_reference(logits, targets, ignore=IGNORE, z_loss=0.5), with_z, rtol=1e-13, atol=0)


def test_reference_gradients_are_those_of_finite_differences() -> None:
    logits, targets = make_inputs((3, 5), torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cross_entropy_reference(x, targets, ignore=IGNORE, z_loss=0.1), (logits,))


def test_reference_computes_bf16_logits_in_fp32() -> None:
    logits, targets = make_inputs((9, 200), torch.bfloat16)
    loss = cross_entropy_reference(logits, targets, ignore=IGNORE)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, cross_entropy_reference(logits.float(), targets, ignore=IGNORE))


PARTIALS = {
    "reference": (cross_entropy_partials_reference, cross_entropy_backward_reference),
    "native": (cross_entropy_partials_native, cross_entropy_backward_native),
}
both_forms = pytest.mark.parametrize("form", ["reference", pytest.param("native", marks=needs_native)])


@both_forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_partials_of_a_divided_vocabulary_combine_to_the_whole(dtype: torch.dtype, form: str) -> None:
    partials, backward = PARTIALS[form]
    logits, targets = make_inputs((6, 700), dtype)
    logits[2, :300] = float("-inf")  # a row of which one rank has nothing
    z_loss, pieces = 1e-2, [(0, 300), (300, 301), (301, 700)]
    loss, dlogits = results(cross_entropy_reference, logits.double(), targets, z_loss)

    parts = [partials(logits[:, a:b].contiguous(), targets, ignore=IGNORE, vocab_start=a) for a, b in pieces]
    row_max = torch.stack([p[0] for p in parts]).amax(0)
    row_sum = sum(p[1] * (p[0] - row_max).exp() for p in parts)
    # Every rank gives an ignored row the sum 1.
    row_sum = torch.where(targets == IGNORE, 1.0, row_sum)
    target_logit = sum(p[2] for p in parts)
    lse = row_max + row_sum.log()
    nll = (lse - target_logit + z_loss * lse.square())[targets != IGNORE].sum()
    torch.testing.assert_close(nll.double(), loss, rtol=1e-6, atol=0)

    columns = [
        backward(torch.tensor(DLOSS), logits[:, a:b].contiguous(), targets, row_max, row_sum, ignore=IGNORE, z_loss=z_loss, vocab_start=a)
        for a, b in pieces
    ]
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(torch.cat(columns, 1).double(), dlogits.double(), rtol=tolerance, atol=1e-7)


@both_forms
def test_partials_of_an_ignored_row_and_of_a_foreign_target_are_neutral(form: str) -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    row_max, row_sum, target_logit = PARTIALS[form][0](logits, torch.tensor([IGNORE, 7]), ignore=IGNORE, vocab_start=8)
    assert (row_max[0], row_sum[0], target_logit[0]) == (0.0, 1.0, 0.0)
    assert row_max[1] == logits[1].max()
    assert target_logit[1] == 0.0


@needs_native
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_error_is_at_most_twice_the_reference_error(shape: tuple[int, int], dtype: torch.dtype, z_loss: float) -> None:
    assert_at_most_twice_the_reference_error(*make_inputs(shape, dtype), z_loss)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_native_is_as_exact_for_sure_and_for_drifted_logits(spread: tuple[float, float], dtype: torch.dtype) -> None:
    for shape in ((5, 40), (4, 3000), (3, 20000)):
        assert_at_most_twice_the_reference_error(*make_inputs(shape, dtype, spread), 0.0)


@needs_native
def test_native_is_as_exact_where_the_gradient_is_written_past_the_caches() -> None:
    logits, targets = make_inputs((335, 50257), torch.bfloat16)
    assert logits.nbytes >= 32 << 20
    assert_at_most_twice_the_reference_error(logits, targets, 0.0)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_written_over_the_logits_is_that_of_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets = make_inputs(shape, dtype)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy_native(leaf, targets, ignore=IGNORE, z_loss=1e-3)
    loss.backward()
    overwritten = logits.clone()
    torch.testing.assert_close(torch.ops.dist_llm.cross_entropy_grad_(overwritten, targets, IGNORE, 1e-3), loss.detach(), rtol=0, atol=0)
    # The factor of a row comes from its sum in fp64 here, in fp32 there.
    rtol = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(overwritten, leaf.grad, rtol=rtol, atol=1e-7)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 3000])
def test_native_gives_masked_logits_no_share_and_no_gradient(width: int, dtype: torch.dtype) -> None:
    logits, targets = make_inputs((4, width), dtype)
    logits[:, ::2] = float("-inf")
    targets[1:] = targets[1:] // 2 * 2 + 1
    loss, grad = results(cross_entropy_native, logits, targets, 0.0)
    expected, _ = results(cross_entropy_reference, logits.double(), targets, 0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert not grad[:, ::2].any()
    assert torch.isfinite(grad).all()


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 40), (3, 3000)], ids=str)
def test_native_keeps_what_is_not_a_number_visible(shape: tuple[int, int], dtype: torch.dtype, bad: float) -> None:
    logits, targets = make_inputs(shape, dtype)
    logits[1, 17] = bad
    loss, grad = results(cross_entropy_native, logits, targets, 0.0)
    assert loss.isnan()
    assert grad[1].isnan().any()
    assert not grad[0].any()
    assert torch.isfinite(grad[2]).all()
    logits[1] = float("-inf")
    assert cross_entropy_native(logits, targets, ignore=IGNORE).isnan()


@needs_native
def test_native_of_ignored_rows_alone_is_zero() -> None:
    logits, targets = make_inputs((3, 50), torch.bfloat16)
    logits[:] = float("nan")
    loss, grad = results(cross_entropy_native, logits, torch.full_like(targets, IGNORE), 0.1)
    assert loss == 0.0
    assert not grad.any()


@needs_native
def test_native_accepts_any_strides_and_leading_dimensions() -> None:
    logits, targets = make_inputs((24, 30), torch.float32)
    scattered = logits.view(4, 6, 30).transpose(0, 1).contiguous().transpose(0, 1)
    assert not scattered.is_contiguous()
    same = results(cross_entropy_native, logits, targets, 0.0)
    ours = results(cross_entropy_native, scattered, targets.view(4, 6), 0.0)
    assert torch.equal(ours[0], same[0])
    assert torch.equal(ours[1].reshape(24, 30), same[1])


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t: (x.double(), t), "takes logits in fp32 or bf16, not Double"),
        (lambda x, t: (x, t.int()), "targets must be int64, not Int"),
        (lambda x, t: (x, t[:-1]), r"targets \(3\) must have one number for each row of logits \(4, 8\)"),
        (lambda x, t: (x[:, :0], t), r"logits \(4, 0\) must be \(N, V\) with V at least 1"),
        (lambda x, t: (x, t.clone().fill_(8)), r"targets\[0\] = 8 must be in \[0, 8\), or -100 to be ignored"),
        (lambda x, t: (x, t.clone().fill_(-1)), r"targets\[0\] = -1 must be in"),
    ],
)
def test_native_refuses_what_it_cannot_do(change: Callable[..., tuple[torch.Tensor, torch.Tensor]], message: str) -> None:
    logits, targets = change(*make_inputs((4, 8), torch.float32))
    with pytest.raises(RuntimeError, match=message):
        cross_entropy_native(logits, targets, ignore=IGNORE)


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "torch.float64" in str(why_not_native(CPU, torch.float64))
    assert "torch.bfloat16" in str(why_not_native(CPU, torch.float64))


# (rows, model dim, vocabulary)
LINEAR_SHAPES = [(48, 16, 100), (37, 24, 65), (5, 8, 1000), (1, 8, 30), (0, 8, 30)]


def make_linear(
    shape: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight, targets."""
    rows, dim, vocab = shape
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocab, dim, generator=generator) * dim**-0.5).to(weight_dtype)
    return hidden, weight, make_inputs((rows, vocab), dtype)[1]


def linear_results(
    fn: Callable[..., torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **settings: int
) -> list[torch.Tensor]:
    """loss, dhidden, dweight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = fn(hidden, weight, targets, ignore=IGNORE, z_loss=1e-3, **settings)
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight], torch.tensor(DLOSS, dtype=loss.dtype))]


@needs_native
@pytest.mark.parametrize("chunks", [1, 5, 16])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_native_error_is_at_most_twice_the_reference_error(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], chunks: int
) -> None:
    hidden, weight, targets = make_linear(shape, *dtypes)
    # What the reference computes with: the weight rounded to the dtype of hidden.
    exact = linear_results(linear_cross_entropy_reference, hidden.double(), weight.to(dtypes[0]).double(), targets)
    expected = linear_results(linear_cross_entropy_reference, hidden, weight, targets)
    measured = linear_results(linear_cross_entropy_native, hidden, weight, targets, chunks=chunks)
    # Sums of products in fp32, in another order; the terms of each are below |exact| + 1 in size.
    for ours, theirs, truth in zip(measured, expected, exact, strict=True):
        assert_close_to_float64(ours, theirs, truth, 8 * (1 + (truth.abs().max().item() if truth.numel() else 0.0)))


@needs_native
def test_linear_native_without_gradients_is_the_same_loss() -> None:
    hidden, weight, targets = make_linear((48, 16, 100), torch.bfloat16, torch.float32)
    with_gradients = linear_results(linear_cross_entropy_native, hidden, weight, targets)[0]
    assert torch.equal(linear_cross_entropy_native(hidden, weight, targets, ignore=IGNORE, z_loss=1e-3), with_gradients)


@needs_native
def test_linear_native_never_holds_more_than_a_sixteenth_of_the_logits() -> None:
    hidden, weight, targets = make_linear((256, 8, 500), torch.float32, torch.float32)
    # The body of the op: called through the dispatcher, it would be one opaque op.
    with Recorder() as seen:
        linear_forward(hidden, weight, targets, IGNORE, 0.0, 16, True)
    assert seen.largest == 256 * 500 // 16


@needs_native
def test_linear_native_backward_makes_no_zeros_for_the_gradients_it_keeps() -> None:
    hidden, weight, targets = make_linear((48, 16, 100), torch.float32, torch.float32)
    loss = linear_cross_entropy_native(hidden.requires_grad_(), weight.requires_grad_(), targets, ignore=IGNORE)
    with Recorder() as seen:
        loss.backward()
    assert seen.ops and seen.zeros == []


@needs_native
def test_linear_native_refuses_a_second_derivative_and_names_the_way_out() -> None:
    hidden, weight, targets = make_linear((5, 8, 40), torch.float32, torch.float32)
    hidden.requires_grad_()
    loss = linear_cross_entropy_native(hidden, weight, targets, ignore=IGNORE)
    (dhidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    expected = torch.autograd.grad(linear_cross_entropy_reference(hidden, weight, targets, ignore=IGNORE), hidden)[0]
    torch.testing.assert_close(dhidden.detach(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"linear_cross_entropy has no second derivative.*kernels\.cross_entropy = reference"):
        dhidden.square().sum().backward()


def test_linear_native_refuses_no_chunks() -> None:
    hidden, weight, targets = make_linear((5, 8, 40), torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"chunks \(0\) must be at least 1"):
        linear_cross_entropy_native(hidden, weight, targets, ignore=IGNORE, chunks=0)
