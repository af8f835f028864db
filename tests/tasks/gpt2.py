"""GPT-2 by transformers' configuration, from random weights: a loss a sequence, the mean over its tokens."""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class GPT2:
    """`small`: of 124 million parameters; else a few layers of the same kinds."""

    def __init__(self, samples: int = 24, length: int = 16, small: bool = False):
        self.small = small
        self.words = 50257 if small else 101
        self.x = torch.randint(self.words, (samples, length + 1), generator=torch.Generator().manual_seed(4))

    def model(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {} if self.small else {"vocab_size": 101, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))

    def dataset(self):
        return TensorDataset(self.x)

    def losses(self, model, batch):
        logits = model(input_ids=batch[0][:, :-1]).logits
        losses = cross_entropy(logits.transpose(1, 2), batch[0][:, 1:], reduction="none")
        return losses.mean(1)
