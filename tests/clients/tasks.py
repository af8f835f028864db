"""Small tasks whose models the clients train: `--task tasks.py:Mlp`, or `tasks.py:Hub:kind=vit`."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

SAMPLES, INPUTS, CLASSES = 24, 8, 4


class Mlp:
    """Points in classes, through two layers; a model that also gives Hugging Face's Trainer its loss."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(INPUTS, 12)
            self.second = nn.Linear(12, CLASSES)

        def forward(self, x, labels=None):
            logits = self.second(torch.relu(self.first(x)))
            return logits if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, INPUTS, generator=generator)
        self.y = torch.arange(SAMPLES) % CLASSES

    def model(self):
        return Mlp.Model()

    def dataset(self):
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")


class Norm(Mlp):
    """With batch norm, whose statistics are buffers."""

    def model(self):
        return nn.Sequential(nn.Linear(INPUTS, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, CLASSES))


class Lora(Mlp):
    """peft's adapters on the first layer, and the last layer trained whole."""

    def model(self):
        import peft

        torch.manual_seed(7)  # the base, which the adapters' files do not hold
        config = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"])
        return peft.get_peft_model(Mlp.Model(), config)


def hub_model(kind):
    """A tiny model of transformers."""
    import transformers as hf

    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    picture = dict(image_size=8, patch_size=4, num_channels=3, num_labels=CLASSES)
    words = dict(vocab_size=19, max_position_embeddings=16)
    match kind:
        case "vit":
            return hf.ViTForImageClassification(hf.ViTConfig(**size, **picture))
        case "deit":
            return hf.DeiTForImageClassification(hf.DeiTConfig(**size, **picture))
        case "dinov2":
            return hf.Dinov2ForImageClassification(hf.Dinov2Config(**size, **picture))
        case "swin":
            more = dict(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
            return hf.SwinForImageClassification(hf.SwinConfig(**(picture | {"patch_size": 2}), **more))
        case "mixtral":
            more = dict(num_local_experts=3, num_experts_per_tok=2, num_key_value_heads=2)
            return hf.MixtralForCausalLM(hf.MixtralConfig(**size, **words, **more))
        case "neox":
            return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**size, **words))
        case "gpt2":
            return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=19, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    raise ValueError(kind)


class Hub:
    """Pictures or words through a model of transformers."""

    def __init__(self, kind: str = "gpt2"):
        self.kind = kind
        generator = torch.Generator().manual_seed(0)
        self.words = kind in ("mixtral", "neox", "gpt2")
        pictures = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
        self.x = torch.randint(0, 19, (SAMPLES, 6), generator=generator) if self.words else pictures
        self.y = torch.arange(SAMPLES) % CLASSES

    def model(self):
        return hub_model(self.kind)

    def dataset(self):
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        logits = model(batch[0]).logits
        if not self.words:
            return cross_entropy(logits, batch[1], reduction="none")
        lost = cross_entropy(logits[:, :-1].transpose(1, 2), batch[0][:, 1:], reduction="none")
        return lost.mean(1)
