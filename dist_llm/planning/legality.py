"""Which layouts the trainer accepts, asked of the trainer's own rules.

``config/rules.py`` decides what a run may look like; here a ``LayoutShape`` becomes the config it would be written as, and the rules
are asked. What they do not know yet are experts: those have to divide over a stage's ranks.
"""

from __future__ import annotations

from dist_llm.config.rules import broken_rules, problems_for_ranks
from dist_llm.config.schema import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from dist_llm.planning.layout_shape import LayoutShape
from dist_llm.planning.shapes import ModelShape

__all__ = ["Legality", "base_config", "config_at", "model_config"]


def model_config(model: ModelShape) -> ModelConfig:
    """The trainer's description of a dense ``model``; of a model with experts, that of one expert in their place."""
    return ModelConfig(
        vocab_size=model.vocab_size,
        d_model=model.d_model,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        ffn_dim=model.expert_ffn if model.num_experts else model.ffn_dim,
        max_seq_len=max(model.seq_len, model.learned_positions),
        norm=model.norm,
        position="learned" if model.learned_positions else "rotary",
        activation="swiglu" if model.gated else "gelu",
        bias=model.bias,
        tie_embeddings=model.tied,
        window=model.window,
        window_layers=model.window_layers,
    )


def base_config(model: ModelShape, batch_size: int, precision: str = "bf16") -> RunConfig:
    """A run of ``model`` on one rank, ``batch_size`` rows a step."""
    return RunConfig(
        precision="fp32" if precision == "fp32" else "bf16",
        model=model_config(model),
        data=DataConfig(seq_len=model.seq_len),
        train=TrainConfig(steps=1, batch_size=batch_size, micro_batch_size=1),
        optim=OptimConfig(lr=1e-4),
    )


def config_at(config: RunConfig, layout: LayoutShape) -> RunConfig:
    """``config`` divided as ``layout`` says; experts, which a config cannot describe yet, are left out."""
    parallel = {
        "tp": layout.tp,
        "pp": layout.pp,
        "cp": layout.cp,
        "dp": layout.dp,
        "zero": layout.zero,
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "cp_kind": "ring",
        "schedule": "interleaved" if layout.virtual_pp > 1 else "1f1b",
        "chunks": layout.virtual_pp,
        "recompute": layout.recompute,
    }
    train = {"batch_size": layout.global_batch, "micro_batch_size": layout.micro_batch, "engine": "auto"}
    # Types are right by construction; model_copy spares their validation, which the search could not afford.
    return config.model_copy(update={"parallel": _DEFAULT.model_copy(update=parallel), "train": config.train.model_copy(update=train)})


_DEFAULT = ParallelConfig()


class Legality:
    """The rules for one model and batch."""

    def __init__(self, model: ModelShape, batch_size: int, precision: str = "bf16") -> None:
        self.model = model
        self.config = base_config(model, batch_size, precision)

    def refusal(self, layout: LayoutShape) -> str | None:
        """Why the trainer would not run ``layout``, with the key at fault, or ``None``."""
        config = config_at(self.config, layout)
        for rule, message in broken_rules(config):
            return f"{rule.keys[0]}: {message}"
        for problem in problems_for_ranks(config, layout.ranks):
            return str(problem)
        return self._expert_refusal(layout)

    def _expert_refusal(self, layout: LayoutShape) -> str | None:
        experts, ep = self.model.num_experts, layout.ep
        if ep == 1:
            return None
        if not experts:
            return f"parallel.ep: {ep} ranks have no experts to divide; use 1"
        if experts % ep:
            return f"parallel.ep: {ep} must divide the {experts} experts of a layer"
        ranks = layout.tp * layout.cp * layout.dp
        return f"parallel.ep: {ep} must divide the {ranks} ranks of a stage" if ranks % ep else None
