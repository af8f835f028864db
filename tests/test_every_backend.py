"""What every installed backend gives alike: one small task written for each, at the same parameters.

What is right is said by torch's autograd in float64, one sample at a time; parameters go from one to the other by name.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from opsig_torch import TorchBackend
from tasks import tiny
from torch.autograd.functional import hessian
from torch.func import functional_call

from opsig_cli.backends import Training, load_backend, minibatch
from opsig_cli.errors import OpsigError, UsageError

sys.path.insert(0, str(Path(__file__).parent / "tasks"))  # where a task's neighbours are found, as in a run


def task_of(backend, name="Tiny"):
    if backend == "torch":
        return getattr(tiny, name)()
    pytest.importorskip("jax", reason="the jax backend needs jax")
    pytest.importorskip("optax", reason="the jax backend needs optax")
    from tasks import tiny_jax

    return getattr(tiny_jax, name)()


def opened(backend, batch_size=None, name="Tiny", double=True):
    """A session in float64, laid out as torch does, and torch's own first state."""
    task = task_of(backend, name)
    session = load_backend(backend).open(task, "cpu", batch_size, double=double)
    reference = TorchBackend().open(tiny.Tiny(), "cpu", double=double)
    start = reference.initial(0)
    session.arrange([tensor.name for tensor in reference.layout])
    assert session.layout == reference.layout
    return session, start


@pytest.fixture(params=["torch", "jax"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def truth():
    """Losses (S,), gradients (S, P) and Hessians (S, P, P) of every sample by torch's autograd."""
    session = TorchBackend().open(tiny.Tiny(), "cpu", double=True)
    state, task = session.initial(0), session.task
    model = session.flat.model

    def losses(vector):
        named = {t.name: vector[t.offset : t.offset + t.size].view(t.shape) for t in session.layout}
        logits = functional_call(model, named, (task.x.double(),))
        return torch.nn.functional.cross_entropy(logits, task.y, reduction="none")

    vector = torch.from_numpy(state.params).requires_grad_()
    dense = hessian(lambda v: losses(v).mean(), vector)
    direction = np.random.default_rng(0).standard_normal(len(state.params))
    along, rows, curvature = torch.from_numpy(direction), [], []
    for loss in losses(vector):
        rows.append(torch.autograd.grad(loss, vector, create_graph=True)[0])
        curvature.append(torch.autograd.grad(rows[-1] @ along, vector, retain_graph=True)[0] @ along)
    found = losses(vector), torch.stack(rows), dense, along, torch.stack(curvature)
    return tuple(values.detach().numpy() for values in found)


def test_losses_and_gradients_are_those_of_autograd(backend, truth):
    losses, gradients, *_ = truth
    session, state = opened(backend, 13)
    np.testing.assert_allclose(session.losses([state])[0][0], losses, rtol=1e-6)
    chosen = np.array([5, 59, 0])
    np.testing.assert_allclose(session.sample_losses(state, chosen), losses[chosen], rtol=1e-6)
    np.testing.assert_allclose(session.gradient(state), gradients.mean(0), atol=1e-12)
    weights = np.where(np.arange(60) % 7, np.linspace(0, 2, 60), 0)
    np.testing.assert_allclose(session.gradient(state, weights), weights @ gradients / 60, atol=1e-12)
    np.testing.assert_allclose(session.gradient_norms(state), np.linalg.norm(gradients, axis=1), rtol=1e-10)


def test_gradient_cosines_and_their_means_are_those_of_autograd(backend, truth):
    unit = truth[1] / np.linalg.norm(truth[1], axis=1, keepdims=True)
    session, state = opened(backend, 13)
    chosen = np.array([5, 3, 28, 0, 11, 17, 2, 9, 59])
    cosines = unit[chosen] @ unit[chosen].T
    np.testing.assert_allclose(session.gradient_cosines(state, chosen), cosines, atol=1e-12)
    sets = [np.array([3, 1, 20]), np.array([5]), np.arange(0, 60, 2)]
    means = np.stack([(unit[chosen] @ unit[members].T).mean(1) for members in sets], 1)
    np.testing.assert_allclose(session.mean_cosines(state, chosen, sets), means, atol=1e-12)


def test_eigenpairs_products_and_curvatures_are_those_of_the_dense_hessian(backend, truth):
    losses, gradients, dense, direction, curvature = truth
    session, state = opened(backend, 13)
    found = session.top_eigenpairs(state, 3, 1e-7)
    assert found.converged
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(dense)[::-1][:3], rtol=1e-8)
    np.testing.assert_allclose(found.vectors @ dense, found.values[:, None] * found.vectors, atol=3e-7)
    np.testing.assert_allclose(session.hessian_vectors(state, direction[None])[0], dense @ direction, atol=1e-10)
    measured = session.curvature_along(state, direction)
    for values, expected in zip(measured, (losses, gradients @ direction, curvature), strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-11)
    slopes, curvatures = session.slopes_along(state, np.stack([direction, -2 * direction]))
    np.testing.assert_allclose(slopes[:, 1], -2 * measured[1], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(curvatures[:, 1], 4 * measured[2], rtol=1e-9, atol=1e-11)
    scale = np.linspace(1, 2, len(direction))
    scaled = session.top_eigenpairs(state, 1, 1e-7, scale=scale)
    np.testing.assert_allclose(scaled.values[0], np.linalg.eigvalsh(scale[:, None] * dense * scale)[-1], rtol=1e-8)


@pytest.mark.parametrize("optimizer", ["gd", "sgd", "momentum", "adam"])
def test_training_takes_the_steps_of_torch_optim(backend, optimizer):
    session, start = opened(backend, 13)
    size, clip = (16, 1.0) if optimizer == "sgd" else (None, None)
    training = Training(
        optimizer, 0.3, 8, batch_size=size, weight_decay=0.01, clip_norm=clip, seed=3,
        wants_losses=lambda step: True, wants_state=lambda step: True,
    )  # fmt: skip
    task = tiny.Tiny()
    torch.manual_seed(0)
    model = task.model().double()
    optim = {
        "gd": lambda p: torch.optim.SGD(p, 0.3, weight_decay=0.01),
        "sgd": lambda p: torch.optim.SGD(p, 0.3, weight_decay=0.01),
        "momentum": lambda p: torch.optim.SGD(p, 0.3, 0.9, weight_decay=0.01),
        "adam": lambda p: torch.optim.Adam(p, 0.3, weight_decay=0.01),
    }[optimizer](model.parameters())
    for snapshot in session.train(training, start):
        params = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        np.testing.assert_allclose(snapshot.state.params, params.numpy(), rtol=1e-8, atol=1e-11)
        losses = task.losses(model, [task.x.double(), task.y])
        np.testing.assert_allclose(snapshot.losses, losses.detach().numpy(), rtol=1e-6)
        np.testing.assert_array_equal(snapshot.predictions, task.predictions(model, [task.x.double(), task.y]))
        chosen = np.arange(60) if size is None else minibatch(60, size, 3, snapshot.step)
        optim.zero_grad()
        losses[chosen].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf)
        assert snapshot.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert snapshot.train_loss == pytest.approx(losses[chosen].mean().item(), rel=1e-6)
        if snapshot.step:
            assert snapshot.state.optimizer.keys() <= {"momentum_buffer", "exp_avg", "exp_avg_sq"}
        optim.step()


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_a_run_goes_on_from_any_of_its_states_bit_for_bit(backend, optimizer):
    session, start = opened(backend, 13, double=False)
    training = Training(optimizer, 0.1, 6, wants_state=lambda step: True)
    whole = list(session.train(training, start))
    again = list(session.train(training, whole[3].state))
    np.testing.assert_array_equal(again[-1].state.params, whole[-1].state.params)
    for name, row in whole[-1].state.optimizer.items():
        np.testing.assert_array_equal(again[-1].state.optimizer[name], row)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_weights_and_tracked_samples_are_as_asked_for(backend, truth, batch_size):
    session, state = opened(backend, 13)
    trained = np.arange(60) if batch_size is None else minibatch(60, batch_size, 0, 0)
    weights, tracked = np.ones(60), np.array([2, 9, 41])
    weights[trained[:3]], weights[trained[3]] = 0, 0.5
    training = Training(
        "sgd", 0.5, 1, batch_size=batch_size, weights=weights, tracked=tracked,
        wants_losses=lambda step: True, wants_state=lambda step: True,
    )  # fmt: skip
    first, last = session.train(training, state)
    expected = state.params - 0.5 * (weights[trained] @ truth[1][trained]) / len(trained)
    np.testing.assert_allclose(last.state.params, expected, atol=1e-12)
    assert first.train_loss == pytest.approx(float(weights[trained] @ truth[0][trained]) / len(trained), rel=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(first.losses)), tracked)
    np.testing.assert_array_equal(np.flatnonzero(first.predictions >= 0), tracked)
    with pytest.raises(UsageError, match="3 weights are not one for each of the"):
        next(iter(session.train(Training("sgd", 0.5, 1, weights=np.ones(3)), state)))


def test_reduced_losses_are_refused(backend):
    session, state = opened(backend, name="Reduced")
    with pytest.raises(OpsigError, match="one unreduced loss a sample"):
        session.losses([state])


def test_a_device_that_is_absent_is_an_error_and_never_another_device(backend):
    task = task_of(backend)
    with pytest.raises(UsageError, match="no device is called 'tpu'"):
        load_backend(backend).open(task, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(OpsigError, match="no CUDA device"):
            load_backend(backend).open(task, "cuda")
