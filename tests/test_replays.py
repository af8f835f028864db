"""Steps that are trained again with samples silent, as `cluster` tries its pairs by."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import TASKS

from opsig_cli.studies import tracking
from opsig_cli.studies.clustering import silencing
from opsig_cli.studies.replaying import replay
from opsig_cli.studies.trained import settings_at, settings_of
from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state


def test_samples_are_silenced_at_the_learning_rate_of_the_step(run):
    with open_trajectory(run) as file:
        session, _ = tracking.open_session(file, f"{TASKS}:Tiny", "cpu", "torch", print)
        settings = settings_of(file)
        assert settings is not None
        scheduled = replace(settings, learning_rate=3 * settings.learning_rate)  # as of an import: the largest
        losses = silencing.Replay(file, session, scheduled, 30)(None)
        np.testing.assert_array_equal(losses, file.rows("losses/loss", 30, 31 + silencing.LENGTH))


@pytest.mark.parametrize("settings", [{}, {"optimizer": "momentum"}, {"batch_size": 16}])
def test_a_replay_for_its_losses_alone_is_the_training_with_silent_samples(run, settings):
    silent, wanted = np.array([3, 40, 41]), np.array([41, 3])
    with open_trajectory(run) as file:
        session, _ = tracking.open_session(file, f"{TASKS}:Tiny", "cpu", "torch", print)
        trained = settings_of(file)
        assert trained is not None
        trained = replace(trained, **settings)
        again = silencing.Replay(file, session, trained, 30)
        state = replace(read_state(file, 30), optimizer={})
        again._state = state
        weights = np.ones(session.samples)
        weights[silent] = 0
        plain = replay(session, settings_at(file, trained, 30), state, silencing.LENGTH, weights)
        expected = np.array([snapshot.losses for snapshot in plain])
        for _ in range(2):  # the second takes the first gradient that the first one left
            np.testing.assert_allclose(again(silent)[1:], expected[1:], rtol=1e-5)
        some = again(silent, wanted)
        np.testing.assert_allclose(some[1:, wanted], expected[1:][:, wanted], rtol=1e-5)
        assert np.isnan(np.delete(some, wanted, 1)).all()


def test_a_replay_for_its_losses_alone_ends_without_a_warning_where_no_loss_is_a_number(run):
    with open_trajectory(run) as file:
        session, _ = tracking.open_session(file, f"{TASKS}:Tiny", "cpu", "torch", print)
        settings = settings_of(file)
        assert settings is not None
        state = read_state(file, 30)
        lost = replace(state, params=np.full_like(state.params, np.nan))
        assert list(replay(session, settings_at(file, settings, 30), lost, 0, alone=True)) == []


def test_the_losses_of_a_run_are_its_replay_where_they_are_all_in_the_file(run):
    with open_trajectory(run) as file:
        session, _ = tracking.open_session(file, f"{TASKS}:Tiny", "cpu", "torch", print)
        settings = settings_of(file)
        assert settings is not None
        known = silencing.recorded(file, 30)
        assert known is not None
        np.testing.assert_array_equal(silencing.Replay(file, session, settings, 30)(None), known)
        last = int(file.steps("losses")[-1])
        assert silencing.recorded(file, last - silencing.LENGTH) is not None
        assert silencing.recorded(file, last - silencing.LENGTH + 1) is None
