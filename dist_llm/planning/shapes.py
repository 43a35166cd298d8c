"""The shape of a model, as planning sees it: dense or mixture of experts, with the length of its rows.

``ModelShape`` says what the trainer's ``ModelConfig`` can say and what published models add to it (experts), so that one set of
formulas counts both. Sizes are whole numbers; nothing here knows a layout or a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dist_llm.config.schema import ModelConfig

__all__ = ["ModelShape", "attended", "from_config"]


def attended(window: int | None, seq_len: int) -> float:
    """Twice the tokens that a token sees on average through ``window``, in a row of ``seq_len``: the whole row where there is none."""
    seen = min(window or seq_len, seq_len)
    # The first `window` tokens see fewer. Half a token a row is left out, as it is in T / 2 of the causal half.
    return seen * (2 - seen / seq_len)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a pre-norm decoder.

    ``num_experts = 0`` is a dense model. With experts, every ``moe_every``-th layer (counted from the end, so that the layers that
    stay dense come first, as in DeepSeek-V3) routes each token to ``experts_per_token`` of ``num_experts`` MLPs of width
    ``expert_ffn_dim`` and to all ``shared_experts``; the other layers keep an MLP of ``ffn_dim``. ``dense_layers`` more layers at
    the start stay dense.

    ``window`` and ``window_layers`` are those of ``ModelConfig``: two numbers say what each layer sees, and the shape stays cheap to hash.
    """

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    gated: bool
    vocab_size: int
    seq_len: int
    tied: bool
    learned_positions: int = 0  # rows of a learned position table
    bias: bool = False
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    num_experts: int = 0
    experts_per_token: int = 0
    shared_experts: int = 0
    moe_every: int = 1
    expert_ffn_dim: int | None = None  # default ffn_dim
    dense_layers: int = 0
    attention_matrix: int = 0  # matrix elements of one attention that is not query, key, value and output (low-rank: MLA)
    window: int | None = None  # tokens that a token sees in a layer with a window; None: every layer sees the whole row
    window_layers: Literal["all", "alternate"] = "all"  # alternate: every second one, beginning with the second

    def __post_init__(self) -> None:
        for name in ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "vocab_size", "seq_len", "moe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learned_positions", "num_experts", "experts_per_token", "shared_experts", "dense_layers", "attention_matrix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(f"experts_per_token must lie between 1 and num_experts ({self.num_experts}), got {self.experts_per_token}")
        if self.dense_layers > self.num_layers:
            raise ValueError(f"dense_layers ({self.dense_layers}) must not exceed num_layers ({self.num_layers})")

    @property
    def moe_layers(self) -> int:
        """Layers whose MLP is a set of experts."""
        return (self.num_layers - self.dense_layers) // self.moe_every if self.num_experts else 0

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of block ``layer`` (from 0), or None where it sees the whole row."""
        return self.window if self.window_layers == "all" or layer % 2 == 1 else None

    @property
    def windowed_layers(self) -> int:
        """Layers with a window."""
        if self.window is None:
            return 0
        return self.num_layers if self.window_layers == "all" else self.num_layers // 2

    @cached_property
    def attended_tokens(self) -> float:
        """``attended``, summed over the layers."""
        windowed = self.windowed_layers
        return windowed * attended(self.window, self.seq_len) + (self.num_layers - windowed) * attended(None, self.seq_len)

    @property
    def expert_ffn(self) -> int:
        """Width of one expert, resolved."""
        return self.expert_ffn_dim if self.expert_ffn_dim is not None else self.ffn_dim

    @cached_property
    def attention_weights(self) -> int:
        """Matrix elements of one attention: query, key, value, output."""
        return self.attention_matrix or 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)

    @cached_property
    def mlp_weights(self) -> int:
        """Matrix elements of one dense MLP."""
        return (3 if self.gated else 2) * self.d_model * self.ffn_dim

    @cached_property
    def expert_weights(self) -> int:
        """Matrix elements of one expert."""
        return (3 if self.gated else 2) * self.d_model * self.expert_ffn

    @cached_property
    def router_weights(self) -> int:
        """Matrix elements of one router."""
        return self.d_model * self.num_experts

    @cached_property
    def head_weights(self) -> int:
        """Matrix elements of the output head, tied or not."""
        return self.vocab_size * self.d_model


def from_config(model: ModelConfig, seq_len: int) -> ModelShape:
    """The shape of ``model`` on rows of ``seq_len`` tokens."""
    return ModelShape(
        num_layers=model.num_layers,
        d_model=model.d_model,
        num_heads=model.num_heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_size,
        ffn_dim=model.ffn_size,
        gated=model.activation == "swiglu",
        vocab_size=model.vocab_size,
        seq_len=seq_len,
        tied=model.tie_embeddings,
        learned_positions=model.max_seq_len if model.position == "learned" else 0,
        bias=model.bias,
        norm=model.norm,
        window=model.window,
        window_layers=model.window_layers,
    )
