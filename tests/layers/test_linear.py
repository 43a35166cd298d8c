"""Weights as fp32 masters and weights already in bf16 give the same numbers; gradients of masters are fp32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dist_llm.kernels.impl import select
from dist_llm.kernels.linear import IMPLS, JOINT_IMPLS
from dist_llm.layers.embedding import Embedding
from dist_llm.layers.linear import Linear, joint_linear
from dist_llm.layers.mlp import GeluMLP, SwigluMLP


def fill(module: nn.Module, *, scale: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_linear_equals_torchs_linear(bias: bool) -> None:
    ours, theirs = fill(Linear(13, 7, bias=bias)), nn.Linear(13, 7, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 13)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).shape == (3, 5, 7)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_masters_give_the_bits_that_bf16_weights_give(bias: bool) -> None:
    masters = fill(Linear(33, 17, bias=bias))
    rounded = copy.deepcopy(masters).bfloat16()
    x = torch.randn(4, 9, 33).bfloat16()
    dy = torch.randn(4, 9, 17).bfloat16()
    results = []
    for module in (masters, rounded):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, *(p.grad for p in module.parameters())))
    for with_masters, with_rounded in zip(*results, strict=True):
        assert torch.equal(with_masters.bfloat16(), with_rounded)
    assert results[0][0].dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in masters.parameters())


def test_gradients_of_masters_accumulate_in_fp32() -> None:
    linear = fill(Linear(5, 3, bias=False))
    x, small = torch.ones(1, 5).bfloat16(), 2**-12
    for factor in (1.0, small, small, small):
        (linear(x) * torch.tensor(factor).bfloat16()).sum().backward()
    # In bf16 1 + 2**-12 is 1: the small ones would be lost.
    assert torch.equal(linear.weight.grad, torch.full((3, 5), 1 + 3 * small))


def test_embedding_is_a_row_of_the_table_in_the_dtype_asked_for() -> None:
    table = fill(Embedding(11, 6))
    ids = torch.tensor([[0, 10, 3], [3, 3, 1]])
    assert torch.equal(table(ids, torch.float32), table.weight[ids])
    low = table(ids, torch.bfloat16)
    assert torch.equal(low, table.weight[ids].bfloat16())
    low.sum().backward()
    assert torch.equal(table.weight.grad[:, 0], torch.tensor([1.0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 1]))
    with pytest.raises(IndexError):
        table(torch.tensor([11]), torch.float32)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_mlps_are_their_formulas(bias: bool) -> None:
    x = torch.randn(2, 3, 10)
    for module in (GeluMLP(10, 14, bias=bias), SwigluMLP(10, 14, bias=bias)):
        fill(module)
        wide = {name: p.detach().double() for name, p in module.named_parameters()}

        def linear(name: str, x: torch.Tensor, wide: dict[str, torch.Tensor] = wide) -> torch.Tensor:
            y = x @ wide[f"{name}.weight"].T
            return y + wide[f"{name}.bias"] if bias else y

        up = linear("up", x.double())
        if isinstance(module, GeluMLP):
            inner = 0.5 * up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
        else:
            gate = linear("gate", x.double())
            inner = gate * torch.sigmoid(gate) * up
        torch.testing.assert_close(module(x).double(), linear("down", inner), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [impl.name for impl in JOINT_IMPLS])
def test_joint_layers_compute_what_each_computes_alone_with_every_gradient(name: str, bias: bool, dtype: torch.dtype) -> None:
    joint_impl, impl = (next(impl for impl in table if impl.name == name) for table in (JOINT_IMPLS, IMPLS))
    if reason := impl.why_not(torch.device("cpu"), dtype):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(2)
    layers = [fill(Linear(33, out, bias=bias, fn=impl.fn)) for out in (17, 5, 8)]
    x = torch.randn(2, 9, 33, generator=generator).to(dtype)
    results = []
    for compute in (lambda t: joint_linear(layers, t, joint_impl.fn), lambda t: tuple(layer(t) for layer in layers)):
        leaf = x.clone().requires_grad_()
        outputs = compute(leaf)
        parameters = [p for layer in layers for p in layer.parameters()]
        grads = torch.autograd.grad([(y.float() * (i + 1)).square().sum() for i, y in enumerate(outputs)], [leaf, *parameters])
        results.append([*outputs, *grads])
    # The joint product adds up the gradient of x inside; in bf16 the sum of three gradients is rounded twice more.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for joint, alone in zip(*results, strict=True):
        assert joint.dtype == alone.dtype and joint.shape == alone.shape
        assert (joint - alone).abs().max() <= tolerance * alone.abs().max()


def test_joint_layers_keep_no_copy_of_their_weights_for_backward() -> None:
    layers = [fill(Linear(64, 64, bias=True)) for _ in range(3)]
    x = torch.randn(4, 64)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        joint_linear(layers, x, select(JOINT_IMPLS, "auto", x.device, x.dtype).fn)
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    assert saved.keys() <= own


def test_joint_layers_go_one_by_one_without_gradients() -> None:
    layers = [fill(Linear(6, 4, bias=False)) for _ in range(2)]
    seen: list[Linear] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, _inputs, _output: seen.append(module))
    with torch.no_grad():
        joint_linear(layers, torch.randn(3, 6))
    assert seen == layers
    joint_linear(layers, torch.randn(3, 6))
    assert seen == layers
