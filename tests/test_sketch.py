"""Sketched gradients against exact ones, and what the network sees of samples."""

import sys

import numpy as np
import pytest
import torch
from conftest import TASKS
from opsig_torch import TorchBackend

sys.path.insert(0, str(TASKS.parent))
from tiny import Attend, Conv, Tiny


@pytest.mark.parametrize("task", [Tiny, Conv, Attend])
def test_sketched_cosines_are_unbiased_and_within_their_stated_error(task):
    session = TorchBackend().open(task(), "cpu")
    state, samples = session.initial(0), np.arange(session.samples)[::2]
    exact = session.gradient_cosines(state, samples)
    size, seeds = 256, 40
    off = ~np.eye(len(samples), dtype=bool)
    errors = []
    for seed in range(seeds):
        rows = session.gradient_sketch(state, samples, size, seed)
        errors.append((rows.astype(np.float64) @ rows.T - exact)[off])
    errors = np.array(errors)
    stated = np.sqrt((1 + exact[off] ** 2) / size)
    spread = np.sqrt((errors**2).mean(0))
    # A root mean square of 40 independent errors is within a factor of 1.6 of its expectation.
    assert (spread < 1.6 * stated).all()
    assert (np.abs(errors.mean(0)) < 5 * stated / np.sqrt(seeds)).all()
    assert spread.mean() > 0.2 * stated.mean()  # a sketch, not the gradients themselves


def test_a_sketch_is_the_same_for_one_seed_and_in_any_company():
    session = TorchBackend().open(Conv(), "cpu")
    state = session.initial(0)
    rows = session.gradient_sketch(state, np.arange(30), 64, 7)
    np.testing.assert_array_equal(rows, session.gradient_sketch(state, np.arange(30), 64, 7))
    np.testing.assert_allclose(session.gradient_sketch(state, np.array([5, 3]), 64, 7), rows[[5, 3]], atol=1e-6)
    assert np.abs(rows - session.gradient_sketch(state, np.arange(30), 64, 8)).max() > 0.1


def test_features_are_what_enters_the_last_layer_less_the_mean_of_all():
    session = TorchBackend().open(Tiny(), "cpu")
    state = session.initial(0)
    sets = [np.arange(8), np.arange(20, 60)]
    with session.at(state), torch.no_grad():
        model = session.flat.model
        inside = torch.relu(model[1](model[0](session.task.x))).double()
    centred = inside - inside.mean(0)
    centred /= centred.norm(dim=1, keepdim=True)
    chosen = np.array([33, 5, 20])
    np.testing.assert_allclose(session.features(state, chosen), centred[chosen].numpy(), atol=1e-5)
    expected = [(centred[chosen] @ centred[torch.from_numpy(s)].T).mean(1).numpy() for s in sets]
    np.testing.assert_allclose(session.mean_feature_cosines(state, chosen, sets), np.array(expected).T, atol=1e-5)


def test_entries_of_one_sign_do_not_add_up():
    """Gradients that point everywhere upwards: without random signs the estimate of 1 would be 1 + P / K."""
    from opsig_torch.sketch import _Places

    height, fan_in, size = 40, 100, 64  # rows longer than a sketch
    block = torch.full((1, height, fan_in), (height * fan_in) ** -0.5)
    estimates = []
    for seed in range(50):
        sketch = torch.zeros(1, size)
        _Places(height, fan_in, size, [seed]).scatter(sketch, slice(0, height), block)
        estimates.append(float(sketch.square().sum()))
    assert np.mean(estimates) == pytest.approx(1, abs=5 * np.sqrt(2 / size / 50))
    assert np.std(estimates) < 1.6 * np.sqrt(2 / size)


def test_a_linear_layer_is_sketched_without_its_outer_products():
    from opsig_torch.sketch import _Places

    outputs, inputs = torch.randn(5, 7), torch.randn(5, 30)
    places = _Places(7, 30, 16, [3])
    sketches = torch.zeros(2, 5, 16)
    places.add_outer(sketches[0], outputs, inputs)
    places.scatter(sketches[1], slice(0, 4), torch.einsum("mo,mf->mof", outputs, inputs)[:, :4])
    places.scatter(sketches[1], slice(4, 7), torch.einsum("mo,mf->mof", outputs, inputs)[:, 4:])
    torch.testing.assert_close(sketches[0], sketches[1])
