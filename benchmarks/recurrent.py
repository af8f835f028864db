"""A task for `plans.py`: sequences of random words for a recurrent network, whose gradients take the general path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

WORDS, LENGTH, CLASSES = 2000, 24, 4


class Reader(nn.Module):
    """Words, a recurrent layer, and a class by its last state."""

    def __init__(self, width: int):
        super().__init__()
        self.words, self.layer = nn.Embedding(WORDS, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.words(words))[0][:, -1])


class Recurrent:
    """The class of a sequence is that of its most frequent quarter of the words."""

    def __init__(self, samples: int = 300, width: int = 64):
        self.width = width
        self.x = torch.randint(WORDS, (samples, LENGTH), generator=torch.Generator().manual_seed(5))
        self.y = torch.stack([(self.x % CLASSES == each).sum(1) for each in range(CLASSES)], 1).argmax(1)

    def model(self) -> nn.Module:
        return Reader(self.width)

    def dataset(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="none")
