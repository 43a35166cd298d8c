"""Bytes a rank needs for a run: parameters, gradients, optimiser, activations, logits; and bytes on disk for a checkpoint.

States are exact up to padding; activations are an estimate from what autograd keeps for the backward pass of this model's
layers (compare Korthikanti et al., arXiv:2205.05198, section 4, for a GPT block with fused attention).
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.config.schema import RunConfig
from dist_llm.planning.count import count_params

__all__ = ["RankMemory", "checkpoint_bytes", "rank_memory"]


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int  # fp32 masters where they are a second copy, and two moments
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def rank_memory(config: RunConfig, dp: int, *, plain: bool) -> RankMemory:
    """Estimate for one of ``dp`` ranks.

    Args:
        config: the run.
        dp: data-parallel ranks.
        plain: the plain engine, which divides nothing and keeps only fp32 parameters.
    """
    params = count_params(config.model).total
    zero = 0 if plain else config.parallel.zero
    bf16 = config.precision == "bf16"
    low = 2 if bf16 and zero > 0 else 4  # bytes of a parameter in the module
    masters = 4 if low == 2 else 0  # a second, fp32 copy
    share = [-(-params // dp) if zero >= stage else params for stage in (1, 2, 3)]
    return RankMemory(
        parameters=low * share[2],
        gradients=4 * share[1],  # accumulated in fp32
        optimizer=(masters + 8) * share[0],
        activations=_activation_bytes(config),
        logits=_logit_bytes(config),
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one checkpoint: masters and two moments in fp32."""
    return 12 * count_params(config.model).total


def _activation_bytes(config: RunConfig) -> int:
    model, rows = config.model, config.train.micro_batch_size
    tokens = rows * config.data.seq_len
    size = 2 if config.precision == "bf16" else 4
    attention = 2 * model.num_heads * model.head_size + 2 * model.kv_heads * model.head_size  # q, k, v, out
    mlp = (4 if model.activation == "swiglu" else 2) * model.ffn_size
    per_token = 6 * model.d_model + attention + mlp  # two residuals, two norm outputs, two sub-layer outputs
    if config.parallel.recompute == "full":
        return tokens * size * (model.num_layers * model.d_model + per_token)  # block inputs, and one block at a time
    return tokens * size * model.num_layers * per_token


def _logit_bytes(config: RunConfig) -> int:
    # Logits in the compute dtype, their fp32 copy, log-probabilities and their gradient.
    tokens = config.train.micro_batch_size * config.data.seq_len
    return tokens * config.model.vocab_size * ((2 if config.precision == "bf16" else 4) + 12)
