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
            parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, session.flat.parameters, strict=True)]
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
    means = [np.nan_to_num(unit[: 10]).mean(0), np.nan_to_num(unit[5:40]).mean(0)]
    np.testing.assert_allclose(session.mean_cosines(state, samples, sets), unit @ np.array(means).T, atol=1e-9)
    sketches = session.gradient_sketch(state, samples, 4096, 0)
    assert np.nanmax(np.abs(sketches @ sketches.T - unit @ unit.T)) < 6 * np.sqrt(2 / 4096)
