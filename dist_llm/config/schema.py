"""What a run can be told: one frozen section a package, unknown keys forbidden, a description on each field.

The descriptions become ``docs/config.md`` and the JSON schema. Rules that need more than one field live in ``rules.py``.
Sizes derived from others (``head_dim``, ``ffn_dim``) are properties, so that a width sweep changes one key.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "KernelsConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
]


class Section(BaseModel):
    """A part of the config: frozen, and every key known."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=False)


class ModelConfig(Section):
    """Shape of a pre-norm decoder."""

    vocab_size: int = Field(ge=2, description="Rows of the embedding; at least the tokenizer's vocabulary.")
    d_model: int = Field(ge=1, description="Width of the residual stream.")
    num_layers: int = Field(ge=1, description="Blocks of attention and MLP.")
    num_heads: int = Field(ge=1, description="Query heads.")
    num_kv_heads: int | None = Field(
        None,
        ge=1,
        description="Key and value heads: num_heads (the default) is multi-head, 1 is multi-query, between is grouped-query attention.",
    )
    head_dim: int | None = Field(None, ge=1, description="Size of one head; default d_model / num_heads.")
    ffn_dim: int | None = Field(
        None, ge=1, description="Inner width of the MLP; default 4 d_model for gelu, 8/3 d_model rounded up to a multiple of 32 for swiglu."
    )
    max_seq_len: int = Field(ge=1, description="Longest row in tokens; size of the learned position table.")
    norm: Literal["rms_norm", "layer_norm"] = Field("rms_norm", description="Normalisation before each sub-layer and at the end.")
    norm_eps: float = Field(1e-5, gt=0, description="Added to the variance inside the norm.")
    position: Literal["rotary", "learned"] = Field(
        "rotary", description="How positions enter: rotated queries and keys, or a learned table added to the embedding."
    )
    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotary frequencies.")
    window: int | None = Field(
        None, ge=1, description="Sliding window of attention: a token sees this many, itself the last of them; null sees the whole row."
    )
    window_layers: Literal["all", "alternate"] = Field(
        "all",
        description="Layers with the window: all, or every second one beginning with the second, as in GPT-3 (arXiv:2005.14165, section 2.1).",
    )
    activation: Literal["swiglu", "gelu"] = Field("swiglu", description="MLP non-linearity; swiglu has a gate matrix.")
    bias: bool = Field(False, description="Biases on the linear layers and in layer_norm.")
    tie_embeddings: bool = Field(True, description="Use the embedding matrix as the output head.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the embedding's and each sub-layer's outputs set to zero in training; which, depends on sample and token only.",
    )
    init_std: float = Field(
        0.02,
        gt=0,
        description="Standard deviation of initial weights; projections back into the residual stream are divided by sqrt(2 num_layers).",
    )
    mup_base_width: int | None = Field(
        None,
        ge=1,
        description="muP (arXiv:2203.03466): the d_model at which lr, init_std and weight_decay were tuned. They, the logits and the attention scores are scaled from it to d_model, so that the best lr stays the same; null: no scaling. docs/planning/mup.md.",
    )
    mup_base_head_dim: int | None = Field(
        None,
        ge=1,
        description="muP: size of a head at mup_base_width; default head_dim where that is given (wider models have more heads), else mup_base_width / num_heads (wider models have larger ones).",
    )

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_kv_heads if self.num_kv_heads is not None else self.num_heads

    @property
    def head_size(self) -> int:
        """Size of one head, resolved."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.num_heads

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of block ``layer`` (from 0), or None where it sees the whole row."""
        return self.window if self.window_layers == "all" or layer % 2 == 1 else None

    @property
    def mup_base_head_size(self) -> float:
        """Size of a head at the base width of muP, resolved; that of this model without muP."""
        if self.mup_base_width is None:
            return self.head_size
        if self.mup_base_head_dim is not None:
            return self.mup_base_head_dim
        return self.head_dim if self.head_dim is not None else self.mup_base_width / self.num_heads

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP, resolved."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        if self.activation == "gelu":
            return 4 * self.d_model
        return -(-8 * self.d_model // (3 * 32)) * 32


class DataConfig(Section):
    """Where rows come from and how documents are laid in them."""

    path: str | None = Field(None, description="Directory written by `dist-llm data prepare`; relative to the working directory.")
    seq_len: int = Field(ge=1, description="Tokens in a row.")
    packing: Literal["concatenate"] = Field(
        "concatenate", description="How documents fill rows: one after the other, cut wherever a row ends."
    )
    document_mask: bool = Field(
        False, description="Attention stays inside a document and positions restart at each; off, a row is read as one text."
    )
    shuffle: bool = Field(True, description="Visit the rows of an epoch in a random order that depends on seed and epoch only.")


class TrainConfig(Section):
    """How long, and in what portions."""

    steps: int = Field(ge=1, description="Optimiser steps.")
    batch_size: int = Field(ge=1, description="Rows in one optimiser step, over all ranks and micro-batches.")
    micro_batch_size: int = Field(
        ge=1, description="Rows one rank holds at once; accumulation steps = batch_size / (micro_batch_size * ranks)."
    )
    engine: Literal["auto", "plain", "deepspeed"] = Field("auto", description="auto: plain on one rank, deepspeed on more.")
    threads: int | None = Field(None, ge=1, description="CPU threads a rank computes with; default cores / ranks on the node.")
    resume: Literal["auto", "never", "must"] = Field(
        "auto",
        description="auto: go on from the newest valid checkpoint if there is one; never: refuse a directory that has one; must: fail (66) without one.",
    )


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="After warm-up: cosine to min_lr_ratio, stable then linear decay (wsd), or constant."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    decay_steps: int | None = Field(None, ge=1, description="wsd: steps of the final decay; default a fifth of the run.")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Learning rate at the end, relative to lr.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled decay of matrices; vectors (norms, biases) are never decayed.")
    clip_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0 turns clipping off.")


class ParallelConfig(Section):
    """How the run is divided over ranks: tp x cp x dp x pp of them. docs/parallelism.md has pictures."""

    tp: int = Field(1, ge=1, description="Tensor parallel ranks, which share the matrices of each layer.")
    sequence_parallel: bool = Field(
        False,
        description="With tp: norms and the residual stream are divided over the same ranks, by tokens. Same bytes on the wire, less memory.",
    )
    cp: int = Field(1, ge=1, description="Context parallel ranks, which share the tokens of each row.")
    cp_kind: Literal["ring", "all_to_all"] = Field(
        "ring",
        description="How attention sees the other ranks' tokens: keys and values travel round a ring, or heads are exchanged for tokens.",
    )
    pp: int = Field(1, ge=1, description="Pipeline stages, which share the layers.")
    schedule: Literal["1f1b", "interleaved"] = Field(
        "1f1b", description="Order of forward and backward micro-batches on a stage; interleaved gives each rank several short stages."
    )
    chunks: int = Field(1, ge=1, description="interleaved: stages a rank holds.")
    dp: int | None = Field(
        None,
        ge=1,
        description="Data parallel ranks; default what tp, cp and pp leave of the ranks started, and a different number is refused.",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage: what is divided over dp x cp (1 optimiser, 2 gradients, 3 parameters)."
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="Where ZeRO keeps its part of masters and moments.")
    offload_parameters: Literal["none", "cpu", "nvme"] = Field("none", description="Where ZeRO-3 keeps its part of the parameters.")
    offload_path: str | None = Field(None, description="Directory on a local NVMe disk, for nvme.")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="selective: compute attention again in backward; full: keep only block inputs and compute whole blocks again."
    )
    recompute_layers: int | None = Field(None, ge=1, description="Blocks of each stage that are recomputed, from its first; default all.")


class EvalConfig(Section):
    """Loss on held-out documents."""

    every: int = Field(0, ge=0, description="Evaluate every so many steps; 0: only at the end.")
    rows: int | None = Field(
        None, ge=1, description="Held-out rows read by a periodic evaluation; default all. The last evaluation always reads all."
    )


class CheckpointConfig(Section):
    """When the run is saved and how much of it is kept."""

    every: int = Field(0, ge=0, description="Save every so many steps; 0: only at the end and when asked to stop.")
    keep: int = Field(2, ge=0, description="Newest checkpoints kept; 0 keeps all.")


class LogConfig(Section):
    """Who is told, how often. metrics.jsonl gets every step."""

    every: int = Field(10, ge=1, description="Console line every so many steps where there is no terminal.")
    tensorboard: bool = Field(False, description="Mirror the metrics to tb/ in the run directory.")
    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="Mirror the metrics to Weights & Biases; offline writes to wandb/ in the run directory."
    )
    wandb_project: str = Field("dist_llm", description="wandb project.")
    timeline_every: int = Field(
        0,
        ge=0,
        description="With a pipeline: record its timeline every so many steps; 0: only the third step of each attempt, which is always recorded.",
    )


class KernelsConfig(Section):
    """Implementation of each fused op: auto takes the first that can run and has run on such a device before, a name runs or fails with the reason."""

    activation: Literal["auto", "native", "reference"] = Field("auto", description="gelu and swiglu.")
    adamw: Literal["auto", "native", "torch", "reference"] = Field(
        "auto", description="AdamW of the plain engine, with clipping and the sum of squares it needs."
    )
    attention: Literal["auto", "flash_attn", "native", "sdpa", "reference"] = Field("auto", description="Attention.")
    cross_entropy: Literal["auto", "native", "reference"] = Field("auto", description="Softmax cross-entropy.")
    dropout: Literal["auto", "native", "reference"] = Field("auto", description="Dropout.")
    embedding: Literal["auto", "native", "reference"] = Field("auto", description="Rows of the embedding tables.")
    layer_norm: Literal["auto", "native", "apex", "reference"] = Field("auto", description="LayerNorm.")
    linear: Literal["auto", "native", "onednn", "reference"] = Field("auto", description="Linear layers.")
    moe: Literal["auto", "native", "reference"] = Field("auto", description="Routing to experts, their order, and their MLPs.")
    rms_norm: Literal["auto", "native", "apex", "reference"] = Field("auto", description="RMSNorm.")
    rotary: Literal["auto", "native", "reference"] = Field("auto", description="Rotary positions.")


class RunConfig(Section):
    """One run, whole."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run.")
    run_dir: str | None = Field(None, description="Where the run writes; default runs/<name>.")
    seed: int = Field(1234, ge=0, lt=2**63, description="Root of all randomness: initial weights, data order.")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="bf16: parameters and activations in bf16; master weights, moments, gradient sums and reductions in fp32."
    )
    model: ModelConfig = Field(description="Shape of the model.")
    data: DataConfig = Field(description="Rows and documents.")
    train: TrainConfig = Field(description="Length and batch.")
    optim: OptimConfig = Field(description="AdamW and its schedule.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Division over ranks.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Held-out loss.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving.")
    log: LogConfig = Field(default_factory=LogConfig, description="Mirrors and console.")
    kernels: KernelsConfig = Field(default_factory=KernelsConfig, description="Back ends of fused ops.")

    @property
    def directory(self) -> str:
        """The run directory, resolved."""
        return self.run_dir if self.run_dir is not None else f"runs/{self.name}"
