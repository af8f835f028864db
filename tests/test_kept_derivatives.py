"""Layers whose derivatives are kept for products with a Hessian have the gradient and products that torch has."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from opsig_torch import TorchBackend
from opsig_torch import hessian as hessians
from opsig_torch.kept_derivatives import KeptDerivatives
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import TensorDataset


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def gradient_and_product(loss, tensors, direction, kept):
    with KeptDerivatives() if kept else nullcontext():
        value = loss()
    gradient = torch.autograd.grad(value, tensors, create_graph=True)
    along = torch.stack([(g * d).sum() for g, d in zip(gradient, direction, strict=True)]).sum()
    return [*gradient, *torch.autograd.grad(along, tensors, materialize_grads=True)]


def require_the_same(loss, tensors):
    direction = [torch.randn_like(tensor) for tensor in tensors]
    plain, kept = (gradient_and_product(loss, tensors, direction, way) for way in (False, True))
    for exact, found in zip(plain, kept, strict=True):
        assert torch.allclose(exact, found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 1}, {"padding": (2, 1), "dilation": 2}, {"groups": 2}]
)
def test_convolutions_have_the_products_that_torch_has(settings):
    torch.manual_seed(0)
    x, weight, bias = drawn(3, 4, 9, 10), drawn(4, 4 // settings.get("groups", 1), 3, 3), drawn(4)
    require_the_same(lambda: (F.conv2d(x, weight, bias, **settings).tanh() ** 2).sum(), [x, weight, bias])
    require_the_same(lambda: F.conv2d(x.detach(), weight, **settings).sin().sum(), [weight])


@pytest.mark.parametrize("activation", [F.gelu, F.silu, F.elu, F.softplus, F.mish, torch.tanh, torch.sigmoid])
def test_activations_have_the_products_that_torch_has(activation):
    torch.manual_seed(0)
    x = drawn(5, 7)
    require_the_same(lambda: (activation(x) * activation(2 * x)).sum(), [x])


def test_what_an_activation_gives_may_be_changed_in_place():
    torch.manual_seed(0)
    x = drawn(5, 7)
    require_the_same(lambda: F.gelu(input=x).add_(x).sin().sum(), [x])


@pytest.mark.parametrize("as_numbers", [False, True])
def test_queries_that_see_nothing_have_the_attention_that_torch_gives_them(as_numbers):
    torch.manual_seed(0)
    tensors = [drawn(2, 3, 5, 4) for _ in range(3)]
    sees = torch.rand(5, 5) > 0.3
    sees[2] = False
    mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~sees, float("-inf")) if as_numbers else sees
    with sdpa_kernel(SDPBackend.MATH):
        require_the_same(lambda: F.scaled_dot_product_attention(*tensors, attn_mask=mask).sin().sum(), tensors)


@pytest.mark.parametrize("shape", [(7,), (5, 7)])
def test_layer_norm_has_the_products_that_torch_has(shape):
    torch.manual_seed(0)
    x, weight, bias = drawn(3, 5, 7), drawn(*shape), drawn(*shape)
    require_the_same(lambda: F.layer_norm(x, shape, weight, bias).sin().sum(), [x, weight, bias])
    require_the_same(lambda: F.layer_norm(x, shape, weight).sin().sum(), [x, weight])


class Physics:
    """A loss of the model's own derivative, so that its Hessian takes third ones; by torch.func or by autograd."""

    def __init__(self, functional, more_than=0):
        self.functional = functional
        self.more_than = more_than

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def dataset(self):
        return TensorDataset(torch.linspace(-1, 1, 12)[:, None])

    def losses(self, model, batch):
        (x,) = batch
        if len(x) <= self.more_than:
            return model(x).square().sum(1)
        if self.functional:
            slope = torch.func.vmap(torch.func.grad(lambda one: model(one[None]).sum()))(x)
        else:
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope - x.detach()).square().sum(1)


@pytest.mark.parametrize(("functional", "more_than"), [(True, 0), (False, 0), (False, hessians.FEW)])
def test_a_model_that_takes_derivatives_itself_is_left_torchs_own(functional, more_than, monkeypatch):
    session = TorchBackend().open(Physics(functional, more_than), "cpu")
    state = session.initial(0)
    vector = np.random.default_rng(0).standard_normal((1, len(state.params))).astype(np.float32)
    found = session.hessian_vectors(state, vector)
    assert session.kept["kept derivatives"] is False
    monkeypatch.setattr(hessians, "KeptDerivatives", nullcontext)
    assert np.array_equal(session.hessian_vectors(state, vector), found)


def test_convolutions_go_in_pieces_that_batches_are_cut_into_evenly():
    class Sized:
        couples_samples = False

        def __init__(self, batch_size, fits):
            self.batch_size, self.fits = batch_size, fits

        def fitting_batch(self, order):
            return self.fits

        def inference_batch(self):
            return min(50, self.batch_size, self.fits)

    sizes: list[tuple[Any, int]] = [(Sized(500, 500), 50), (Sized(128, 128), 32), (Sized(127, 127), 127)]
    for opened, piece in [*sizes, (Sized(500, 16), 10), (Sized(500, 1), 1)]:
        assert hessians._piece(opened) == piece
