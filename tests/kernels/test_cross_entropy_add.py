"""The sum over chunks of linear_cross_entropy: products in the dtype of the activations, added to fp32."""

from __future__ import annotations

import pytest
import torch

from dist_llm.kernels.cross_entropy import native
from dist_llm.kernels.cross_entropy.native import linear_cross_entropy_native
from dist_llm.kernels.extension import why_no_kernel

CPU = torch.device("cpu")
why = why_no_kernel("cross_entropy_add_", CPU)
needs_native = pytest.mark.skipif(why is not None, reason=str(why))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 123), (1, 1), (3, 16), (0, 4), (300, 257)], ids=str)
def test_the_sum_is_that_of_fp32(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    total, part = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator).to(dtype)
    expected = total + part.float()
    torch.ops.dist_llm.cross_entropy_add_(total, part)
    assert torch.equal(total, expected)


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    op = torch.ops.dist_llm.cross_entropy_add_
    with pytest.raises(RuntimeError, match=r"part \(2, 3\) must have the shape of total \(3, 2\)"):
        op(torch.zeros(3, 2), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="total must be fp32, not BFloat16"):
        op(torch.zeros(2).bfloat16(), torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"total \(3, 2\) must be contiguous"):
        op(torch.zeros(2, 3).t(), torch.zeros(3, 2))


@pytest.mark.skipif(native.why_not_native(CPU, torch.float32) is not None, reason=str(native.why_not_native(CPU, torch.float32)))
def test_a_vocabulary_of_many_blocks_has_the_gradient_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(3)
        hidden, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((40, 16), (100, 16)))
        targets = torch.randint(0, 100, (40,), generator=generator)
        return torch.autograd.grad(linear_cross_entropy_native(hidden, weight, targets, ignore=-1, chunks=4), (hidden, weight))

    whole = gradients()
    monkeypatch.setattr(native, "BLOCK_ELEMENTS", 16 * 7)
    for ours, theirs in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
