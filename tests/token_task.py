"""A tiny task of tokens: sequences of digits, each predicted from those before it; every fifth place has no target."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

LENGTH = 6


class Causal(nn.Module):
    """One layer of causal attention with tied embeddings, and places that are looked up once for all sequences."""

    def __init__(self, vocabulary: int, width: int, tied: bool, shared_places: bool):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        self.shared_places = shared_places
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1]).expand(1 if self.shared_places else len(tokens), -1)
        x = self.embed(tokens) + self.place(places)
        q, k, v = self.mix(x).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(torch.tanh(self.norm(x)))


class Digits:
    """`items` sequences; `gaps`: places 4, 9, ... counted through all samples have no target."""

    positions = LENGTH
    classes = tuple(map(repr, "0123456"))

    def __init__(self, items: int = 40, width: int = 8, tied: bool = True, gaps: bool = True, shared: bool = False):
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 7, (items, LENGTH + 1), generator=generator)
        for place in range(2, LENGTH + 1):  # what follows 3 is settled by what came before it, so that sides oppose
            after = tokens[:, place - 1] == 3
            tokens[after, place] = (tokens[after, place - 2] % 2) * 5
        self.tokens = tokens
        self.counts = torch.ones(items * LENGTH, dtype=torch.bool)
        if gaps:
            self.counts[4::5] = False
        self._options = (7, width, tied, shared)

    def model(self):
        return Causal(*self._options)

    def dataset(self):
        return TensorDataset(self.tokens[:, :-1], self.tokens[:, 1:], self.counts.view(-1, LENGTH))

    def losses(self, model, batch):
        tokens, targets, counts = batch
        losses = cross_entropy(model(tokens).transpose(1, 2), targets, reduction="none")
        return losses.masked_fill(~counts, torch.nan)

    def predictions(self, model, batch):
        return model(batch[0]).argmax(2)

    def label(self, i):
        return self.classes[int(self.tokens[i // LENGTH, i % LENGTH + 1])]

    def render(self, i):
        before = "".join(str(int(t)) for t in self.tokens[i // LENGTH, : i % LENGTH + 1])
        return f"{before}[{self.label(i)[1:-1]}]"
