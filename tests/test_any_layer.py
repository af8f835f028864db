"""Per-sample derivatives through layers of every kind, against float64 gradients and differences of them; refusals."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from opsig_torch import (
    TorchBackend,
    captured,
    layer_gradients,
    outer_products,
    sample_curvature,
    sample_products,
    second,
)
from opsig_torch.captured import gradient_plan
from tasks import parts, tiny
from torch import nn

from opsig_cli.backends import State
from opsig_cli.errors import OpsigError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import fuzz_models
from layers import Truth, relative

SAMPLES = 5
NAMED = (
    "SiLU", "Hardsigmoid", "PReLU", "GLU", "in-place SiLU", "InstanceNorm1d", "Embedding padded", "Embedding sparse",
    "EmbeddingBag", "RNN", "GRU", "LSTM", "LSTMCell", "MultiheadAttention without weights", "old weight_norm",
    "weight_norm", "old spectral_norm", "orthogonal", "custom function", "cdist", "slices in place",
    "branch on each sample", "branch by a mask", "checkpointed", "compiled in place", "autocast", "kept in bfloat16",
    "folded", "energy", "energy by torch.func", "in float64", "complex pairs", "unpooled",
)  # fmt: skip
"""The rest is held by benchmarks/layers.py."""


def opened(name, **options):
    """A float32 session, as commands have it, its first state, and what is right there."""
    task = parts.Part(name, SAMPLES)
    session = TorchBackend().open(task, "cpu", 3, "running", **options)
    said = []
    session.tell = said.append
    state = session.initial(0)
    return session, state, Truth(task, state, SAMPLES), said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*NAMED, *parts.STOPPED])
def test_every_quantity_of_a_sample_is_that_of_float64(name):
    session, state, truth, said = opened(name)
    direction = np.random.default_rng(0).standard_normal(len(state.params))
    direction[truth.padding()] = 0
    direction /= np.linalg.norm(direction)
    losses, gradients = map(np.array, zip(*map(truth.gradient, range(SAMPLES)), strict=True))
    products = np.array([truth.product(sample, direction) for sample in range(SAMPLES)])
    norms = np.linalg.norm(gradients, axis=1)
    unit = gradients / norms[:, None]
    everybody = np.arange(SAMPLES)
    v = direction.astype(np.float32)
    _, slopes, curvatures = session.curvature_along(state, v)
    if name != "autocast":  # whose losses are in half precision, as they were in training
        assert relative(session.losses([state])[0][0], losses) < 1e-5
    assert relative(session.gradient_norms(state), norms) < 1e-5
    assert relative(session.gradient_cosines(state, everybody), unit @ unit.T) < 1e-5
    assert relative(slopes, gradients @ direction) < 1e-5
    assert relative(curvatures, products @ direction) < 1e-5
    assert relative(session.hessian_vectors(state, v[None])[0], products.mean(0)) < 1e-5
    assert len(said) == len(set(said))  # once each


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GRU", "custom function", "weight_norm"])
def test_the_sharpness_of_a_sample_is_that_of_its_dense_hessian(name):
    session, state, truth, _ = opened(name)
    unit = np.eye(len(state.params))
    dense = np.array([truth.product(2, row) for row in unit])
    found, _ = session.sample_sharpness(state, np.array([2, 4]), 1e-3)
    assert found[0] == pytest.approx(np.linalg.eigvalsh((dense + dense.T) / 2)[-1], rel=1e-5)


@pytest.mark.parametrize("name", parts.COUPLED)
def test_a_model_that_mixes_samples_is_refused_in_one_line(name):
    session = TorchBackend().open(parts.Part(name), "cpu", None, "running")
    with pytest.raises(OpsigError, match="depends on which samples are in its batch") as refused:
        session.initial(0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "words"), [*zip(parts.CHANGING, ("max_norm", "scale_grad_by_freq"), strict=True)])
def test_a_layer_that_is_no_function_of_its_weights_is_refused_in_one_line(name, words):
    session = TorchBackend().open(parts.Part(name), "cpu", None, "running")
    with pytest.raises(OpsigError, match=rf"layer '1.inner' \(Embedding\) .*{words}"):
        session.initial(0)


class Noisy(tiny.Tiny):
    def losses(self, model, batch):
        return super().losses(model, batch) * (1 + torch.rand(len(batch[0])))


def test_a_random_loss_has_no_gradients_and_says_why():
    session = TorchBackend().open(Noisy(), "cpu")
    with pytest.raises(OpsigError, match="the task's losses differ when they are evaluated again"):
        session.gradient_norms(session.initial(0))


class Fixed(tiny.Tiny):
    """A model for batches of one size."""

    def losses(self, model, batch):
        return super().losses(model, [batch[0] + torch.zeros(60, 1), batch[1]])


class Squeezed(tiny.Quadratic):
    def losses(self, model, batch):
        return super().losses(model, batch).squeeze()


def test_losses_that_need_one_size_of_batch_are_refused():
    with pytest.raises(OpsigError, match="takes 60 samples together, but not 4 or 2 of them"):
        TorchBackend().open(Fixed(), "cpu").initial(0)


def test_a_squeeze_of_the_batch_is_named():
    session = TorchBackend().open(Squeezed(), "cpu")
    with pytest.raises(OpsigError, match=r"shape \(\) for 1 samples.*squeeze"):
        session.gradient_norms(session.initial(0))


def test_a_slower_way_is_said_once_on_stderr_with_its_layer(opsig, tmp_path):
    run = tmp_path / "run.h5"
    task = ("--task", f"{fuzz_models.TASK}:Part:which=GRU")
    assert opsig("train", *task, "-o", run, "--learning-rate", 0.1, "--steps", 4, "--track").code == 0
    found = opsig("sharpness", run, *task, "--steps", "0:4", "--metrics", "gradient_norm,curvature", "--random", 2)
    notes = [line for line in found.err.splitlines() if line.startswith("note")]
    assert len(notes) == 2, found.err
    assert notes[0].startswith("note: gradients of single samples by a loop over samples for some layers, about ")
    assert all("layer '1.inner' (GRU)" in note and "times as long" in note for note in notes)
    assert "note" not in opsig("sharpness", run, *task, "--metrics", "curvature", "--quiet").err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "metric", "words"),
    [
        ("once differentiable", "curvature", "layer '1' (Own) has no second derivative"),
        ("once differentiable", "sample_sharpness", "Losses, gradient_norm and cluster still work"),
        ("reentrant", "gradient_norm", "layer '1' (Checkpointed) has no gradient"),
    ],
)
def test_what_no_way_gives_is_refused_with_the_layer_and_what_still_works(opsig, tmp_path, name, metric, words):
    run = tmp_path / "run.h5"
    task = ("--task", f"{fuzz_models.TASK}:Part:which={name}")
    assert opsig("train", *task, "-o", run, "--learning-rate", 0.1, "--steps", 2).code == 0
    opsig("sharpness", run, *task, "--metrics", metric).fails(1, "cannot be measured", words)


def test_a_gradient_that_is_not_that_of_the_loss_is_said():
    session, state, _, said = opened("detached")
    session.top_eigenpairs(state, 1, 1e-2)
    session.top_eigenpairs(state, 1, 1e-2)
    assert len(said) == 1
    assert "second derivative of layer '1' (Own) is not the derivative of its gradient" in said[0]


class Masks(nn.Module):
    """Attends to what the mask leaves, as transformers write it."""

    def forward(self, x, mask):
        return (x @ x.T + mask).softmax(1) @ x


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.enters, self.attends, self.leaves = nn.Linear(5, 8), Masks(), nn.Linear(8, 3)

    def forward(self, x):
        mask = torch.full((8, 8), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        return self.leaves(torch.stack([self.attends(torch.outer(each, each), mask)[-1] for each in self.enters(x)]))


def test_a_mask_of_the_lowest_number_makes_no_derivative_wrong(monkeypatch):
    class Task(tiny.Tiny):
        def model(self):
            return Masked()

    monkeypatch.setattr(second, "SIZES", 1 << 60)  # the model counts as too large, so that its layers are looked at
    session, said = TorchBackend().open(Task(), "cpu"), []
    session.tell = said.append
    session.top_eigenpairs(session.initial(0), 1, 1e-2)
    assert said == []


# -- the check is what finds these out: faster ways that are made wrong


def _whole(session):
    """The session, taking no layer's vectors in outer products."""
    session.kept["outer"] = outer_products.Shape([], [], session.flat.parameters)
    return session


@pytest.mark.parametrize(
    ("owner", "name", "measure"),
    [
        (layer_gradients.Captured, "squares", lambda s, at: s.gradient_norms(at)),
        (layer_gradients.Captured, "products", lambda s, at: s.mean_cosines(at, np.arange(5), [np.array([1, 2])])),
        (captured, "gather", lambda s, at: s.gradient_cosines(at, np.arange(5))),
        (sample_curvature, "_traced", lambda s, at: s.curvature_along(at, np.ones_like(at.params))[2]),
        (outer_products.OuterProducts, "products", lambda s, at: s.sample_sharpness(at, np.arange(5), 1e-3)[0]),
        (sample_products, "_vmapped", lambda s, at: _whole(s).sample_sharpness(at, np.arange(5), 1e-3)[0]),
    ],
)
def test_a_fast_way_that_is_wrong_is_found_out_at_every_use(monkeypatch, owner, name, measure):
    session = TorchBackend().open(tiny.Conv(), "cpu")
    state = session.initial(0)
    said = []
    session.tell = said.append
    right = measure(session, state)
    assert said == []
    fast = getattr(owner, name)
    wrong = {
        "gather": lambda *a: (fast(*a)[0] * 1.05, fast(*a)[1]),
        "_traced": lambda *a: [1.05 * row for row in fast(*a)],
        "_vmapped": lambda *a: replace(fast(*a), products=lambda *b: 1.05 * fast(*a).products(*b)),
    }.get(name, lambda *a: 1.05 * fast(*a))
    monkeypatch.setattr(owner, name, wrong)
    np.testing.assert_allclose(measure(session, state), right, rtol=1e-3, atol=1e-4)
    assert len(said) == 1


def test_a_layer_is_not_trusted_because_its_gradient_vanished_at_first():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)
            nn.init.zeros_(self.out.weight)

        def forward(self, x):
            return self.out(torch.tanh(self.inner(x) + x @ self.inner.weight))  # used outside of its layer

    class Vanishing(tiny.Tiny):
        def model(self):
            return Model()

    session = TorchBackend().open(Vanishing(), "cpu", double=True)
    state = session.initial(0)
    session.gradient_norms(state)
    assert gradient_plan(session).loose == ["inner.weight"]
    moved = State(1, state.params + 0.1, state.buffers)
    with session.at(moved):
        loss = session.task.losses(session.flat.model, session.batches.take([7])).sum()
        parts_ = torch.autograd.grad(loss, session.flat.parameters)
    exact = torch.cat([part.reshape(-1) for part in parts_]).norm().item()
    assert session.gradient_norms(moved)[7] == pytest.approx(exact, rel=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 3, 7, 11, 16, 19, 23, 42, 57, 81])
def test_models_drawn_at_random_end_well_or_in_one_line(opsig, tmp_path, seed):
    """A part of benchmarks/fuzz_models.py."""
    for arguments in fuzz_models.commands(tmp_path / "run.h5", seed):
        outcome = opsig(*arguments)
        if outcome.code:
            assert outcome.code in (1, 2)
            assert len([line for line in outcome.err.splitlines() if line.startswith("opsig: ")]) == 1
            assert "Traceback" not in outcome.err
            if arguments[0] == "train":
                return
