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
    expected = torch.stack([centred[torch.from_numpy(s)].mean(0) for s in sets]).numpy()
    np.testing.assert_allclose(session.mean_features(state, sets), expected, atol=1e-5)
