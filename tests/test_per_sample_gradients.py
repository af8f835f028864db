"""Per-sample gradients from what enters and leaves layers, against autograd one sample at a time, in float64."""

import numpy as np
import pytest
import torch
from opsig_torch import TorchBackend, captured, layer_gradients, set_cosines
from opsig_torch.captured import gradient_plan
from opsig_zoo.models import image_model
from opsig_zoo.text import Text
from tasks import tiny
from torch import nn


class Images(tiny.Conv):
    """Few small pictures through a model of the zoo."""

    def __init__(self, model: str, size: int = 8):
        self.name, self.size = model, size
        self.x = torch.randn(6, 2, size, size, generator=torch.Generator().manual_seed(2))
        self.y = torch.arange(6) % 4

    def model(self):
        return image_model(self.name, 2, self.size, 4)


class Odd(tiny.Tiny):
    """A model in which layers do not see samples one by one, or not all of a weight's use goes through its layer."""

    class Model(nn.Module):
        def __init__(self, kind: str):
            super().__init__()
            self.kind = kind
            self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.randn(1, 6))

        def forward(self, x):
            x = torch.tanh(self.first(x))
            if self.kind == "used outside of its layer":
                x = x + nn.functional.linear(x, self.second.weight)
            if self.kind == "entered three times":
                x = self.second(torch.tanh(self.second(x)))
            if self.kind == "samples along another axis":
                x = torch.stack([x, x.square(), x.cos()])
            if self.kind == "samples and tokens folded":
                x = torch.stack([x, x.square()], 1).flatten(0, 1)
            x = self.second(x)
            if self.kind == "samples along another axis":
                x = x.sum(0)
            if self.kind == "samples and tokens folded":
                x = x.view(-1, 2, 6).sum(1)
            return self.last(torch.relu(x) * self.scale)

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def model(self):
        return Odd.Model(self.kind)


@pytest.fixture
def gpt(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat; the dog sat on the log. " * 3)
    return Text(str(tmp_path), context=6, samples=9, model="gpt:depth=1,width=8,heads=2")


def check(task, loose=()):
    """Norms, inner products and mean cosines of a session's samples are those of autograd."""
    session = TorchBackend().open(task, "cpu", 4, "running", double=True)
    state = session.initial(0)
    samples = np.array([4, 0, 3, 5, 1])
    with session.at(state):
        rows = []
        for i in range(session.samples):
            loss = session.losses_of([i]).sum()
            gradients = torch.autograd.grad(loss, session.flat.parameters, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in gradients]).numpy())
        assert set(gradient_plan(session).loose) == set(loose)
    norms = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(session.gradient_norms(state), norms, rtol=1e-9)
    unit = np.array(rows) / norms[:, None]
    cosines = unit @ unit.T
    np.testing.assert_allclose(session.gradient_cosines(state, samples), cosines[np.ix_(samples, samples)], atol=1e-9)
    sets = [np.array([0, 2]), np.array([1, 5, 3])]
    means = np.stack([cosines[samples][:, s].mean(1) for s in sets], 1)
    np.testing.assert_allclose(session.mean_cosines(state, samples, sets), means, atol=1e-9)


@pytest.mark.parametrize("name", ["mlp:width=7", "cnn:width=3", "resnet20:width=3", "vit:width=8,depth=1"])
def test_every_parameter_of_the_zoo_is_captured(name):
    check(Images(name))


def test_small_pictures_of_many_channels_go_by_products_of_positions():
    check(Images("vgg11-bn:width=2", 16))


def test_tied_embeddings_are_summed_before_the_norm(gpt):
    check(gpt)
    check(tiny.Attend())


@pytest.mark.parametrize(
    ("kind", "loose"),
    [
        ("used outside of its layer", ["second.weight"]),
        ("entered three times", []),
        ("samples along another axis", ["second.weight", "second.bias"]),
        ("samples and tokens folded", ["second.weight", "second.bias"]),
    ],
)
def test_what_cannot_be_captured_is_found_out_and_still_right(kind, loose):
    check(Odd(kind), [*loose, "scale"])


def test_float32_norms_are_exact_to_five_digits():
    for name in ("cnn", "vit", "resnet20"):
        single, double = (TorchBackend().open(Images(name, 16), "cpu", 4, "running", double=d) for d in (False, True))
        norms = [session.gradient_norms(single.initial(0)) for session in (single, double)]
        np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("padding", [0, 1, (2, 0)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_unfolded_inputs_are_those_of_torch(stride, padding, dilation, layout):
    layer = torch.nn.Conv2d(3, 1, (3, 2), stride, padding, dilation)
    whole = torch.randn(5, 3, 9, 8).contiguous(memory_format=layout)
    for inputs in (whole, whole[1:4], whole[::2]):
        expected = torch.nn.functional.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        assert torch.equal(layer_gradients._unfolded(inputs, layer), expected)


class Flat(tiny.Tiny):
    """The first sample's loss does not depend on anything."""

    def losses(self, model, batch):
        losses = super().losses(model, batch)
        return losses * (batch[0] != self.x[0]).any(1)


def test_a_member_whose_gradient_vanishes_has_no_direction():
    session = TorchBackend().open(Flat(), "cpu", double=True)
    state = session.initial(0)
    assert session.gradient_norms(state)[0] == 0
    samples = np.array([3, 4])
    alone = session.mean_cosines(state, samples, [np.array([5])])
    with np.errstate(all="raise"):
        assert session.mean_cosines(state, samples, [np.array([0, 5])]) == pytest.approx(alone / 2)


def test_mean_cosines_with_many_small_sets_go_by_outer_products():
    """No slower way was taken, and the numbers are those of the cosines themselves."""
    session = TorchBackend().open(tiny.Tiny(), "cpu", double=True)
    said = []
    session.tell = said.append
    state = session.initial(0)
    with session.at(state):
        plan = captured.gradient_plan(session)
        sets = [np.array([0, 5]), np.array([7]), np.array([30, 8])]
        assert set_cosines._outer(session, plan, sets)
    cosines = session.gradient_cosines(state, np.arange(60))
    found = session.mean_cosines(state, np.arange(60), sets)
    np.testing.assert_allclose(found, np.stack([cosines[:, members].mean(1) for members in sets], 1), atol=1e-12)
    assert said == []
