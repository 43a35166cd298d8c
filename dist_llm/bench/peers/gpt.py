"""A GPT-2-like decoder and its training step in plain PyTorch: the peer of ``bench step``.

Fused query-key-value projection, torch's scaled_dot_product_attention, LayerNorm, gelu, learned positions, tied head, fused AdamW:
what a careful person writes in eager mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from dist_llm.config.schema import ModelConfig, OptimConfig

__all__ = ["PeerModel", "PlainGPT", "PlainStep", "peer_tensors"]


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PeerModel(nn.Module):
    """Tokens (B, T) int64 to logits (B, T, V)."""

    def as_plain(self, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under this model's names, such as gradients, under those of ``PlainGPT``."""
        raise NotImplementedError


class PlainGPT(PeerModel):
    """Tokens to logits. Weights are taken over from ours, so that both compute the same function."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(_Block(config.d_model, config.num_heads, config.norm_eps) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.load_state_dict(peer_tensors(weights, config.num_layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 -> (B, T, V)."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def as_plain(self, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """They are its own names."""
        return named


def peer_tensors(ours: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Our weights, or their gradients, under the names of ``PlainGPT``."""
    peer = {"embedding.weight": ours["embedding.weight"], "positions.weight": ours["positions.weight"]}
    names = {"norm1": "attention_norm", "norm2": "mlp_norm", "out": "attention.output", "up": "mlp.up", "down": "mlp.down"}
    for kind in ("weight", "bias"):
        peer[f"norm.{kind}"] = ours[f"final_norm.{kind}"]
        for i in range(num_layers):
            parts = [ours[f"blocks.{i}.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            peer[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
            peer.update({f"blocks.{i}.{mine}.{kind}": ours[f"blocks.{i}.{name}.{kind}"] for mine, name in names.items()})
    return peer


class PlainStep:
    """The usual training step around a model that turns tokens into logits.

    Args:
        model: fp32.
        optim: as ours.
        masters: False: fp32 weights under bf16 autocast. True: bf16 weights, and fp32 masters in the optimiser.
        compiles: run the model under ``torch.compile``; the first step then compiles.
    """

    def __init__(self, model: PeerModel, optim: OptimConfig, *, masters: bool, compiles: bool = False) -> None:
        self.model = model
        self.logits: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if compiles else model
        self.clip_norm = optim.clip_norm
        self.masters: list[torch.Tensor] | None = None
        trained: list[torch.Tensor] = list(model.parameters())
        if masters:
            self.masters = trained = [p.detach().clone().requires_grad_() for p in model.parameters()]
            model.to(torch.bfloat16)
        decayed, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        self.trained = trained

    def backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss; its gradients are in the model's parameters."""
        autocast = contextlib.nullcontext() if self.masters else torch.autocast(tokens.device.type, torch.bfloat16)
        with autocast:
            logits = self.logits(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Between ``backward`` and ``update``: the gradients as they are, under the names of ``PlainGPT``."""
        return self.model.as_plain({name: p.grad for name, p in self.model.named_parameters() if p.grad is not None})

    def update(self) -> None:
        """Clip, and step with the gradients."""
        if self.masters is not None:
            for master, low in zip(self.masters, self.model.parameters(), strict=True):
                assert low.grad is not None
                master.grad = low.grad.float()
                low.grad = None
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not None:
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), self.masters)
