"""``bench moe_permute``: tokens routed to experts, sorted, brought back and combined."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dist_llm.bench.kernels.case import Race, raced
from dist_llm.kernels.moe import PERMUTE_IMPLS, ROUTE_IMPLS, UNPERMUTE_IMPLS

__all__ = ["races"]

Chain = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def chain(route: Callable[..., torch.Tensor], permute: Callable[..., torch.Tensor], unpermute: Callable[..., torch.Tensor]) -> Chain:
    """There and back, with nothing done to the rows.

    The weights are probabilities: with weights that add up to one the result would be x, and the gradient of the logits zero.
    """

    def there_and_back(logits: torch.Tensor, x: torch.Tensor, top_k: int) -> torch.Tensor:
        weights, experts, _, _ = route(logits, top_k, normalize=False)
        rows, source, _, _ = permute(x, experts, logits.shape[1])
        return unpermute(rows, source, weights, top_k=top_k)

    return there_and_back


def _sorted(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the slots in order of their experts; the number of rows of each expert is computed, as its MLP needs it."""
    weights, experts = torch.softmax(logits.float(), -1).topk(top_k)
    slots = experts.flatten()
    torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device).scatter_add_(0, slots, torch.ones_like(slots))
    return weights, slots.argsort(stable=True)


def eager(logits: torch.Tensor, x: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rows taken by index, weighted, and added to their tokens by index: the usual way, as in Hugging Face's Mixtral."""
    weights, order = _sorted(logits, top_k)
    rows = x.index_select(0, order // top_k)
    weighted = rows * weights.flatten()[order].unsqueeze(-1).to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // top_k, weighted)


def eager_gather(logits: torch.Tensor, x: torch.Tensor, top_k: int) -> torch.Tensor:
    """Rows brought back by the inverse of the order, then summed."""
    weights, order = _sorted(logits, top_k)
    rows = x.index_select(0, order // top_k)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    slots = rows.index_select(0, inverse).view(x.shape[0], top_k, x.shape[1])
    return (slots * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def races(device: torch.device, *, tiny: bool = False) -> list[Race]:
    """bf16, forward and backward, top 2; the first is the standard shape, the second shows what 256 experts cost."""
    tokens, width = (24, 16) if tiny else (8192, 512) if device.type == "cpu" else (32768, 2048)
    ours = chain(*(raced(impls, device, torch.bfloat16).fn for impls in (ROUTE_IMPLS, PERMUTE_IMPLS, UNPERMUTE_IMPLS)))
    definition = chain(*(impls[-1].fn for impls in (ROUTE_IMPLS, PERMUTE_IMPLS, UNPERMUTE_IMPLS)))
    top_k = 2
    made = []
    for experts in (8,) if tiny else (8, 256):
        x = torch.randn(tokens, width, device=device).bfloat16()
        made.append(
            Race(
                title=f"MoE route + permute + unpermute bf16 {tokens} x {width}, top {top_k} of {experts}",
                args=(_distinct_logits(tokens, experts, device), x, top_k),
                wanted=(0, 1),
                reference=definition,
                ours=ours,
                eager=eager,
                peers={"eager, gathered": eager_gather, "compile, gathered": torch.compile(eager_gather)},
                # Each way forward and back, the tokens once and their rows once; and the rows once more for the gradient of the weights.
                moved_bytes=(4 + 5 * top_k) * x.nbytes,
                goal=4.0 if experts == 8 else None,
                notes="the logits of a token are all different, since torch.topk leaves open which of two equal ones it takes",
            )
        )
    return made


def _distinct_logits(tokens: int, experts: int, device: torch.device) -> torch.Tensor:
    """(tokens, experts) in bf16, about as wide as a normal distribution."""
    order = torch.rand(tokens, experts, device=device).argsort(-1)
    return ((order - experts // 2) * (4 / experts)).bfloat16()
