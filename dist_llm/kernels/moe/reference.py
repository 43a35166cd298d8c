"""Mixture of experts in plain PyTorch, the definitions: the choice of experts, rows sorted by expert and brought back, the experts' MLPs.

A slot is one choice of one token: number t * top_k + j for choice j of token t.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

__all__ = [
    "SIGMOID_FLOOR",
    "Route",
    "Scores",
    "check_mlp",
    "check_route",
    "check_unpermute",
    "expert_mlp_reference",
    "moe_permute_reference",
    "moe_route_reference",
    "moe_unpermute_reference",
]

Scores = Literal["softmax", "sigmoid"]
Route = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Added to the sum of the chosen sigmoids, as in DeepSeek-V3's published model code: all of them can be 0 in fp32.
SIGMOID_FLOOR = 1e-20


def check_route(
    logits: torch.Tensor, top_k: int, scores: str, bias: torch.Tensor | None, groups: int, groups_kept: int, scale: float
) -> None:
    """What ``moe_route`` asks of its arguments.

    Raises:
        ValueError: with the rule and the values.
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits {tuple(logits.shape)} must be (tokens, experts) with at least one expert")
    experts = logits.shape[1]
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f"scores ({scores}) must be softmax or sigmoid")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias {tuple(bias.shape)} must have one number for each of the {experts} experts")
    if groups < 1 or experts % groups != 0:
        raise ValueError(f"groups ({groups}) must be at least 1 and divide the number of experts ({experts})")
    if not 1 <= groups_kept <= groups:
        raise ValueError(f"groups_kept ({groups_kept}) must be from 1 to groups ({groups})")
    eligible = groups_kept * (experts // groups)
    if not 1 <= top_k <= eligible:
        raise ValueError(f"top_k ({top_k}) must be from 1 to the number of experts in the groups that are kept ({eligible})")
    if scale <= 0:
        raise ValueError(f"scale ({scale}) must be positive")


def _falling(values: torch.Tensor) -> torch.Tensor:
    """Positions along the last dimension in order of falling value, equal ones in order of position, a NaN before all numbers."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def moe_route_reference(
    logits: torch.Tensor,
    top_k: int,
    *,
    scores: Scores = "softmax",
    bias: torch.Tensor | None = None,
    groups: int = 1,
    groups_kept: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> Route:
    """The experts of each token and their weights, in fp32.

    The scores are the softmax of the logits over all experts, taken before the choice (Shazeer et al., arXiv:1701.06538, choose first), or
    their sigmoids (DeepSeek-V3, arXiv:2412.19437). The ``top_k`` experts of the largest score are chosen, a tie going to the lower
    number; without ``bias`` and groups the comparison is between the logits, whose order is that of the scores before rounding.

    With ``groups``, experts are divided into so many groups of neighbours; only the ``groups_kept`` best groups take part, by the sum of
    their two largest scores (DeepSeek-V3; DeepSeek-V2 took the largest alone).

    Args:
        logits: (T, E), fp32 or bf16. fp64 is computed in fp64: tests measure errors against it.
        top_k: experts of a token.
        scores: ``softmax`` or ``sigmoid``.
        bias: (E,), added to the scores for the choice of groups and experts, not to the weights: raise it for an expert that is chosen
            too rarely (Wang et al., arXiv:2408.15664). No gradient flows to it.
        groups: divides E.
        groups_kept: groups a token may choose from.
        normalize: divide the weights of a token by their sum. For softmax scores that is the softmax over the chosen logits.
        scale: positive; the weights are multiplied by it at last.

    Returns:
        weights: (T, top_k), fp32, differentiable.
        experts: (T, top_k), int32, in order of falling score (with its bias).
        probabilities: (T, E), fp32, the scores of all experts, differentiable: for balancing losses.
        counts: (E,), int32, how often each expert was chosen.

    Raises:
        ValueError: as ``check_route`` says.
    """
    check_route(logits, top_k, scores, bias, groups, groups_kept, scale)
    num_tokens, num_experts = logits.shape
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = torch.softmax(x, -1) if scores == "softmax" else torch.sigmoid(x)

    with torch.no_grad():
        choice = x if bias is None and groups == 1 else probabilities
        if bias is not None:
            choice = choice + bias.to(x.dtype)
        if groups > 1:
            grouped = choice.view(num_tokens, groups, num_experts // groups)
            best = grouped.sort(dim=-1, descending=True).values[..., :2].sum(-1)
            is_kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, _falling(best)[:, :groups_kept], True)
            choice = grouped.masked_fill(~is_kept.unsqueeze(-1), float("-inf")).view_as(choice)
        experts = _falling(choice)[:, :top_k]

    weights = probabilities.gather(1, experts)
    if normalize:
        weights = (
            torch.softmax(x.gather(1, experts), -1) if scores == "softmax" else weights / (weights.sum(-1, keepdim=True) + SIGMOID_FLOOR)
        )
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    return weights * scale, experts.to(torch.int32), probabilities, counts.to(torch.int32)


def moe_permute_reference(
    x: torch.Tensor, experts: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row for each slot, sorted by expert, and for one expert in the order of the slots.

    A slot whose expert is -1 goes to no expert (a dropped token): such slots come last, as rows of zeros.

    Args:
        x: (T, H), fp32 or bf16.
        experts: (T, top_k), int32, from -1 to num_experts - 1.
        num_experts: E.

    Returns:
        rows: (T * top_k, H), dtype of x, differentiable. Its gradient is ``moe_unpermute`` without weights.
        source: (T * top_k,), int32, the slot of each row; -1 for the rows of no expert.
        counts: (E,), int32, rows of each expert.
        offsets: (E + 1,), int32, the first row of each expert; the last number is the number of rows that have one.

    Raises:
        ValueError: an expert is not from -1 to num_experts - 1, or the shapes do not fit.
    """
    if x.dim() != 2 or experts.dim() != 2 or experts.shape[0] != x.shape[0] or experts.shape[1] < 1:
        raise ValueError(f"x {tuple(x.shape)} must be (tokens, width) and experts {tuple(experts.shape)} (tokens, top_k)")
    if num_experts < 1:
        raise ValueError(f"num_experts ({num_experts}) must be at least 1")
    slots = experts.flatten().long()
    if slots.numel() > 0 and not (slots.min() >= -1 and slots.max() < num_experts):
        raise ValueError(f"experts from {int(slots.min())} to {int(slots.max())} must be from -1 to num_experts - 1 ({num_experts - 1})")
    expert_or_last = torch.where(slots < 0, num_experts, slots)
    order = expert_or_last.argsort(stable=True)
    counts = torch.bincount(expert_or_last, minlength=num_experts + 1)[:num_experts]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    has_expert = slots[order] >= 0

    # Widened before rows are taken, so that the gradients of a token's slots are added in fp32.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = wide[order // experts.shape[1]].masked_fill(~has_expert.unsqueeze(-1), 0).to(x.dtype)
    source = torch.where(has_expert, order, -1)
    return rows, source.to(torch.int32), counts.to(torch.int32), offsets.to(torch.int32)


def check_unpermute(rows: torch.Tensor, source: torch.Tensor, weights: torch.Tensor | None, top_k: int) -> int:
    """What ``moe_unpermute`` asks of shapes; returns the number of tokens.

    Raises:
        ValueError: with the rule and the values.
    """
    if rows.dim() != 2 or source.shape != rows.shape[:1]:
        raise ValueError(f"rows {tuple(rows.shape)} must be (slots, width) and source {tuple(source.shape)} (slots)")
    if top_k < 1 or rows.shape[0] % top_k != 0:
        raise ValueError(f"the number of rows ({rows.shape[0]}) must be divisible by top_k ({top_k})")
    num_tokens = rows.shape[0] // top_k
    if weights is not None and weights.shape != (num_tokens, top_k):
        raise ValueError(f"weights {tuple(weights.shape)} must be (tokens, top_k), here ({num_tokens}, {top_k})")
    return num_tokens


def moe_unpermute_reference(rows: torch.Tensor, source: torch.Tensor, weights: torch.Tensor | None, *, top_k: int) -> torch.Tensor:
    """For each token the weighted sum of its rows, added in fp32 in the order of its slots and rounded once.

    Args:
        rows: (T * top_k, H), fp32 or bf16, in the order of ``moe_permute``.
        source: (T * top_k,), int32, of ``moe_permute``: a slot occurs at most once; rows whose source is -1 count for nothing.
        weights: (T, top_k), fp32, differentiable; None stands for ones.
        top_k: slots of a token.

    Returns:
        (T, H), dtype of rows. The gradient of a row is the arriving one times the row's weight, that of a weight their dot product.

    Raises:
        ValueError: the shapes do not fit, or a source is not from -1 to T * top_k - 1.
    """
    num_tokens = check_unpermute(rows, source, weights, top_k)
    num_slots, width = rows.shape
    if num_slots > 0 and not (source.min() >= -1 and source.max() < num_slots):
        raise ValueError(f"sources from {int(source.min())} to {int(source.max())} must be from -1 to {num_slots - 1}")
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    slot_or_last = torch.where(source < 0, num_slots, source.long())
    slots = wide.new_zeros(num_slots + 1, width).index_copy(0, slot_or_last, wide)[:num_slots]
    slots = slots.view(num_tokens, top_k, width)
    if weights is not None:
        slots = slots * weights.to(wide.dtype).unsqueeze(-1)
    return slots.sum(1).to(rows.dtype)


def check_mlp(rows: torch.Tensor, counts: torch.Tensor, gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor) -> None:
    """What ``expert_mlp`` asks of shapes.

    Raises:
        ValueError: with the rule and the values.
    """
    if rows.dim() != 2 or up.dim() != 3 or up.shape[2] != rows.shape[1]:
        raise ValueError(f"rows {tuple(rows.shape)} must be (rows, H) and up {tuple(up.shape)} (experts, F, H)")
    num_experts, inner, width = up.shape
    if down.shape != (num_experts, width, inner):
        raise ValueError(f"down {tuple(down.shape)} must be (experts, H, F), here {(num_experts, width, inner)}")
    if gate is not None and gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} must have the shape of up {tuple(up.shape)}")
    if counts.shape != (num_experts,):
        raise ValueError(f"counts {tuple(counts.shape)} must have one number for each of the {num_experts} experts")


def expert_mlp_reference(
    rows: torch.Tensor, counts: torch.Tensor, gate: torch.Tensor | None, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Each expert's MLP on its own rows: down(silu(gate(x)) * up(x)) with a gate, otherwise down(gelu(up(x))), gelu in its tanh form.

    The products are in the dtype of ``rows``, as ``layers.linear`` has them; the activation is computed in fp32 and rounded once.

    Args:
        rows: (R, H), sorted by expert, fp32 or bf16; the first sum(counts) belong to experts.
        counts: (E,), int32, rows of each expert.
        gate: (E, F, H), or None.
        up: (E, F, H), dtype of rows, or fp32 masters, which are cast.
        down: (E, H, F), likewise.

    Returns:
        (R, H), dtype of rows; zeros for the rows that belong to no expert.

    Raises:
        ValueError: the shapes do not fit, or counts add up to more than R.
    """
    check_mlp(rows, counts, gate, up, down)
    sizes = counts.tolist()
    if min(sizes, default=0) < 0 or sum(sizes) > rows.shape[0]:
        raise ValueError(f"counts {sizes} must not be negative, nor add up to more than the number of rows ({rows.shape[0]})")
    wide = torch.promote_types(rows.dtype, torch.float32)
    up, down = up.to(rows.dtype), down.to(rows.dtype)
    gate = None if gate is None else gate.to(rows.dtype)
    outputs = []
    *groups, rest = torch.split(rows, [*sizes, rows.shape[0] - sum(sizes)])
    for expert, group in enumerate(groups):
        inner = F.linear(group, up[expert]).to(wide)
        inner = F.gelu(inner, approximate="tanh") if gate is None else F.silu(F.linear(group, gate[expert]).to(wide)) * inner
        outputs.append(F.linear(inner.to(rows.dtype), down[expert]))
    return torch.cat([*outputs, torch.zeros_like(rest)])
