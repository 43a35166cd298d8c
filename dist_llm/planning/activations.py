"""What autograd keeps for the backward pass of one micro-batch, layer by layer, on one rank.

Counted from the trainer's own layers: a tensor that several operations save counts once, as in memory. With compiled kernels
(csrc/), per token and layer, with D the width of the residual stream, N and K query and key-value heads of size H, F the width of the
MLP, t tensor-parallel ranks and b bytes an element:

    residual stream, twice          2 D b        / t under sequence parallelism
    outputs of the two norms        2 D b        whole also under sequence parallelism: the gathered tensor is what is saved
    query, key, value, result       (2 N + 2 K) H b / t
    log-sum-exp of attention        4 N / t
    MLP                             3 F b / t gated (gate, up, product), 2 F b / t with gelu
    statistics of the norms         8 (root mean square) or, of LayerNorm, 16

Compare Korthikanti et al., arXiv:2205.05198, section 4, whose 34 s b h are those of dropout masks and unfused kernels.
docs/planning/memory.md has the measured figures, and what plain PyTorch keeps in place of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.saving import OURS, Attention, Saving
from dist_llm.planning.shapes import ModelShape

__all__ = ["Kept", "kept_for_backward"]


@dataclass(frozen=True)
class Kept:
    """Bytes that one micro-batch leaves behind on a rank between its forward and its backward.

    layer, expert_layer: a dense block and one with experts, at the layout's recomputation. layer_whole, expert_layer_whole: without
    any. layer_again, expert_layer_again: what exists besides while the backward works on one recomputed block. window, window_whole,
    window_again: what the same three are more of a block with a window. first: of the embedding. last: of the final norm and the loss
    without the logits. logits: of the head, kept. logits_working: what the loss's backward makes of them at once. lent_head: the cast copy of a tied
    head that another stage lends. shared: once for all blocks of a stage (rotary tables). stream: hidden states that go from stage to
    stage. working: gradients and copies of activations in passage while the backward works on one block.
    """

    layer: int
    expert_layer: int
    layer_whole: int
    expert_layer_whole: int
    layer_again: int
    expert_layer_again: int
    window: int
    window_whole: int
    window_again: int
    first: int
    last: int
    logits: int
    logits_working: int
    lent_head: int
    shared: int
    stream: int
    working: int


@lru_cache(maxsize=4096)
def kept_for_backward(model: ModelShape, layout: LayoutShape, size: int, saving: Saving = OURS, exchanges_heads: bool = False) -> Kept:
    """Bytes kept by the parts of ``model`` for one micro-batch of ``layout``.

    Args:
        model: shape.
        layout: micro-batch, tp, cp, ep, sequence parallelism and recomputation are read.
        size: bytes of an element of the compute dtype.
        saving: what the layers save.
        exchanges_heads: context parallelism by all-to-all, which saves attention's result on both sides of the exchange.
    """
    tp, d, head = layout.tp, model.d_model, model.head_dim
    tokens, heads, kv_heads = _held(model, layout)
    divided = layout.sequence_parallel and tp > 1
    own = tokens // tp if divided else tokens  # tokens of the residual stream
    entering = own if divided and saving.gathers_again else tokens
    query, key = tokens * heads * head * size, tokens * kv_heads * head * size
    stream = own * d * size

    plain_norm, plain_activation = "norm" in saving.plain, "activation" in saving.plain
    statistics = own * (8 if model.norm == "layer_norm" and not plain_norm else 4)
    input_size = saving.input_size or size
    norm_input, norm_output = stream, entering * d * input_size
    if plain_norm:
        norm_input = own * d * 4 * 2  # of RMSNorm the fp32 copy, or x itself, and x / rms; of LayerNorm the centred x, and that times rstd
    norms = 2 * (norm_input + norm_output + statistics)

    def attention_bytes(kind: Attention) -> int:
        kept = _attention_bytes(model, layout, size, kind, saving, exchanges_heads)
        # The result once more, as the next product's input.
        return kept + (query // size * input_size if input_size != size else 0)

    attention = attention_bytes(saving.attention)
    window = attention_bytes(saving.windowed) - attention if model.window is not None and saving.windowed is not None else 0
    # Bytes a hidden feature: what the non-linearity needs and, unless it is made again, the input of the last product.
    ffn = tokens * (size + input_size)
    if model.gated:
        ffn = tokens * ((saving.gated_tensors - 1) * size + input_size if saving.gated_tensors > 2 else 2 * size)
    if plain_activation:
        ffn = tokens * ((12 if model.gated else 4) + input_size)  # gate, silu and up, or the input of gelu, in fp32
    masks = 2 * own * d if saving.dropout else 0
    cast_norm = d * size
    cast_attention = cast_mlp = cast_expert = cast_head = 0
    if size < 4 and not saving.casts_weights:
        # Of parameters that several tensor-parallel ranks hold, gradients are summed in fp32: they are cast there and back.
        shared_norm = cast_norm if divided else 0
        shared_heads = 2 * kv_heads * head * d * size if tp > model.num_kv_heads else 0
        cast_attention, cast_head = 2 * shared_norm + shared_heads, shared_norm
    elif size < 4:
        cast_attention = model.attention_weights // tp * size + 2 * cast_norm
        cast_mlp = (model.mlp_weights + (model.ffn_dim if model.bias and not model.gated else 0)) // tp * size  # gelu adds the bias
        cast_expert = model.num_experts // layout.ep * model.expert_weights * size
        cast_head = -(-model.vocab_size // tp) * d * size + cast_norm
    block = norms + attention + masks + cast_attention
    dense = block + ffn * model.ffn_dim // tp + cast_mlp
    moe = 0
    if model.moe_layers:
        moe = block + _expert_bytes(model, layout, own, size, input_size, ffn // tokens) + cast_expert

    positions = tokens * head * 4 if not model.learned_positions else 0  # cosine and sine, fp32
    whole_dense, whole_moe, again = dense, moe, 0
    window_whole = window
    if layout.recompute != "none":
        window = 0
    selective = layout.recompute == "selective" and saving.selective == "attention"
    if layout.recompute == "full":
        dense, moe = stream, (stream if moe else 0)
    elif layout.recompute == "selective":
        if selective:
            # Saved instead of what attention saves: its inputs before rotation, and its result for the next product.
            fused = 2 * (query + key)
            # Besides these exist once more, for a block: what attention saves but its values, and without rotation its inputs.
            again = attention - (key if positions else query + 2 * key)
            dense, moe = dense - attention + fused, (moe - attention + fused if moe else 0)
        else:
            share = 2 if saving.selective == "half" else 1
            products = query + 2 * key + 2 * stream
            wide = tokens * size * (2 if model.gated else 1)
            dense = min(dense, stream + query + (products + wide * model.ffn_dim // tp) // share)
            if moe:
                active = model.experts_per_token + model.shared_experts
                moe = min(moe, stream + query + (products + wide * active * model.expert_ffn // tp) // share)
    rows = -(-model.vocab_size // tp)
    logits, logits_working = _logits(tokens * rows, tp, size, plain="cross_entropy" in saving.plain)
    return Kept(
        layer=dense,
        expert_layer=moe,
        layer_whole=whole_dense,
        expert_layer_whole=whole_moe,
        layer_again=again if selective else whole_dense - dense,
        expert_layer_again=again if selective and moe else whole_moe - moe,
        window=window,
        window_whole=window_whole,
        window_again=window_whole - window,
        first=tokens * (8 if tp == 1 else 9) + (own * 8 if model.learned_positions else 0),
        last=norm_input + norm_output + statistics + tokens * (16 if tp == 1 else 20) + cast_head,
        logits=logits,
        logits_working=logits_working,
        lent_head=rows * d * size if size < 4 and not saving.casts_weights else 0,
        shared=positions,
        stream=stream,
        working=2 * stream + _working_bytes(model, layout, size, saving, exchanges_heads),
    )


def _held(model: ModelShape, layout: LayoutShape) -> tuple[int, int, int]:
    """Tokens of a micro-batch, query heads and key-value heads of a rank."""
    tokens = layout.micro_batch * model.seq_len // layout.cp
    return tokens, model.num_heads // layout.tp or 1, max(1, model.num_kv_heads // layout.tp)


def _attention_bytes(model: ModelShape, layout: LayoutShape, size: int, kind: Attention, saving: Saving, exchanges_heads: bool) -> int:
    """What attention of one layer keeps, its inputs and result included."""
    tokens, heads, kv_heads = _held(model, layout)
    head, length = model.head_dim, model.seq_len
    query, key = tokens * heads * head * size, tokens * kv_heads * head * size
    exchanged = query if exchanges_heads and layout.cp > 1 else 0
    fused = 2 * (query + key) + tokens * heads * 4 + exchanged
    if kind == "scores":
        return 2 * (query + key) + tokens * heads * length * (2 * size + 1) + exchanged
    if layout.cp > 1 and not exchanges_heads:
        # The ring has a backward of its own, whatever computes its blocks; the result of plain ones is laid out by heads, and copied.
        return fused + (query if "attention_block" in saving.plain else 0)
    if kind == "fused":
        return fused
    if kind in ("one_mask", "row_masks"):
        return fused + (layout.micro_batch if kind == "row_masks" else 1) * length * length * size
    # Queries, keys and values in fp32, a copy of keys and values for each query head; the probabilities.
    return query + 3 * tokens * heads * head * 4 + tokens * heads * 4 * length + exchanged


def _working_bytes(model: ModelShape, layout: LayoutShape, size: int, saving: Saving, exchanges_heads: bool) -> int:
    """What passes while one block is computed or its gradients are, beyond what it keeps: of its MLP or its attention, whichever is more.

    Found with the allocator's record of a step on a CPU; docs/planning/memory.md has the figures.
    """
    tokens, heads, _ = _held(model, layout)
    wide = max(model.ffn_dim, model.expert_ffn if model.moe_layers else 0)
    feature = (8 if model.gated else 6) if "activation" in saving.plain else size * (2 if model.gated else 1)
    mlp = tokens * feature * wide // layout.tp
    square = model.seq_len * model.seq_len
    attention = 0
    if layout.cp > 1 and not exchanges_heads:
        # Scores, probabilities and their gradients of the queries and keys of one rank.
        own = square // layout.cp**2
        attention = 16 * layout.micro_batch * heads * own if "attention_block" in saving.plain else 0
    else:
        for kind in (saving.attention, saving.windowed):
            if kind == "math":  # gradients of probabilities and scores
                attention = max(attention, 8 * tokens * heads * model.seq_len)
        if "row_masks" in (saving.attention, saving.windowed):
            attention += 3 * layout.micro_batch * square  # which documents are the same, and the mask before it is cast
        if model.window is not None and saving.windowed in ("one_mask", "row_masks", "math"):
            attention += 18 * square  # distances, in 64-bit integers, and the mask
    return max(mlp, attention)


def _logits(elements: int, tp: int, size: int, *, plain: bool) -> tuple[int, int]:
    """Bytes of the logits that are kept, and of what the loss's backward makes of them."""
    if not plain:
        return elements * size, elements * size
    if tp == 1:
        return elements * 4, elements * 8  # fp32 log-probabilities; their gradient, and that of the logits
    # A divided vocabulary keeps the logits as they are; its backward has them in fp32 two or three times, and rounds the last.
    return elements * size, elements * (8 if size == 4 else 14)


def _expert_bytes(model: ModelShape, layout: LayoutShape, own: int, size: int, input_size: int, hidden: int) -> int:
    """A layer of experts, by formula: router in fp32, tokens as sent and as computed, and their combination.

    Each of the ``own`` tokens of the residual stream is computed by ``experts_per_token`` experts; over the ranks that share
    experts the load is taken as even. hidden: bytes a hidden feature.
    """
    routed = own * model.experts_per_token
    router = own * model.num_experts * (4 + 4) + routed * (4 + 8)  # logits, probabilities; weights and numbers of those chosen
    # What experts read, and their results, which the gradient of the combination's weights needs.
    streams = routed * model.d_model * (input_size + size)
    shared = own * hidden * model.shared_experts * model.expert_ffn // (1 if layout.sequence_parallel else layout.tp)
    return router + streams + routed * hidden * model.expert_ffn + shared
