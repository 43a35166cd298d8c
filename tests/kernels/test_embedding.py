"""Embedding: the definition against torch, and what only this op has; cases/embedding.py holds it to what all ops must have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dist_llm.kernels.embedding.native import embedding_backward_into_native, embedding_native, why_not_native
from dist_llm.kernels.embedding.reference import embedding_backward_into_reference, embedding_reference
from tests.kernels.recorder import Recorder

CPU = torch.device("cpu")

needs_native = pytest.mark.skipif(why_not_native(CPU, torch.float32) is not None, reason=str(why_not_native(CPU, torch.float32)))


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (4, 5), table (7, 12), gradient of the rows."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 7, (4, 5), generator=generator)
    return ids, torch.randn(7, 12, generator=generator).to(dtype), torch.randn(4, 5, 12, generator=generator).to(dtype)


def test_reference_equals_torch_in_float64() -> None:
    ids, table, _ = make_inputs(torch.float64)
    assert torch.equal(embedding_reference(ids, table, torch.float64), F.embedding(ids, table))


def test_reference_gradients_are_those_of_finite_differences() -> None:
    ids, table, _ = make_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda w: embedding_reference(ids, w, torch.float64), (table.requires_grad_(),))


def test_reference_into_adds_the_gradient_of_autograd() -> None:
    ids, table, grad = make_inputs(torch.float64)
    existing = torch.randn_like(table)
    expected = existing.clone()
    leaf = table.requires_grad_()
    F.embedding(ids, leaf).backward(grad)
    assert leaf.grad is not None
    expected += leaf.grad
    embedding_backward_into_reference(grad, ids, existing)
    torch.testing.assert_close(existing, expected, rtol=1e-14, atol=1e-14)


def test_reference_rounds_a_row_of_the_gradient_once() -> None:
    # 1 + 3 * 2^-8 in fp32; added one by one in bf16, each 2^-8 would be lost.
    ids = torch.zeros(4, dtype=torch.int64)
    grad = torch.tensor([[1.0], [2**-8], [2**-8], [2**-8]]).bfloat16()
    table = torch.zeros(2, 1).bfloat16().requires_grad_()
    embedding_reference(ids, table, torch.bfloat16).backward(grad)
    assert table.grad is not None and table.grad[0].item() == 1 + 2**-6


def test_reference_makes_no_wide_copy_of_the_table_and_compiles_as_one_graph() -> None:
    table = torch.randn(1000, 12).bfloat16()
    ids = torch.tensor([[0, 999, 7], [7, 0, 7]])
    with Recorder() as seen:
        rows = embedding_reference(ids, table, torch.float32)
    assert rows.dtype == torch.float32 and seen.largest == rows.numel()
    torch._dynamo.reset()
    compiled = torch.compile(embedding_reference, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (embedding_reference, compiled):
        leaf = table.clone().requires_grad_()
        rows = fn(ids, leaf, torch.float32)
        results.append([rows, *torch.autograd.grad(rows, leaf, torch.linspace(-1, 1, 72).view_as(rows))])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


@needs_native
def test_native_rounds_a_row_of_the_gradient_once() -> None:
    ids = torch.zeros(4, dtype=torch.int64)
    grad = torch.tensor([[1.0], [2**-8], [2**-8], [2**-8]]).bfloat16()
    table = torch.zeros(2, 1).bfloat16().requires_grad_()
    embedding_native(ids, table, torch.bfloat16).backward(grad)
    assert table.grad is not None and table.grad[0].item() == 1 + 2**-6
    into = torch.ones(2, 1).bfloat16()
    embedding_backward_into_native(grad[1:], ids[1:], into)
    assert into.flatten().tolist() == [1 + 2**-6, 1.0]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_into_touches_only_rows_with_a_token(dtype: torch.dtype) -> None:
    # A row that is read and written back would still be equal; a NaN in bf16 with a payload would not.
    ids = torch.tensor([5, 2, 5])
    existing = torch.full((7, 12), float("nan")).to(dtype)
    existing.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).sub_(1)
    bits = existing.view(torch.uint8).clone()
    existing[[2, 5]] = 1
    embedding_backward_into_native(torch.ones(3, 12).to(dtype), ids, existing)
    assert existing[2].eq(2).all() and existing[5].eq(3).all()
    others = [0, 1, 3, 4, 6]
    assert torch.equal(existing.view(torch.uint8)[others], bits[others])


@needs_native
def test_native_into_is_right_where_row_numbers_have_three_digits() -> None:
    # Tokens are sorted by digits of 11 bits: from 2^22 rows on there are three, and the number that holds them ends.
    num_rows = 2**22 + 3
    ids = torch.tensor([num_rows - 1, 5, 2**22, num_rows - 1, 2**11, 0])
    grad = torch.arange(1.0, 7.0)[:, None]
    ours, theirs = torch.zeros(num_rows, 1), torch.zeros(num_rows, 1)
    embedding_backward_into_native(grad, ids, ours)
    embedding_backward_into_reference(grad, ids, theirs)
    assert torch.equal(ours, theirs)


@needs_native
def test_native_into_tells_autograd_that_it_wrote() -> None:
    ids, table, grad = make_inputs()
    product = (table * torch.ones_like(table).requires_grad_()).sum()
    embedding_backward_into_native(grad, ids, table)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@needs_native
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_rows_are_bit_equal_to_a_gather_and_a_cast(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    ids, table, _ = make_inputs(table_dtype)
    assert torch.equal(embedding_native(ids, table, dtype), F.embedding(ids, table).to(dtype))


@needs_native
@pytest.mark.parametrize("wrong", [7, -1])
def test_native_refuses_an_id_that_the_table_does_not_have(wrong: int) -> None:
    ids, table, grad = make_inputs()
    ids[1, 2] = wrong
    message = rf"ids holds {wrong} \(number 7 of 20\), but the table has rows 0 to 6"
    before = table.clone()
    with pytest.raises(RuntimeError, match=message):
        embedding_native(ids, table, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        embedding_backward_into_native(grad, ids, table)
    assert torch.equal(table, before)


@needs_native
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, w, g: embedding_native(i.int(), w, torch.float32), "ids is Int; it must be int64"),
        (lambda i, w, g: embedding_native(i, w[0], torch.float32), r"weight \(12\) must be \(rows, columns\)"),
        (lambda i, w, g: embedding_native(i, w.double(), torch.float32), "takes fp32 or bf16, not Double"),
        (lambda i, w, g: embedding_native(i, w, torch.float16), "takes fp32 or bf16, not Half"),
        (lambda i, w, g: embedding_backward_into_native(g[:3], i, w), r"\(3, 5, 12\) must have the shape of ids \(4, 5\)"),
        (lambda i, w, g: embedding_backward_into_native(g[..., :5], i, w), r"\(7, 12\) must have the columns of the gradient of the rows"),
        (lambda i, w, g: embedding_backward_into_native(g, i, w.t().contiguous().t()), "the gradient of the table .* must be contiguous"),
    ],
)
def test_native_refuses_what_it_cannot_do(call: Callable[..., object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(*make_inputs())


def test_why_not_native_names_the_dtypes_it_takes() -> None:
    assert "float64" in str(why_not_native(CPU, torch.float64))
    assert "torch.bfloat16" in str(why_not_native(CPU, torch.float64))
