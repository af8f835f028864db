"""Gradients of single samples where batch norm goes by chunks, against autograd through whole chunks, in float64."""

import numpy as np
import pytest
import torch
from conftest import train_tiny
from opsig_torch import TorchBackend, coupled
from opsig_torch.captured import gradient_plan
from opsig_zoo import FashionMnist
from opsig_zoo.models import image_model
from tasks import tiny
from torch import nn
from torch.nn import functional as F


class Images(tiny.Conv):
    """Few small pictures through a network with batch norm."""

    def __init__(self, model):
        self.name = model
        self.x = torch.randn(11, 2, 8, 8, generator=torch.Generator().manual_seed(2))
        self.y = torch.arange(11) % 4

    def model(self):
        if self.name != "own":
            return image_model(self.name, 2, 8, 4)
        shared = nn.BatchNorm2d(2)
        return nn.Sequential(  # batch norm entered twice and without running statistics, layers that are not captured
            shared,
            nn.Conv2d(2, 2, 3, padding="same"),
            shared,
            nn.ReLU(inplace=True),
            nn.Conv2d(2, 4, 3, groups=2),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Flatten(),
            nn.Linear(144, 4),
        )


TASKS = {
    "mlp": lambda: tiny.Tiny(samples=11, norm=True),
    "listed": lambda: tiny.Listed(samples=11, norm=True),
    "resnet": lambda: Images("resnet20:width=3"),
    "own": lambda: Images("own"),
}
SAMPLES = np.array([9, 0, 10, 3, 5, 1])
SETS = [np.array([0, 2]), np.array([1, 7, 10])]


def open_double(name, batch_size=4):
    session = TorchBackend().open(TASKS[name](), "cpu", batch_size, "chunk", double=True)
    return session, session.initial(0)


def gradients(session, state):
    """Gradient of every sample's loss through its chunk, (S, P)."""
    rows = []
    with session.at(state):
        for _, batch in session.batches:
            for loss in session.task.losses(session.flat.model, batch):
                parts = torch.autograd.grad(loss, session.flat.parameters, retain_graph=True, materialize_grads=True)
                rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
    return np.array(rows)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("held", [None, 3])
def test_cosines_are_of_gradients_through_the_whole_chunk(monkeypatch, name, held):
    session, state = open_double(name)
    if held:  # gradients at a time
        monkeypatch.setattr(coupled, "STRIP", 2)
        monkeypatch.setattr(coupled, "MEMORY_BYTES", (held + 2) * 8 * len(state.params))
        monkeypatch.setattr(coupled, "DIRECTIONS_BYTES", 1)
    rows = gradients(session, state)
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    cosines = unit @ unit.T
    np.testing.assert_allclose(session.gradient_cosines(state, SAMPLES), cosines[np.ix_(SAMPLES, SAMPLES)], atol=1e-10)
    means = np.stack([cosines[SAMPLES][:, members].mean(1) for members in SETS], 1)
    np.testing.assert_allclose(session.mean_cosines(state, SAMPLES, SETS), means, atol=1e-10)
    np.testing.assert_array_equal(session.state(0).buffers, state.buffers)


def test_the_gradients_are_passed_over_no_more_often_than_memory_asks(monkeypatch):
    session, state = open_double("mlp")
    backwards = []
    monkeypatch.setattr(coupled, "_gradient", lambda *a, f=coupled._gradient: backwards.append(1) or f(*a))
    session.gradient_cosines(state, SAMPLES)
    assert len(backwards) == len(SAMPLES)


@pytest.mark.parametrize("name", TASKS)
def test_norms_hold_the_chunks_statistics_fixed(monkeypatch, name):
    session, state = open_double(name)
    assert session.couples_samples
    norms = session.gradient_norms(state)
    moved = type(state)(1, state.params * 1.1, state.buffers + 0.5)
    norms_moved = session.gradient_norms(moved)
    exact = np.linalg.norm(gradients(session, state), axis=1)

    def frozen(x, mean, variance, weight, bias, training, momentum, eps):
        axes = (0, *range(2, x.ndim))
        variance, mean = torch.var_mean(x.detach(), axes, correction=0)
        return native(x, mean, variance, weight, bias, False, momentum, eps)

    native = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", frozen)
    np.testing.assert_allclose(norms, np.linalg.norm(gradients(session, state), axis=1), rtol=1e-9)
    np.testing.assert_allclose(norms_moved, np.linalg.norm(gradients(session, moved), axis=1), rtol=1e-9)
    assert np.abs(norms / exact - 1).max() > 0.01  # a proxy
    np.testing.assert_array_equal(session.state(0).buffers, state.buffers)


def test_resnets_parameters_are_all_captured():
    session, state = open_double("resnet")
    session.gradient_norms(state)
    assert gradient_plan(session).loose == []


def test_the_layers_have_their_own_statistics_back():
    session, state = open_double("own")
    session.gradient_norms(state)
    with session.at(state):
        assert all(layer.training for layer in session.batch_norms())
    places = {id(buffer) for _, buffer in session.flat.buffers}
    held = [layer.running_mean for layer in session.batch_norms()]
    assert [None if mean is None else id(mean) in places for mean in held] == [True, None]


def test_running_statistics_couple_nobody():
    session = TorchBackend().open(TASKS["mlp"](), "cpu", 4, "running")
    assert not session.couples_samples
    assert not TorchBackend().open(tiny.Tiny(), "cpu", 4, "chunk").couples_samples


def test_commands_say_what_batch_norm_in_chunks_does_to_their_numbers(opsig, tmp_path):
    run = tmp_path / "run.h5"
    own = train_tiny(run, task="Tiny:norm=true", steps=20)
    assert opsig(*own, "--chunk-size", 20).code == 0
    task = own[1:3]
    norms = ("sharpness", run, *task, "--steps", "20", "--metrics")
    found = opsig(*norms, "gradient_norm")
    assert len(found.records) == 60
    assert "gradient norms hold each chunk's statistics fixed" in found.err
    assert "statistics fixed" not in opsig(*norms, "curvature").err
    opsig(*norms, "sample_sharpness").fails(1, "sample_sharpness is not measured where batch norm goes by chunks")
    clustered = opsig("cluster", run, *task, "--top", 10)
    assert clustered.code == 0
    assert "note: nobody joins" in clustered.err
    assert all(r["mined"] for r in clustered.records if r["kind"] == "member")
    joined = opsig("cluster", run, *task, "--top", 10, "--join")
    assert "nobody joins" not in joined.err
    assert not all(r["mined"] for r in joined.records if r["kind"] == "member")


def test_statistics_of_channels_last_pictures_are_right_to_rounding():
    """torch adds these up in float32: losses were off by 1e-4, and gradients by 2e-2, as ReLUs turned."""
    task = FashionMnist(model="vgg11-bn:width=16", samples=100)
    found, exact = (TorchBackend().open(task, "cpu", 100, "chunk", double=double) for double in (False, True))
    state = found.initial(0)
    exact.initial(0)
    for ours, truth in (
        (found.losses([state])[0][0], exact.losses([state])[0][0]),
        (found.gradient_norms(state), exact.gradient_norms(state)),
    ):
        np.testing.assert_allclose(ours, truth, atol=5e-6 * truth.max())
