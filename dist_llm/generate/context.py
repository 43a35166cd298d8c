"""What a model sees while it continues texts: rows of equal length and, with a cache, the keys and values of what it has read.

B rows, T tokens in the window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dist_llm.layers.attention import KeyValueCache
from dist_llm.models.decoder import Decoder, new_cache
from dist_llm.utils.errors import ConfigError, NumericalError

__all__ = ["Context", "check_prompt"]


def check_prompt(prompt: Sequence[int], max_seq_len: int) -> None:
    """Refuse a prompt that a model of ``max_seq_len`` positions cannot read whole.

    Raises:
        ConfigError: with both lengths.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens; it begins with the tokenizer's begin token")
    if len(prompt) > max_seq_len:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens, its begin token counted; the model reads at most {max_seq_len} (model.max_seq_len): "
            "give a shorter prompt"
        )


class Context:
    """A window on the end of some texts, at most ``max_seq_len`` tokens wide.

    A window that is full slides: its last ``max_seq_len // 2`` tokens become a new window, read again from position 0. Positions
    beyond those the model has never occur, be they rotated or learned, and the cost of reading again is paid once in
    ``max_seq_len / 2`` tokens.

    With and without a cache the windows, and so the numbers up to rounding, are the same.
    """

    def __init__(self, model: Decoder, prompt: Sequence[int], *, max_new_tokens: int, use_cache: bool = True) -> None:
        self.max_seq_len = model.config.max_seq_len
        check_prompt(prompt, self.max_seq_len)
        self.model = model
        self.use_cache = use_cache
        self.capacity = min(self.max_seq_len, len(prompt) + max_new_tokens)
        # In fp32: near-equal logits stay apart, where bf16 would keep 8 bits of them.
        self.head_weight = model.head_weight.float()
        self.tokens_BT = torch.tensor([list(prompt)], dtype=torch.int64, device=self.head_weight.device)
        self._read = 0  # tokens of the window whose keys and values are in the caches
        self._caches = self._empty_caches()

    @property
    def num_rows(self) -> int:
        """Texts that are continued."""
        return self.tokens_BT.shape[0]

    def next_logits(self) -> torch.Tensor:
        """Logits of the token after the window, (B, V) float32; reads what was appended since the last call.

        Raises:
            NumericalError: they are not finite.
        """
        stop = self.tokens_BT.shape[1]
        positions = torch.arange(self._read, stop, device=self.tokens_BT.device).expand(self.num_rows, -1)
        hidden_BTD = self.model(self.tokens_BT[:, self._read :], positions, caches=self._caches)
        if self._caches is not None:
            self._read = stop
        logits = F.linear(hidden_BTD[:, -1].float(), self.head_weight)
        if not bool(logits.isfinite().all()):
            raise NumericalError("the model's logits are not finite: its weights have diverged; take an earlier checkpoint with --step N")
        return logits

    def append(self, next_B: torch.Tensor) -> None:
        """Add one token, (B,) int64, to each row."""
        self.tokens_BT = torch.cat((self.tokens_BT, next_B[:, None]), dim=1)
        if self.tokens_BT.shape[1] > self.max_seq_len:
            self.tokens_BT = self.tokens_BT[:, -max(1, self.max_seq_len // 2) :]
            self._read, self._caches = 0, self._empty_caches()

    def select(self, rows: Sequence[int]) -> None:
        """Go on with ``rows``, in that order; a row may be left out or taken several times."""
        if list(rows) == list(range(self.num_rows)):
            return
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.tokens_BT.device)
        self.tokens_BT = self.tokens_BT.index_select(0, index)
        for cache in self._caches or ():
            cache.reorder(index)

    def _empty_caches(self) -> list[KeyValueCache] | None:
        return new_cache(self.model, self.num_rows, self.capacity) if self.use_cache else None
