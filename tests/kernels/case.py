"""What the suite over all ops needs to know of one function: how to make its arguments, and which implementations compute it.

The cases are in ``cases/``, one file an op; ``test_every_op.py`` runs them. A case says nothing about tolerances: an implementation is
held to the error that its own reference makes in the same dtype, both measured against the reference in float64.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dist_llm.kernels.impl import Impl

__all__ = ["Case", "Sample", "all_cases", "assert_close_to_float64", "results"]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call.

    Attributes:
        args: positional arguments, in the order of the reference.
        kwargs: arguments by name.
        wanted: positions and names of the tensors whose gradients are compared.
        scales: for results whose terms cancel, by index (outputs first, then gradients as in ``wanted``): the size of the terms that are
            added to any one number. Ops add in fp32 whatever the dtype of a result, so it is fp32's roundings of the terms that are allowed.
        changed: positions and names of the tensors that the function writes into: they count as outputs.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wanted: tuple[int | str, ...] = ()
    scales: Mapping[int, float] = field(default_factory=dict)
    changed: tuple[int | str, ...] = ()

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor], *, but: Sequence[int | str] = ()) -> Sample:
        """The same with every tensor replaced by ``fn`` of it, lists of tensors too; ``but`` are positions and names left as they are."""

        def each(where: int | str, value: Any) -> Any:
            if where in but:
                return value
            if isinstance(value, torch.Tensor):
                return fn(value)
            return [fn(v) if isinstance(v, torch.Tensor) else v for v in value] if isinstance(value, list) else value

        args = tuple(each(position, value) for position, value in enumerate(self.args))
        return replace(self, args=args, kwargs={name: each(name, value) for name, value in self.kwargs.items()})

    def double(self) -> Sample:
        """The same in float64; whole numbers stay as they are."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t)


@dataclass(frozen=True)
class Case:
    """One function of an op.

    Attributes:
        name: of the function, a key of ``kernels.table.TABLES`` where it is in a table.
        impls: its implementations, the reference last.
        sizes: name -> anything ``make`` understands. Odd ones first of all; small ones: each is run in every dtype, and on older instructions.
        make: (size, dtype of the activations) -> arguments on CPU. Draws from its own seeded generator.
        dtypes: of the activations; ``gpu_dtypes`` are added on a GPU.
        checks: arguments -> (torch.ops op, its arguments) for ``torch.library.opcheck``; the second value the smallest size good for it.
        gpu_sizes: only run on a GPU.
    """

    name: str
    impls: tuple[Impl, ...]
    sizes: Mapping[str, Any]
    make: Callable[[Any, torch.dtype], Sample]
    checks: Callable[[torch.dtype], Sequence[tuple[Any, tuple[Any, ...]]]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    gpu_dtypes: tuple[torch.dtype, ...] = (torch.float16,)
    gpu_sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Callable[..., Any]:
        """The definition."""
        return self.impls[-1].fn


def all_cases() -> list[Case]:
    """Every case of every file in ``cases/``."""
    from tests.kernels import cases

    found: list[Case] = []
    for module in sorted(pkgutil.iter_modules(cases.__path__), key=lambda m: m.name):
        found += importlib.import_module(f"{cases.__name__}.{module.name}").CASES
    return found


def results(
    fn: Callable[..., Any], sample: Sample, arriving_as: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous
) -> list[torch.Tensor]:
    """Outputs (with the tensors it changed), then the gradients of ``wanted``.

    The gradient that arrives at an output is the same for every implementation and dtype: small whole numbers, exact in all of them.
    Arguments lie in memory as those of the sample, arriving gradients as ``arriving_as`` puts them.
    """
    sample = sample.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t.detach()))

    def tensor_at(where: int | str) -> torch.Tensor:
        value = sample.args[where] if isinstance(where, int) else sample.kwargs[where]
        assert isinstance(value, torch.Tensor), f"argument {where} is not a tensor"
        return value

    leaves = [tensor_at(where).requires_grad_() for where in sample.wanted]
    answer = fn(*sample.args, **sample.kwargs)
    outputs = [t for t in (answer if isinstance(answer, (tuple, list)) else (answer,)) if isinstance(t, torch.Tensor)]
    values = [t.detach() for t in outputs]
    for where in sample.changed:
        value = sample.args[where] if isinstance(where, int) else sample.kwargs[where]
        values += [t.detach() for t in (value if isinstance(value, list) else [value])]
    if not leaves:
        return values
    generator = torch.Generator().manual_seed(5)
    roots = [t for t in outputs if t.requires_grad]
    arriving = [arriving_as(torch.randint(-3, 4, t.shape, generator=generator).to(t.dtype).to(t.device)) for t in roots]
    grads = torch.autograd.grad(roots, leaves, arriving, allow_unused=True)
    return values + [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def assert_close_to_float64(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], sample: Sample, what: str
) -> None:
    """Every result is off by at most twice what the reference's is.

    The reference rounds a result once, and with few numbers its largest error is luck: what one spacing of the result's dtype at the size of
    its largest number explains, which is twice the error of correct rounding, is no error. Nor are four spacings of fp32 at the size of the
    terms, which are rounded before they are added: where the sample says that they are larger than the result, and for a result in fp32.
    """
    assert len(ours) == len(theirs) == len(exact), f"{what}: {len(ours)} results, the reference has {len(theirs)}"
    for index, (our, their, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        name = f"result {index} of {what}"
        assert our.dtype == their.dtype and our.shape == their.shape, f"{name}: {our.dtype} {tuple(our.shape)}"
        if not our.is_floating_point():
            assert torch.equal(our, their), f"{name} differs from the reference"
            continue
        assert torch.isfinite(our).all(), f"{name} is not finite"
        if truth.numel() == 0:
            continue
        largest = truth.abs().max().item()
        terms = sample.scales.get(index, largest if our.dtype == torch.float32 else 0.0)
        spacing = torch.finfo(our.dtype).eps
        luck = max(spacing * largest, 4 * min(spacing, torch.finfo(torch.float32).eps) * terms)
        error, reference_error = ((t.double() - truth.double()).abs().max().item() for t in (our, their))
        bound = max(2 * reference_error, luck)
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g} (the reference's is {reference_error:.3g})"
