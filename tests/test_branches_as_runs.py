"""What other commands make of a branch, which is a run itself."""

import h5py
import numpy as np
import pytest
from conftest import TASKS, train_tiny
from test_branch import OWN, branch

import opsig_cli
from opsig_cli.studies import tracking
from opsig_cli.studies.critical import update_direction
from opsig_cli.studies.trained import settings_of
from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state

# -- a branch is a run


def test_every_command_works_on_a_branch_and_compare_begins_at_the_fork(opsig, run, tmp_path):
    assert branch(opsig, run, "--drop", "label:red", steps=24).code == 0
    path = tmp_path / "branch.h5"
    assert opsig("mine", path, "--top", 5).code == 0
    assert opsig("verify", path).code == 0
    assert opsig("info", path).records[0]["change"] == "drop label:red"
    assert opsig("cluster", path, "--top", 30, *OWN).code == 0
    assert opsig("sharpness", path, "--steps", "54", *OWN).records[0]["eigenvalue"] > 0
    compared = opsig("compare", run, path, "--figure", tmp_path / "c.png")
    assert "from the fork on, steps 30 to 54" in compared.err
    assert [r["steps"] for r in compared.records] == [54, 54]
    with h5py.File(run) as file:
        assert compared.records[0]["loss"] == pytest.approx(file["losses/loss"][54].mean(dtype="f8"))
    assert [r["from_step"] for r in compared.records] == [None, 30]
    assert opsig("compare", run).records[0]["steps"] == 60
    assert opsig("report", path, *OWN, "-o", tmp_path / "branch.html").code == 0
    assert "run.h5, from step 30" in (tmp_path / "branch.html").read_text()


def test_the_report_of_a_run_lists_its_branches(opsig, run, tmp_path):
    assert branch(opsig, run, "--drop", "label:red", steps=6).code == 0
    assert opsig(*train_tiny(tmp_path / "other.h5", steps=5)).code == 0
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    assert opsig("report", run, *OWN, "--by", "loss").code == 0
    page = (tmp_path / "run.html").read_text()
    assert "What would have happened" in page
    assert "drop label:red" in page
    assert "other.h5" not in page
    opsig("report", run, *OWN, "--branch", tmp_path / "other.h5").fails(1, "other.h5 is not a branch of")
    assert opsig("report", tmp_path / "other.h5", *OWN, "--by", "loss").code == 0
    assert "What would have happened" not in (tmp_path / "other.html").read_text()


def test_the_file_says_where_it_comes_from(opsig, run, tmp_path):
    found = branch(opsig, run, "--drop", "label:red", "--learning-rate", "0.1", steps=3)
    with opsig_cli.open_trajectory(tmp_path / "branch.h5") as file, opsig_cli.open_trajectory(run) as parent:
        said = file.attributes
        assert said["parent"] == parent.attributes.get("run_id", str(run))
        assert (said["parent_path"], said["from_step"]) == (str(run), 30)
        assert said["change"] == "drop label:red, learning rate 0.1"
        assert said["change_json"]["weights"] == [["label:red", 0.0]]
        assert said["effects_json"] == found.records[1:]
        assert file.steps("checkpoints")[0] == 30
        np.testing.assert_array_equal(file.read("samples/label"), parent.read("samples/label"))


# -- what other commands make of it


@pytest.mark.parametrize("change", [("--drop", "1,2,3"), ("--label-smoothing", 0.2)])
def test_a_branch_that_minimises_another_loss_is_tracked(opsig, run, change):
    task = ("--task", f"{TASKS}:Smooth")
    assert branch(opsig, run, *change, "--track-every", 5, "--draws", 0, task=task).code == 0
    found = opsig("track", run.parent / "branch.h5", *task)
    assert found.code == 0, found.err
    assert len(found.records) > 5


@pytest.mark.parametrize("more", [(), ("--optimizer", "sgd", "--batch-size", 20)])
def test_a_model_kept_in_half_precision_takes_smoothed_labels(opsig, tmp_path, more):
    task = ("--task", f"{TASKS.parent / 'parts.py'}:Half")
    path = tmp_path / "run.h5"
    assert opsig("train", *task, "--steps", 10, "--checkpoint-every", 5, "--track", "-o", path).code == 0
    found = branch(opsig, path, "--label-smoothing", 0.1, *more, start=5, steps=5, task=task)
    assert found.code == 0, found.err


@pytest.mark.parametrize(
    "change",
    [("--optimizer", "adam", "--learning-rate", 0.01), ("--clip-norm", 0.05), ("--optimizer", "splitsgd")],
)
def test_the_update_of_a_branch_is_the_one_it_makes(opsig, run, change):
    assert branch(opsig, run, *change, "--draws", 0).code == 0
    with open_trajectory(run.parent / "branch.h5") as file:
        session, _ = tracking.open_session(file, f"{TASKS}:Tiny", "cpu", "torch", print)
        settings = settings_of(file)
        for step in (30, 31, 40):
            state, after = read_state(file, step), read_state(file, step + 1)
            direction = update_direction(settings, state, session.gradient(state).astype(np.float64))
            assert direction is not None, step
            moved = after.params.astype(np.float64) - state.params
            np.testing.assert_allclose(settings.learning_rate * direction, moved, atol=1e-3 * np.abs(moved).max())


def test_the_curvature_of_a_branch_says_of_which_loss_it_is(opsig, run):
    assert branch(opsig, run, "--drop", "1,2,3", "--draws", 0).code == 0
    path = run.parent / "branch.h5"
    critical = opsig("sharpness", path, "--steps", 40, "--metrics", "critical_sharpness", *OWN)
    assert critical.code == 0
    assert "minimises the loss with its samples' weights: critical sharpness is along the negative" in critical.err
    assert critical.records[0]["threshold"] is None
    top = opsig("sharpness", path, "--steps", 40, *OWN)
    assert "measured of the mean loss of all samples" in top.err
    assert "mean loss of all samples" not in opsig("sharpness", run, "--steps", 40, *OWN).err
