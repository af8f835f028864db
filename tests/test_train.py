"""Training from the command line: resuming, interrupting, diverging, tracking."""

import random
import shutil
import signal
import time

import h5py
import numpy as np
import pytest
import torch
from conftest import TASKS, start_opsig, train_tiny

from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state


def arrays(path):
    """Every dataset of a run by name, but the stamp of its last commit."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    del found["commit"]
    return found


def assert_same_run(path, other):
    left, right = arrays(path), arrays(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_a_run_like_another_begins_where_it_began(tmp_path, opsig):
    own = ("--task", f"{TASKS}:Tiny")
    opsig(*train_tiny(tmp_path / "sgd.h5", "--optimizer", "sgd", "--batch-size", 20, "--seed", 5))
    options = ("--optimizer", "momentum", "--learning-rate", 0.01, "--steps", 30)
    assert opsig("train", *own, "--like", tmp_path / "sgd.h5", *options, "-o", tmp_path / "m.h5").code == 0
    with h5py.File(tmp_path / "sgd.h5") as first, h5py.File(tmp_path / "m.h5") as second:
        np.testing.assert_array_equal(first["checkpoints/params"][0], second["checkpoints/params"][0])
        assert first["scalars/train_loss"][0] == second["scalars/train_loss"][0]  # and the same first minibatch
        assert first["scalars/train_loss"][9] != second["scalars/train_loss"][9]
        assert second["losses/loss"].shape == (31, 60)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--optimizer", "momentum", "--learning-rate", "0.02"),
        ("--optimizer", "splitsgd", "--learning-rate", "0.02", "--batch-size", "16"),
        ("--optimizer", "adam", "--learning-rate", "0.01", "--batch-size", "16"),
    ],
)
def test_a_run_killed_at_a_random_step_resumes_to_the_same_bits(tmp_path, opsig, more):
    arguments = train_tiny(tmp_path / "killed.h5", "--checkpoint-every", 50, *more, steps=2000)
    process = start_opsig(*arguments)
    while not (tmp_path / "killed.h5").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(random.uniform(0.2, 1.5))
    process.kill()
    process.communicate()
    assert opsig("train", "-o", tmp_path / "killed.h5", "--resume", "--task", f"{TASKS}:Tiny").code == 0
    whole = train_tiny(tmp_path / "whole.h5", "--checkpoint-every", 50, *more, steps=2000)
    assert opsig(*whole).code == 0
    assert_same_run(tmp_path / "killed.h5", tmp_path / "whole.h5")


def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_continue(tmp_path, opsig):
    process = start_opsig(*train_tiny(tmp_path / "run.h5", "--checkpoint-every", 100000, steps=100000))
    while not (tmp_path / "run.h5").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 130
    assert "--resume" in err
    steps = arrays(tmp_path / "run.h5")["checkpoints/step"]
    assert len(steps) == 2
    assert str(steps[-1]) in out
    outcome = opsig("train", "-o", tmp_path / "run.h5", "--resume", "--task", f"{TASKS}:Tiny", "--steps", steps[-1] + 5)
    assert outcome.code == 0
    assert arrays(tmp_path / "run.h5")["losses/step"][-1] == steps[-1] + 5


def test_the_same_command_twice_writes_the_same_numbers(tmp_path, opsig):
    for name in ("a.h5", "b.h5"):
        assert opsig(*train_tiny(tmp_path / name)).code == 0
    assert_same_run(tmp_path / "a.h5", tmp_path / "b.h5")


def test_track_fills_what_training_left_out_with_the_same_losses(tmp_path, opsig, tiny_run):
    arguments = train_tiny(tmp_path / "bare.h5")
    arguments.remove("--track")
    assert opsig(*arguments).code == 0
    opsig("mine", tmp_path / "bare.h5").fails(1, "lacks losses/loss (loss of every sample)", "opsig track")
    outcome = opsig("track", tmp_path / "bare.h5", "--task", f"{TASKS}:Tiny")
    assert [r["step"] for r in outcome.records] == list(range(0, 61, 3))
    filled, recorded = arrays(tmp_path / "bare.h5"), arrays(tiny_run)
    np.testing.assert_allclose(filled["losses/loss"], recorded["losses/loss"][::3], rtol=1e-6)
    np.testing.assert_array_equal(filled["losses/prediction"], recorded["losses/prediction"][::3])
    again = opsig("track", tmp_path / "bare.h5", "--task", f"{TASKS}:Tiny")
    assert (again.code, again.out) == (0, "")
    assert "21 checkpoints have losses already" in again.err


def test_track_refuses_a_task_whose_losses_are_not_the_ones_trained_on(tmp_path, opsig):
    arguments = train_tiny(tmp_path / "run.h5")
    arguments.remove("--track")
    opsig(*arguments)
    opsig("track", tmp_path / "run.h5", "--task", f"{TASKS}:Tiny:shared=2").fails(1, "training logged", "step 0")


def test_checkpoints_come_in_pairs_on_request(tmp_path, opsig):
    opsig(*train_tiny(tmp_path / "run.h5", "--checkpoint-every", 20, "--checkpoint-pairs"))
    assert arrays(tmp_path / "run.h5")["checkpoints/step"].tolist() == [0, 1, 20, 21, 40, 41, 60]


def test_a_diverging_run_stops_at_the_step_it_names_and_keeps_its_row(tmp_path, opsig):
    outcome = opsig(*train_tiny(tmp_path / "run.h5", "--learning-rate", 1e30))
    outcome.fails(1, "the loss is not finite at step", "keeps this row", "learning rate below 1e+30")
    step = int(outcome.err.split("at step ")[1].split(".")[0])
    assert arrays(tmp_path / "run.h5")["losses/step"][-1] == step
    assert opsig("info", tmp_path / "run.h5").records[0]["state"] == f"stopped: the loss is not finite at step {step}"


def test_sharpness_is_recorded_when_asked(tmp_path, opsig):
    outcome = opsig(*train_tiny(tmp_path / "run.h5", "--sharpness-every", 30, "--checkpoint-every", 30))
    assert all(r["sharpness"] > 0 for r in outcome.records)
    assert arrays(tmp_path / "run.h5")["sharpness/eigenvalue"].shape == (3, 1)


def test_resuming_with_other_settings_is_refused(tmp_path, opsig, tiny_run):
    copy = shutil.copy(tiny_run, tmp_path / "run.h5")
    own = ("--task", f"{TASKS}:Tiny")
    opsig("train", "-o", copy, "--resume", *own, "--learning-rate", "0.2").fails(2, "trained with --learning-rate 0.5")
    opsig("train", "-o", copy, "--resume").fails(1, "a task of your own", "--task")
    opsig("train", "-o", copy, "--resume", "--replace", *own).fails(2, "--resume", "--replace")
    opsig("train", "-o", copy, *own).fails(1, "exists", "--resume", "--replace")


def test_a_changed_task_file_is_a_warning(tmp_path, opsig):
    source = TASKS.read_text()
    (tmp_path / "mine.py").write_text(source)
    arguments = ["train", "--task", f"{tmp_path}/mine.py:Tiny", "-o", tmp_path / "run.h5", "--steps", 3]
    assert opsig(*arguments).code == 0
    (tmp_path / "mine.py").write_text(source + "\n# changed\n")
    outcome = opsig("track", tmp_path / "run.h5", "--task", f"{tmp_path}/mine.py:Tiny")
    assert outcome.code == 0
    assert "has changed since" in outcome.err


def test_checkpoints_in_bfloat16_are_half_the_size_and_rounded_to_nearest(tmp_path, opsig):
    opsig(*train_tiny(tmp_path / "whole.h5", "--checkpoint-every", 10))
    rounded = tmp_path / "rounded.h5"
    assert opsig(*train_tiny(rounded, "--checkpoint-every", 10, "--checkpoint-dtype", "bfloat16")).code == 0
    with open_trajectory(tmp_path / "whole.h5") as whole, open_trajectory(rounded) as run:
        for step in run.steps("checkpoints"):
            exact = torch.from_numpy(read_state(whole, step).params)
            np.testing.assert_array_equal(read_state(run, step).params, exact.bfloat16().float().numpy())
        np.testing.assert_array_equal(run.row("losses/loss", 60), whole.row("losses/loss", 60))
    with h5py.File(rounded) as file:
        assert file["checkpoints/params"].dtype == np.uint16
    assert opsig("repack", rounded, "-o", tmp_path / "packed.h5").code == 0
    for path in (rounded, tmp_path / "packed.h5"):
        assert opsig("verify", path).code == 0
        assert opsig("sharpness", path, "--task", f"{TASKS}:Tiny", "--steps", "60", "--tolerance", "1e-2").code == 0
    opsig("train", "-o", rounded, "--resume", "--task", f"{TASKS}:Tiny", "--steps", 80).fails(1, "bfloat16")
    arguments = train_tiny(tmp_path / "other.h5", "--checkpoint-dtype", "float16")
    opsig(*arguments).fails(2, "float32, bfloat16", "float16")


def test_a_tracked_subset_has_the_losses_that_all_samples_have(opsig, tmp_path):
    """Minibatches and full batch; drawn with the seed, the others not measured, and mining goes by those alone."""
    for name, more in (("mini", ["--optimizer", "sgd", "--batch-size", 8]), ("full", [])):
        whole, part, again = (tmp_path / f"{name}-{which}.h5" for which in ("whole", "part", "again"))
        assert opsig(*train_tiny(whole, *more, steps=30)).code == 0
        for path in (part, again):
            assert opsig(*train_tiny(path, *more, "--track-samples", 9, steps=30)).code == 0
        with open_trajectory(whole) as one, open_trajectory(part) as other, open_trajectory(again) as third:
            losses, some = one.losses(), other.losses()
            measured = np.isfinite(some)
            assert measured.sum(1).tolist() == [9] * 31
            assert (measured == measured[0]).all()
            np.testing.assert_allclose(some[measured], losses[measured], rtol=1e-6)
            np.testing.assert_array_equal(some, third.losses())
            np.testing.assert_array_equal(
                other.rows("checkpoints/params", 0, 9), one.rows("checkpoints/params", 0, 9)
            )  # what is trained is the same
            chosen = set(other.samples[measured[0]].tolist())
        assert {record["sample"] for record in opsig("mine", part).records if "sample" in record} == chosen


def test_a_budget_says_how_often_losses_are_recorded(opsig, tmp_path):
    path = tmp_path / "run.h5"
    budget = [word for word in train_tiny(path, "--optimizer", "sgd", "--batch-size", 8) if word != "--track"]
    outcome = opsig(*budget, "--track-budget", 0.2)
    assert outcome.code == 0, outcome.err
    with open_trajectory(path) as run:
        every = run.attributes["settings_json"]["track_every"]
        assert every == np.ceil(len(run.samples) / (3 * 8 * 0.2))
        assert np.diff(run.steps("losses"))[0] == every
    assert f"losses are recorded every {every} steps" in outcome.err
    opsig(*train_tiny(path), "--track-budget", 0.2, "--replace").fails(2, "--track-budget")
