"""Small networks, each around one kind of layer: what per-sample derivatives must be right for, or refuse in one line.

PARTS names layers that keep samples apart, COUPLED and CHANGING ones that do not, and REFUSED ones of which not
everything can be measured. Every part takes (B, 12) and gives (B, 12). `Part:which=NAME` is the task.
"""

import random
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset


class Shaped(nn.Module):
    """A layer that is entered in another shape, and left as (B, 12)."""

    def __init__(self, inner, *shape, call=None):
        super().__init__()
        self.inner, self.shape = inner, shape
        self.call = call or (lambda inner, x: inner(x))

    def forward(self, x):
        return self.call(self.inner, x.view(-1, *self.shape)).reshape(len(x), -1)


class Own(nn.Module):
    """A parameter of its own, and what is done with it."""

    def __init__(self, call, *shape):
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(*(shape or (12, 12))))
        self.call = call

    def forward(self, x):
        return self.call(x, self.weight)


def first(inner, x):
    return inner(x)[0]


def attend(inner, x, **keywords):
    return inner(x, x, x, **keywords)[0]


def over_time(inner, x):
    """A cell, one position after the other; the state begins at 0."""
    states, state = [], None
    for step in x.unbind(1):
        state = inner(step, state)
        states.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(states, 1)


def slices_in_place(x, weight):
    out = torch.empty(len(x), 12, dtype=x.dtype)
    out[:, :6] = (x @ weight)[:, 6:]
    out[:, 6:] = (x @ weight)[:, :6]
    return out


def branch_on_each_sample(x, weight):
    return torch.stack([row @ weight if row.sum() > 0 else torch.tanh(row @ weight.T) for row in x])


def branch_by_mask(x, weight):
    y = x @ weight
    chosen = x[:, 0] > 0
    y[chosen] = y[chosen].sin()
    return y


def experts(x, weight):
    """Each sample goes to the expert of its largest input."""
    y = torch.zeros_like(x)
    for expert, own in enumerate(weight.chunk(2)):
        chosen = x[:, :6].sum(1).gt(0).long() == expert
        if chosen.any():
            y = y.index_add(0, chosen.nonzero()[:, 0], torch.tanh(x[chosen][:, :6] @ own))
    return y


class Cube(torch.autograd.Function):
    """An operation with a derivative of its own, in the old style: no functorch, no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class StraightThrough(torch.autograd.Function):
    """Signs going forward, the identity going back."""

    @staticmethod
    def forward(ctx, x):
        return x.sign() + 0.1 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OnceOnly(torch.autograd.Function):
    """An operation whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return x.cos() * gradient


class Doubled(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Distances(nn.Module):
    """Distances to points that are learned."""

    def __init__(self, p=2.0):
        super().__init__()
        self.points, self.p = nn.Parameter(torch.randn(12, 12)), p

    def forward(self, x):
        return torch.cdist(x, self.points, p=self.p)


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).tanh().to(x.dtype)


class Casts(nn.Module):
    """What a model kept in bfloat16 does to its input."""

    def __init__(self):
        super().__init__()
        self.inner, self.half = nn.Linear(12, 12), torch.bfloat16

    def forward(self, x):
        return torch.tanh(self.inner(x.to(self.half))).to(x.dtype)


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(12, 12), nn.Tanh()), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Hooked(nn.Module):
    """Layers that are given their input by name, under no_grad, or whose output a hook changes."""

    def __init__(self):
        super().__init__()
        self.named, self.unseen, self.changed = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.changed.register_forward_hook(lambda module, inputs, output: output.sin())

    def forward(self, x):
        with torch.no_grad():
            seen = self.unseen(x)
        return self.changed(torch.tanh(self.named(input=x)) + seen)


class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Folded(nn.Module):
    """Positions that are folded into the batch, and a weight that is used in two ways."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        y = self.inner(x.reshape(-1, 4)).relu().view(len(x), 3, 4)
        return F.linear(y, self.inner.weight.T).flatten(1)


class TimeFirst(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return first(self.inner, x.view(-1, 3, 4).transpose(0, 1)).transpose(0, 1).flatten(1)


class WordBag(nn.Module):
    """Words that are looked up and added, and words that are looked up alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.mix = inner, nn.Linear(12, 12)

    def forward(self, x):
        words = (x.detach() * 3).long().abs() % 7
        return self.mix(x) + self.inner(words[:, :3]).flatten(1)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(6, 6, 12)

    def forward(self, x):
        return self.inner(x[:, :6], x[:, 6:])


class Low(nn.Module):
    """A linear layer with an adapter of low rank beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(12, 12), nn.Linear(12, 2, bias=False), nn.Linear(2, 12, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Energy(nn.Module):
    """The gradient of an energy by what enters, as in networks that are held to an equation of physics."""

    def __init__(self, transformed=False):
        super().__init__()
        self.inner, self.transformed = nn.Linear(12, 12), transformed

    def energy(self, x):
        return self.inner(x).tanh().square().sum()

    def forward(self, x):
        if self.transformed:
            return torch.func.vmap(torch.func.grad(self.energy))(x)
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x), x, create_graph=True)[0]


class Doubled64(nn.Module):
    """A layer in float64 in a model in float32."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12).double()

    def forward(self, x):
        return self.inner(x.double()).to(x.dtype)


def in_pairs(x, weight):
    """Complex numbers whose parameters are pairs of real ones."""
    turned = torch.view_as_complex(x.view(-1, 6, 2)) @ torch.view_as_complex(weight)
    return torch.view_as_real(turned).flatten(1)


def unpooled(x, weight):
    pooled, places = F.max_pool2d((x @ weight).view(-1, 3, 2, 2), 2, return_indices=True)
    return F.max_unpool2d(pooled, places, 2).flatten(1)


class Zero(nn.Module):
    """A branch that begins as nothing, as in many residual networks."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(12, 12), nn.Linear(12, 12)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        return x + self.out(torch.tanh(self.inner(x)))


def parametrised(layer, name="weight"):
    parametrize.register_parametrization(layer, name, Doubled())
    return layer


def lined(layer):
    return nn.Sequential(layer, nn.Tanh())


def encoder_layer(**keywords):
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **keywords)


def decode(inner, x):
    return inner(x, x.flip(1))


ACTIVATIONS = {
    name: getattr(nn, name)
    for name in (
        "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish",
        "PReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh",
        "Tanhshrink",
    )
}  # fmt: skip

PARTS = {
    **ACTIVATIONS,
    "GELU tanh": partial(nn.GELU, "tanh"),
    "in-place ReLU": lambda: nn.Sequential(nn.Linear(12, 12), nn.ReLU(inplace=True)),
    "in-place SiLU": lambda: nn.Sequential(nn.Linear(12, 12), nn.SiLU(inplace=True)),
    "GLU": lambda: nn.Sequential(nn.Linear(12, 24), nn.GLU()),
    "SwiGLU": lambda: Own(lambda x, w: F.silu(x @ w[:12]) * (x @ w[12:]), 24, 12),
    "Softmax": lambda: nn.Softmax(1),
    "Threshold": lambda: nn.Threshold(0.1, 0.0),
    "Maxout": lambda: Shaped(nn.Linear(12, 24), 12, call=lambda inner, x: inner(x).view(-1, 12, 2).amax(2)),
    "Linear": lambda: nn.Linear(12, 12),
    "Bilinear": Bilinear,
    "Low rank": Low,
    "Conv1d": lambda: Shaped(nn.Conv1d(3, 3, 3, padding=1), 3, 4),
    "Conv2d": lambda: Shaped(nn.Conv2d(1, 2, 3, stride=(1, 2), padding=1), 1, 3, 4),
    "Conv2d same": lambda: Shaped(nn.Conv2d(3, 3, 3, padding="same", padding_mode="circular"), 3, 2, 2),
    "Conv2d grouped": lambda: Shaped(nn.Conv2d(4, 4, 3, padding=1, groups=2), 4, 3, 1),
    "Conv3d": lambda: Shaped(nn.Conv3d(1, 1, 3, padding=1), 1, 3, 2, 2),
    "ConvTranspose2d": lambda: Shaped(nn.ConvTranspose2d(3, 3, 3, padding=1), 3, 2, 2),
    "MaxPool2d": lambda: Shaped(nn.MaxPool2d(2, 1, padding=1), 3, 2, 2, call=lambda i, x: i(x)[:, :, :2, :2]),
    "AvgPool2d": lambda: Shaped(nn.AvgPool2d(3, 1, padding=1), 3, 2, 2),
    "AdaptiveAvgPool2d": lambda: Shaped(nn.AdaptiveAvgPool2d((2, 2)), 3, 2, 2),
    "Upsample": lambda: Shaped(
        nn.Upsample(scale_factor=2, mode="bilinear"), 3, 2, 2, call=lambda inner, x: inner(x)[..., :2, :2]
    ),
    "LayerNorm": lambda: nn.LayerNorm(12),
    "RMSNorm": lambda: nn.RMSNorm(12),
    "GroupNorm": lambda: Shaped(nn.GroupNorm(3, 6), 6, 2),
    "InstanceNorm1d": lambda: Shaped(nn.InstanceNorm1d(3, affine=True), 3, 4),
    "LocalResponseNorm": lambda: Shaped(nn.LocalResponseNorm(2), 3, 4),
    "Embedding": lambda: WordBag(nn.Embedding(7, 4)),
    "Embedding padded": lambda: WordBag(nn.Embedding(7, 4, padding_idx=1)),
    "Embedding sparse": lambda: WordBag(nn.Embedding(7, 4, sparse=True)),
    "EmbeddingBag": lambda: WordBag(nn.EmbeddingBag(7, 12, mode="sum")),
    "RNN": lambda: Shaped(nn.RNN(4, 4, batch_first=True), 3, 4, call=first),
    "GRU": lambda: Shaped(nn.GRU(4, 4, batch_first=True), 3, 4, call=first),
    "GRU two ways": lambda: Shaped(nn.GRU(4, 2, 2, batch_first=True, bidirectional=True), 3, 4, call=first),
    "GRU time first": lambda: TimeFirst(nn.GRU(4, 4)),
    "LSTM": lambda: Shaped(nn.LSTM(4, 4, batch_first=True), 3, 4, call=first),
    "LSTM projected": lambda: Shaped(nn.LSTM(4, 6, proj_size=4, batch_first=True), 3, 4, call=first),
    "RNNCell": lambda: Shaped(nn.RNNCell(4, 4), 3, 4, call=over_time),
    "GRUCell": lambda: Shaped(nn.GRUCell(4, 4), 3, 4, call=over_time),
    "LSTMCell": lambda: Shaped(nn.LSTMCell(4, 4), 3, 4, call=over_time),
    "MultiheadAttention": lambda: Shaped(nn.MultiheadAttention(4, 2, batch_first=True), 3, 4, call=attend),
    "MultiheadAttention without weights": lambda: Shaped(
        nn.MultiheadAttention(4, 2, batch_first=True), 3, 4, call=partial(attend, need_weights=False)
    ),
    "MultiheadAttention with extra keys": lambda: Shaped(
        nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True), 3, 4, call=attend
    ),
    "TransformerEncoderLayer": lambda: Shaped(encoder_layer(), 3, 4),
    "TransformerEncoder": lambda: Shaped(
        nn.TransformerEncoder(encoder_layer(norm_first=True, activation="gelu"), 2, enable_nested_tensor=False), 3, 4
    ),
    "TransformerDecoderLayer": lambda: Shaped(nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), 3, 4, call=decode),
    "old weight_norm": lambda: lined(torch.nn.utils.weight_norm(nn.Linear(12, 12))),
    "old spectral_norm": lambda: lined(torch.nn.utils.spectral_norm(nn.Linear(12, 12))),
    "weight_norm": lambda: lined(parametrizations.weight_norm(nn.Linear(12, 12))),
    "weight_norm Conv1d": lambda: Shaped(parametrizations.weight_norm(nn.Conv1d(3, 3, 3, padding=1)), 3, 4),
    "spectral_norm": lambda: lined(parametrizations.spectral_norm(nn.Linear(12, 12))),
    "orthogonal": lambda: lined(parametrizations.orthogonal(nn.Linear(12, 12))),
    "orthogonal by Cayley": lambda: lined(parametrizations.orthogonal(nn.Linear(12, 12), orthogonal_map="cayley")),
    "parametrised": lambda: lined(parametrised(nn.Linear(12, 12))),
    "custom function": lambda: Own(lambda x, w: Cube.apply(torch.tanh(x @ w))),
    "cdist": Distances,
    "cdist of 1": partial(Distances, 1.0),
    "cdist of 3": partial(Distances, 3.0),
    "PairwiseDistance": lambda: Own(lambda x, w: F.pairwise_distance(x[:, None], w)),
    "CosineSimilarity": lambda: Own(lambda x, w: F.cosine_similarity(x[:, None], w, dim=2)),
    "slices in place": lambda: Own(slices_in_place),
    "branch on each sample": lambda: Own(branch_on_each_sample),
    "branch by a mask": lambda: Own(branch_by_mask),
    "experts": lambda: Own(experts, 12, 12),
    "sort": lambda: Own(lambda x, w: (x @ w).sort(1).values),
    "top k": lambda: Own(lambda x, w: x @ w + (x @ w).topk(1, 1).values),
    "einsum": lambda: Own(lambda x, w: torch.einsum("bi,ij,bj->bj", x, w, x)),
    "cumulated": lambda: Own(lambda x, w: (x @ w).cumsum(1).logcumsumexp(1)),
    "inverse": lambda: Own(lambda x, w: torch.linalg.solve(w @ w.T + torch.eye(12, dtype=w.dtype), x.T).T),
    "Fourier": lambda: Own(lambda x, w: torch.fft.irfft(torch.fft.rfft(x @ w) * torch.fft.rfft(w[0]), 12)),
    "complex": lambda: Own(lambda x, w: torch.view_as_real(torch.exp(1j * (x @ w)[:, :6])).flatten(1)),
    "rolled along features": lambda: Own(lambda x, w: (x @ w).roll(1, 1) * x),
    "checkpointed": Checkpointed,
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(12, 12), nn.Tanh())),
    "compiled in place": lambda: compiled_in_place(nn.Sequential(nn.Linear(12, 12), nn.Tanh())),
    "autocast": Autocast,
    "kept in bfloat16": lambda: Casts().bfloat16(),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(12, 12), nn.Tanh())),
    "folded": Folded,
    "subclassed": lambda: Shaped(Tuple(12, 12), 12, call=first),
    "dropout": lambda: nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5)),
    "FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(),
    "PixelShuffle": lambda: Shaped(nn.PixelShuffle(2), 12, 1, 1),
    "zero at first": Zero,
    "energy": Energy,
    "energy by torch.func": lambda: Energy(True),
    "in float64": Doubled64,
    "complex pairs": lambda: Own(in_pairs, 6, 6, 2),
    "unpooled": lambda: Own(unpooled),
}  # fmt: skip


def compiled_in_place(module):
    module.compile()
    return module


class BatchMean(nn.Module):
    def forward(self, x):
        return x - 0.5 * x.mean(0)


COUPLED = {
    "mean over the batch": BatchMean,
    "standardised over the batch": lambda: Own(lambda x, w: (x @ w - x.mean(0)) / (x.std(0) + 1)),
    "softmax over the batch": lambda: nn.Softmax(0),
    "attention over the batch": lambda: Shaped(nn.MultiheadAttention(12, 2), 12, call=attend),
    "rolled along the batch": lambda: Own(lambda x, w: (x @ w).roll(1, 0) + x),
    "layer norm over the batch": lambda: Own(lambda x, w: F.layer_norm((x @ w).T, (len(x),)).T),
    "batch norm without running statistics": lambda: nn.BatchNorm1d(12, track_running_stats=False),
}

STOPPED = {
    "straight through": lambda: Own(lambda x, w: StraightThrough.apply(x @ w)),
    "detached": lambda: Own(lambda x, w: (x @ w) * (x @ w).detach()),
    "hooked": Hooked,
}
"""Gradients that are not those of the loss: their derivative is autograd's, and is said to be."""

REFUSED = {
    "once differentiable": lambda: Own(lambda x, w: OnceOnly.apply(x @ w)),
    "reentrant": partial(Checkpointed, True),
}

CHANGING = {
    "Embedding of bounded norm": lambda: WordBag(nn.Embedding(7, 4, max_norm=1.0)),
    "Embedding by frequency": lambda: WordBag(nn.Embedding(7, 4, scale_grad_by_freq=True)),
}
"""Layers whose losses, or gradients, are no function of their weights."""

EVERY = CHANGING | PARTS | COUPLED | STOPPED | REFUSED


class Part:
    """Sixty points in three classes through a part between two linear layers."""

    def __init__(self, which: str = "Linear", samples: int = 60, loss: str = "entropy"):
        self.which, self.samples, self.loss = which, samples, loss

    def model(self):
        part = EVERY[self.which]()
        return nn.Sequential(nn.Linear(8, 12), part, nn.Linear(12, 3))

    def dataset(self):
        draw = torch.Generator().manual_seed(0)
        x, y = torch.randn(self.samples, 8, generator=draw), torch.randint(0, 3, (self.samples,), generator=draw)
        return TensorDataset(x, y)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    def label(self, i):
        return str(i % 3)


class Half(Part):
    """Kept in bfloat16, with labels that can be smoothed."""

    def __init__(self):
        super().__init__("kept in bfloat16")

    def smoothed_losses(self, model, batch, smoothing):
        return cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=smoothing)


def margins(outputs, y):
    """Hinge loss of every class against the right one."""
    wrong = (outputs - outputs.gather(1, y[:, None]) + 1).clamp_min(0)
    return wrong.sum(1) - 1


LOSSES = {
    "entropy": lambda outputs, y: cross_entropy(outputs, y, reduction="none"),
    "smoothed": lambda outputs, y: cross_entropy(outputs, y, reduction="none", label_smoothing=0.1),
    "square": lambda outputs, y: (outputs - F.one_hot(y, 3)).square().sum(1),
    "huber": lambda outputs, y: F.huber_loss(outputs, F.one_hot(y, 3).to(outputs), reduction="none").mean(1),
    "hinge": margins,
    "logistic": lambda outputs, y: F.binary_cross_entropy_with_logits(
        outputs, F.one_hot(y, 3).to(outputs), reduction="none"
    ).sum(1),
    "gaussian": lambda outputs, y: F.gaussian_nll_loss(
        outputs[:, :1], y[:, None].to(outputs), F.softplus(outputs[:, 1:2]) + 0.1, reduction="none"
    )[:, 0],
    "cosine": lambda outputs, y: 1 - F.cosine_similarity(outputs, F.one_hot(y, 3) - 0.4, dim=1),
    "triplet": lambda outputs, y: F.triplet_margin_loss(
        outputs, F.one_hot(y, 3).to(outputs), F.one_hot((y + 1) % 3, 3).to(outputs), reduction="none"
    ),
    "absolute": lambda outputs, y: (outputs - F.one_hot(y, 3)).abs().sum(1),
    "focal": lambda outputs, y: (
        (1 - torch.softmax(outputs, 1).gather(1, y[:, None])[:, 0]) ** 2 * cross_entropy(outputs, y, reduction="none")
    ),
}


class Drawn(Part):
    """A network of layers, a depth and a loss that are drawn at random."""

    def __init__(self, seed: int = 0):
        draw = random.Random(seed)
        kinds = [*PARTS, *PARTS, *PARTS, *COUPLED, *STOPPED, *REFUSED, *["batch norm"] * 4]
        self.names = [draw.choice(kinds) for _ in range(draw.randint(1, 4))]
        self.tied, self.residual = draw.random() < 0.1, draw.random() < 0.3
        super().__init__(" ".join(self.names), draw.randint(6, 30), draw.choice(list(LOSSES)))

    def model(self):
        every = EVERY | {"batch norm": lambda: nn.BatchNorm1d(12)}
        layers = [every[name]() for name in self.names]
        layers = [Residual(layer) for layer in layers] if self.residual else layers
        return nn.Sequential(nn.Linear(8, 12), *layers, *layers[: int(self.tied)], nn.Linear(12, 3))

    def losses(self, model, batch):
        return LOSSES[self.loss](model(batch[0]), batch[1])


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x.clone())
