"""Tasks whose items have several samples: every number of a position is that of its own loss, found alone."""

import numpy as np
import pytest
import torch
from opsig_torch import TorchBackend
from token_task import LENGTH, Digits

from opsig_cli.backends import Training
from opsig_cli.errors import OpsigError

KINDS = {
    "tied": {},
    "untied, no gaps": {"tied": False, "gaps": False},
    "places looked up once": {"shared": True, "items": 9},
}


def opened(batch=7, **options):
    session = TorchBackend().open(Digits(**options), "cpu", batch, double=True)
    notes: list[str] = []
    session.tell = notes.append
    return session, session.initial(0), notes


def alone(session, state, samples):
    """Gradients of samples one at a time: a forward pass of the item, and one number of it differentiated, (M, P)."""
    rows = []
    with session.at(state):
        for sample in samples:
            batch = [part[sample // LENGTH : sample // LENGTH + 1] for part in session.task.dataset().tensors]
            loss = session.task._task.losses(session.flat.model, batch)[0, sample % LENGTH]
            found = torch.autograd.grad(loss, session.flat.parameters, allow_unused=True)
            parts = [
                torch.zeros_like(p) if g is None else g for g, p in zip(found, session.flat.parameters, strict=True)
            ]
            rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
    return np.array(rows)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_gradients_of_positions_are_those_of_autograd_one_at_a_time(options):
    session, state, _ = opened(**options)
    count = session.samples
    samples = np.random.default_rng(0).permutation(count)[: count // 2]
    gradients = alone(session, state, samples)
    norms = np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(session.gradient_norms(state)[samples], norms, rtol=1e-9)
    np.testing.assert_allclose(session.gradient_norms(state, samples), norms, rtol=1e-9)
    with np.errstate(invalid="ignore"):
        unit = gradients / np.where(norms, norms, np.nan)[:, None]
    np.testing.assert_allclose(session.gradient_cosines(state, samples), unit @ unit.T, atol=1e-9)
    sets = [samples[:10], samples[5:40]]
    means = [np.nan_to_num(unit[:10]).mean(0), np.nan_to_num(unit[5:40]).mean(0)]
    np.testing.assert_allclose(session.mean_cosines(state, samples, sets), unit @ np.array(means).T, atol=1e-9)
    sketches = session.gradient_sketch(state, samples, 4096, 0)
    assert np.nanmax(np.abs(sketches @ sketches.T - unit @ unit.T)) < 6 * np.sqrt(2 / 4096)


@pytest.fixture(scope="module")
def tied():
    return opened(items=9)


def test_losses_are_those_of_the_task_and_nan_without_a_target(tied):
    session, state, _ = tied
    losses, predictions = session.losses([state])[0]
    task = session.task._task
    with session.at(state), torch.no_grad():
        exact = task.losses(session.flat.model, list(task.dataset().tensors))
    np.testing.assert_allclose(losses, exact.flatten().numpy(), rtol=1e-6)
    assert np.array_equal(np.isnan(losses), ~task.counts.numpy())
    assert predictions.shape == losses.shape == (9 * LENGTH,)
    chosen = np.array([50, 3, 4, 3, 20])
    np.testing.assert_allclose(session.sample_losses(state, chosen), losses[chosen], rtol=1e-6)


def test_the_whole_loss_is_the_mean_over_targets(tied):
    session, state, _ = tied
    gradients = alone(session, state, np.flatnonzero(session.task._task.counts.numpy()))
    np.testing.assert_allclose(session.gradient(state), gradients.mean(0), atol=1e-12)
    weights = np.linspace(0, 2, session.samples)
    weighted = weights[session.task._task.counts.numpy()] @ gradients / len(gradients)
    np.testing.assert_allclose(session.gradient(state, weights), weighted, atol=1e-12)
    snapshot = next(session.train(Training("gd", 0.1, 1, wants_losses=lambda _: True), state))
    assert snapshot.train_loss == pytest.approx(np.nanmean(snapshot.losses), rel=1e-6)
    assert snapshot.grad_norm == pytest.approx(np.linalg.norm(gradients.mean(0)), rel=1e-6)
    batch = next(session.train(Training("sgd", 0.1, 1, batch_size=9), state))
    assert batch.train_loss == pytest.approx(snapshot.train_loss, rel=1e-6)
    assert batch.grad_norm == pytest.approx(snapshot.grad_norm, rel=1e-6)
    weights = np.zeros(session.samples)
    weights[[2, 7]] = 3  # samples of two items
    weighted = next(session.train(Training("gd", 0.1, 1, weights=weights), state))
    count = int(session.task._task.counts.sum())
    own = alone(session, state, [2, 7]).sum(0) * 3 / count
    assert weighted.grad_norm == pytest.approx(np.linalg.norm(own), rel=1e-6)


def test_curvature_of_positions_is_that_of_their_own_loss(tied):
    session, state, notes = tied
    direction = np.random.default_rng(0).standard_normal(len(state.params))
    direction /= np.linalg.norm(direction)
    _, slopes, curvatures = session.curvature_along(state, direction)
    samples = np.arange(session.samples)
    counts = session.task._task.counts.numpy()
    exact = alone(session, state, samples)
    step = 1e-4
    ahead, behind = (
        alone(session, state.__class__(0, state.params + sign * step * direction, state.buffers), samples)
        for sign in (1, -1)
    )
    np.testing.assert_allclose(slopes[counts], (exact @ direction)[counts], atol=1e-9)
    np.testing.assert_allclose(
        curvatures[counts], ((ahead - behind) @ direction / (2 * step))[counts], atol=1e-6, rtol=1e-5
    )
    assert np.isnan(slopes[~counts]).all()
    assert np.isnan(curvatures[~counts]).all()
    whole = session.hessian_vectors(state, direction[None])[0] @ direction
    assert curvatures[counts].mean() == pytest.approx(whole, rel=1e-8)
    assert not notes, notes


def test_sharpness_of_positions_is_that_of_their_own_hessian(tied):
    session, state, _ = tied
    samples = np.array([3, 0, 17, 52])
    values, _ = session.sample_sharpness(state, samples, 1e-8)
    for sample, value in zip(samples, values, strict=True):
        with session.at(state):
            loss = session.losses_of([sample], 2)[0]
            first = torch.autograd.grad(loss, session.flat.parameters, create_graph=True)
            flat = torch.cat([part.reshape(-1) for part in first])
            rows = [
                torch.autograd.grad(v, session.flat.parameters, retain_graph=True, materialize_grads=True) for v in flat
            ]
            hessian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        assert value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)


def test_features_are_what_enters_the_last_layer_at_each_position(tied):
    session, state, _ = tied
    counts = session.task._task.counts.numpy()
    entered = []
    with session.at(state), torch.no_grad():
        handle = session.flat.model.head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        session.flat.model(session.task._task.tokens[:, :-1])
        handle.remove()
    rows = entered[0].flatten(0, 1).numpy()
    rows = rows - rows[counts].mean(0)
    samples = np.array([5, 0, 31])
    expected = rows[samples] / np.linalg.norm(rows[samples], axis=1, keepdims=True)
    np.testing.assert_allclose(session.features(state, samples), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda losses: losses.mean(1), r"returned shape \(4,\), and \(items, 6\)"),
        (lambda losses: losses[:, 1:], "6 positions"),
    ],
)
def test_losses_of_another_shape_are_refused(returned, words):
    class Wrong(Digits):
        def losses(self, model, batch):
            return returned(super().losses(model, batch))

    session = TorchBackend().open(Wrong(items=9), "cpu")
    with pytest.raises(OpsigError, match=words):
        session.initial(0)


def test_positions_must_be_a_count():
    class Wrong(Digits):
        positions = 0

    with pytest.raises(OpsigError, match="positions is 0"):
        TorchBackend().open(Wrong(), "cpu")


def test_sequences_that_see_each_other_are_refused():
    class Mixing(Digits):
        def losses(self, model, batch):
            losses = super().losses(model, batch)
            return losses + losses.nan_to_num().mean()

    session = TorchBackend().open(Mixing(), "cpu")
    with pytest.raises(OpsigError, match=r"the loss of sample \d+ depends on which samples are in its batch"):
        session.initial(0)
