"""Whose curvature a pair's sides feel, against dense Hessians in float64, and what the verdict makes of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TASKS
from opsig_torch import TorchBackend
from tasks import tiny
from test_backend_contract import autograd_gradients
from test_curvature import dense

from opsig_cli import open_trajectory
from opsig_cli.analysis.grouping import Grouping
from opsig_cli.analysis.verdicts import Evidence, Silenced, asks_for_curvature
from opsig_cli.studies import tracking
from opsig_cli.studies.clustering import curving, silencing
from opsig_cli.trajectory.states import read_state

TASK = f"{TASKS}:Tiny"


def test_the_direction_is_the_gradient_of_a_sides_mean_loss():
    session = TorchBackend().open(tiny.Tiny(), "cpu", 7)
    state = session.initial(0)
    side = np.array([0, 3, 11])
    expected = autograd_gradients(session, state, side.tolist()).mean(0)
    found = curving.direction_of(session, state, side, session.samples)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.parametrize("aside", [[], [0], [0, 1]])
def test_what_is_left_of_the_curvature_is_that_of_the_hessian_without_the_pair(tiny_run, aside):
    """Two sides of four and three samples, held against dense Hessians of what is left, in float64: without what is set
    aside, which is the other pair and not the pair itself."""
    groups = np.repeat([0, 1, 2, 3, -1], [4, 3, 5, 5, 43])
    clusters = SimpleNamespace(
        position=np.arange(60), alike_GG=None, pairs=[SimpleNamespace(movement=1.0), SimpleNamespace(movement=0.5)],
        grouping=Grouping(groups, np.array([1, 0, 3, 2]), np.zeros(60)),
    )  # fmt: skip
    silent, others = np.arange(7), np.arange(7, 17) if 1 in aside else np.arange(0)
    with open_trajectory(tiny_run) as run:
        session = tracking.open_session(run, TASK, "cpu", "torch", lambda text: None)[0]
        steps = run.steps("checkpoints")[-2:]
        found = [
            curving.curvature_left(run, session, clusters, {0}, [step], lambda *a, **k: None, aside=aside)[0][0]  # pyright: ignore
            for step in steps
        ]
        labels, states = silencing.strata_of(run), [read_state(run, int(step)) for step in steps]
    double = TorchBackend().open(tiny.Tiny(), "cpu", 60, double=True)
    expected = []
    for state in states:
        generator = np.random.default_rng([0, state.step, 0, 1])
        controls = silencing.controls_of(labels, silent, np.arange(17), generator, others)
        assert not set(controls) & {*silent, *others}
        ratios = []
        for side in (np.arange(4), np.arange(4, 7)):
            v = autograd_gradients(double, state, side.tolist()).mean(0)
            left = []
            for gone in (silent, controls):
                weights = torch.ones(60, dtype=torch.float64)
                weights[gone] = weights[others] = 0
                left.append(v @ dense(double, state, weights)[0].numpy() @ v)
            ratios.append(left[0] / left[1])
        expected.append(max(ratios))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_curvature_of_samples_that_train_and_were_not_recorded_counts(tiny_run, monkeypatch):
    """The same pair against the same controls, in the run and in one that holds its samples from the tenth on."""
    found = []
    with open_trajectory(tiny_run) as run:
        session = tracking.open_session(run, TASK, "cpu", "torch", lambda text: None)[0]
        step = run.steps("checkpoints")[-1]
        for first in (0, 10):
            part = SimpleNamespace(samples=run.samples[first:], has=lambda name: False)
            clusters = SimpleNamespace(
                position=np.arange(10, 17) - first, alike_GG=None, pairs=[SimpleNamespace(movement=1.0)],
                grouping=Grouping(np.repeat([0, 1], [4, 3]), np.array([1, 0]), np.zeros(7)),
            )  # fmt: skip
            monkeypatch.setattr(curving, "controls_of", lambda *a, first=first: np.arange(30, 37) - first)
            monkeypatch.setattr(curving, "read_state", lambda part, step: read_state(run, step))
            found.append(curving.curvature_left(part, session, clusters, {0}, [step], lambda *a, **k: None)[0][0])  # pyright: ignore
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_side_that_decides_nothing_is_not_measured():
    """The group that two pairs share goes first; where a third or more is left along it, neither has its own."""
    asked = []

    def along(group):
        asked.append(group)
        return {1: 0.1, 2: 0.5, 3: 0.9, 4: 0.2}[group]

    assert curving.of_pairs({0: (1, 2), 1: (2, 3)}, along) == {0: 0.5, 1: 0.5}
    assert asked == [2]
    assert curving.of_pairs({0: (1, 4), 1: (1, 3)}, along) == {0: 0.2, 1: 0.9}
    assert asked == [2, 1, 3, 4]


def test_nothing_is_known_of_the_curvature_where_nobody_can_measure_it():
    assert curving.curvature_left(None, SimpleNamespace(), None, {0}, [1], print) == {}  # pyright: ignore


def test_curvature_is_asked_for_where_all_but_silence_speaks_for_a_pair():
    assert asks_for_curvature(Evidence(-0.4, -0.3, 0.01, 0.9), False)
    assert asks_for_curvature(Evidence(-0.1, -0.05, 0.01, 0.9), False)
    for opposition, high, p, alike in ((-0.1, -0.05, 0.01, 0.7), (-0.4, 0.1, 0.01, 0.9), (-0.4, -0.3, 0.2, 0.9),
                                       (-0.4, -0.3, 0.01, 0.7), (-0.4, -0.3, 0.01, float("nan"))):  # fmt: skip
        assert not asks_for_curvature(Evidence(opposition, high, p, alike), True)


def test_curvature_is_asked_of_a_pair_that_others_swing_where_there_are_such():
    swung, own = ([Silenced(step, 1.0, ratio, 1.0, ratio) for step in (1, 2, 3)] for ratio in (0.8, 0.1))
    assert asks_for_curvature(Evidence(-0.4, -0.3, 0.01, 0.9, swung), True)
    assert not asks_for_curvature(Evidence(-0.4, -0.3, 0.01, 0.9, swung), False)
    assert not asks_for_curvature(Evidence(-0.4, -0.3, 0.01, 0.9, own), True)
