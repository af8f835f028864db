"""A text's tokens as sequences of one length, in which every token is predicted from those before it.

I sequences, T their length, S = I T samples, N tokens of the text, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from opsig_cli.errors import OpsigError
from opsig_zoo.tokens import quoted

SHOWN = 80
"""Characters of a context that a person is shown, its last ones."""
LINE_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


class Windows:
    """Sequences of a text; a sample is a position of one, its target the token that follows.

    `tokens` (N,); `piece(n)`: the bytes of the text's n-th token. `samples`: about so many targets, in whole sequences
    spread evenly over the text; 0 means every token, the last sequence filled up with positions that have no target.
    Raises OpsigError for a text of less than one sequence.
    """

    def __init__(self, tokens: np.ndarray, piece: Callable[[int], bytes], length: int, samples: int, path: str):
        if length < 1 or samples < 0:
            raise ValueError("the length must be at least 1, and samples too, or 0 for all")
        if len(tokens) <= length:
            raise OpsigError(f"{path} holds {len(tokens)} tokens, too few for a context of {length}")
        self.tokens, self._piece, self.length = tokens, piece, length
        targets = len(tokens) - 1
        wanted, whole = -(-samples // length), -(-targets // length)
        if wanted and wanted < whole:
            self.starts = np.linspace(0, targets - length, wanted).round().astype(np.int64)
        else:
            self.starts = np.arange(whole) * length

    def dataset(self) -> TensorDataset:
        """Tokens (I, T), their targets (I, T), -1 without one, and their places in the sequence (I, T), int32.

        Memory: 8 bytes a position. Places are one row that all sequences share.
        """
        padded = np.append(self.tokens.astype(np.int32), np.full(self.length, -1, np.int32))
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.length)
        tokens, targets = torch.from_numpy(windows[self.starts]), torch.from_numpy(windows[self.starts + 1])
        return TensorDataset(tokens.clamp_(0), targets, torch.arange(self.length).int().expand(len(tokens), -1))

    def label(self, i: int) -> str:
        """The target of a sample, in quotes; nothing where it has none."""
        target = self.target(i)
        return quoted(self._piece(target)) if target < len(self.tokens) else ""

    def render(self, i: int) -> str:
        """The end of a sample's context, its line breaks visible, and the target in brackets."""
        target = self.target(i)
        first = max(target - i % self.length - 1, target - SHOWN)
        before = b"".join(self._piece(n) for n in range(first, min(target, len(self.tokens))))
        shown = before.decode(errors="backslashreplace")[-SHOWN:].replace("\n", LINE_BREAK)
        return f"{shown}[{self.label(i).removeprefix('b')[1:-1]}]"

    def target(self, i: int) -> int:
        """Which token of the text a sample's target is; N or more where it has none."""
        return int(self.starts[i // self.length]) + i % self.length + 1


def token_losses(logits: Tensor, batch: Any) -> Tensor:
    """Cross-entropy of every position of a batch, (B, T) from logits (B, T, V), NaN where it has no target."""
    targets = batch[1].long()
    losses = cross_entropy(logits.flatten(0, 1), targets.clamp_min(0).flatten(), reduction="none").view_as(targets)
    return losses.masked_fill(targets < 0, torch.nan)
