"""Everyone whom ``bench step`` races against, by name."""

from __future__ import annotations

from typing import Protocol

import torch

from dist_llm.bench.peers.deepspeed_plain import DeepSpeedPlainStep
from dist_llm.bench.peers.gpt import PlainGPT, PlainStep
from dist_llm.bench.peers.hugging_face import HuggingFaceGPT, why_not_hugging_face
from dist_llm.config.schema import RunConfig

__all__ = ["AUTOCAST", "BF16_WEIGHTS", "TITLES", "PeerStep", "build_peers"]


class PeerStep(Protocol):
    """A training step in two halves, so that the gradients can be seen between them."""

    def backward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Tokens and targets (B, T) to the mean loss."""
        ...

    def gradients(self) -> dict[str, torch.Tensor]:
        """Unclipped, by the names of ``PlainGPT``."""
        ...

    def update(self) -> None:
        """Clip, step, and forget the gradients."""
        ...


# Each name with what people call it.
TITLES = {
    "pytorch_autocast": "PyTorch eager, autocast",
    "compile_autocast": "torch.compile, autocast",
    "hugging_face_autocast": "Hugging Face GPT-2, autocast",
    "pytorch_bf16_masters": "PyTorch eager, bf16 weights",
    "compile_bf16_masters": "torch.compile, bf16 weights",
    "hugging_face_bf16_masters": "Hugging Face, bf16 weights",
    "deepspeed_zero0": "DeepSpeed ZeRO-0, bf16 weights",
}
# fp32 weights under bf16 autocast, the usual way; and bf16 weights with fp32 masters in the optimiser.
AUTOCAST = tuple(name for name in TITLES if name.endswith("autocast"))
BF16_WEIGHTS = tuple(name for name in TITLES if name not in AUTOCAST)


def build_peers(config: RunConfig, weights: dict[str, torch.Tensor], device: torch.device) -> tuple[dict[str, PeerStep], dict[str, str]]:
    """All peers with the same weights, and why those that are missing are.

    Args:
        config: of the race.
        weights: ours, by logical name.
        device: where they run.

    Returns:
        name -> training step; name -> reason.
    """
    model, optim = config.model, config.optim

    def plain(masters: bool, compiles: bool = False) -> PlainStep:
        return PlainStep(PlainGPT(model, weights).to(device), optim, masters=masters, compiles=compiles)

    peers: dict[str, PeerStep] = {
        "pytorch_autocast": plain(False),
        "compile_autocast": plain(False, compiles=True),
        "pytorch_bf16_masters": plain(True),
        "compile_bf16_masters": plain(True, compiles=True),
        "deepspeed_zero0": DeepSpeedPlainStep(PlainGPT(model, weights).to(device), optim, batch_size=config.train.batch_size),
    }
    if reason := why_not_hugging_face():
        return peers, {"hugging_face_autocast": reason, "hugging_face_bf16_masters": reason}
    peers["hugging_face_autocast"] = PlainStep(HuggingFaceGPT(model, weights).to(device), optim, masters=False)
    peers["hugging_face_bf16_masters"] = PlainStep(HuggingFaceGPT(model, weights).to(device), optim, masters=True)
    return peers, {}
