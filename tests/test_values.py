"""Values that vanish, are missing or are not finite, data in another order, and what people ask for that cannot be."""

import numpy as np
import pytest
from conftest import TASKS

from opsig_cli.studies import comparing
from opsig_cli.trajectory import reading
from opsig_cli.trajectory.file import create_trajectory, open_trajectory

OWN = ("--task", f"{TASKS}:Tiny")


def write_losses(path, losses, labels=None):
    """A run of losses (T, S) alone."""
    with create_trajectory(path, np.arange(losses.shape[1])) as run:
        if labels is not None:
            run.write("samples/label", np.array(labels))
        for step, row in enumerate(losses):
            run.append("losses", step, loss=row.astype(np.float32))
    return path


# -- views of blocks


def test_the_share_of_samples_that_rise_is_the_same_wherever_a_block_ends(tmp_path, monkeypatch):
    losses = np.random.default_rng(0).random((40, 30)).astype(np.float32)
    path = write_losses(tmp_path / "run.h5", losses)
    for rows in (1, 3, 7, 40):
        monkeypatch.setattr(reading, "BLOCK_BYTES", rows * losses.itemsize * losses.shape[1])
        with open_trajectory(path) as run:
            kept = [block for _, block in run.blocks("losses/loss")]
            np.testing.assert_array_equal(np.concatenate(kept), losses)
            rising = comparing.series_of(run)["rising"].values
        np.testing.assert_array_equal(rising, (losses[1:] > losses[:-1]).mean(1))
