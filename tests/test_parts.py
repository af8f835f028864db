"""Parts of a run: measured apart, and merged. T steps, S samples."""

import shutil

import h5py
import numpy as np
import pytest
from conftest import train_tiny

from opsig_cli import open_trajectory
from opsig_cli.errors import UsageError
from opsig_cli.studies.parts.share import Part, part_of

COUNT = 3


@pytest.fixture(scope="module")
def untracked(tmp_path_factory, request):
    """A run with checkpoints at thirteen steps and no losses, and one that `track` filled in."""
    folder = tmp_path_factory.mktemp("parts")
    arguments = [a for a in train_tiny(folder / "run.h5", "--checkpoint-every", 5) if a != "--track"]
    return folder, arguments


@pytest.fixture
def run(untracked, tmp_path, opsig):
    folder, arguments = untracked
    if not (folder / "run.h5").exists():
        assert opsig(*arguments).code == 0
    shutil.copy(folder / "run.h5", tmp_path / "run.h5")
    return tmp_path / "run.h5"


def measure(opsig, run, *command, parts=range(1, COUNT + 1), name="part", task=True):
    """Files of these parts."""
    from conftest import TASKS

    files = []
    for number in parts:
        files.append(run.parent / f"{name}{number}.h5")
        more = ["--task", f"{TASKS}:Tiny"] if task else []
        done = opsig(command[0], run, *command[1:], "--part", f"{number}/{COUNT}", "-o", files[-1], "-q", *more)
        assert done.code == 0, done.err
    return files


def test_parts_of_losses_merged_are_what_one_process_measures(opsig, run):
    from conftest import TASKS

    whole = run.parent / "whole.h5"
    shutil.copy(run, whole)
    assert opsig("track", whole, "--task", f"{TASKS}:Tiny", "-q").code == 0
    files = measure(opsig, run, "track")
    first = opsig("merge", run, files[2], files[0])
    assert [(r["number"], r["taken"], r["rows"]) for r in first.records] == [(3, 5, 5), (1, 4, 4)]
    assert "losses is still missing at steps 20, 25, 30, 35, which is part 2 of 3" in first.err
    again = opsig("merge", run, *files)
    assert [r["taken"] for r in again.records] == [0, 4, 0]
    assert "missing" not in again.err
    with open_trajectory(run) as merged, open_trajectory(whole) as alone:
        assert np.array_equal(merged.losses(), alone.losses())
        assert np.array_equal(merged.steps("losses"), alone.steps("losses"))
        assert np.array_equal(
            merged.rows("losses/prediction", 0, 13), alone.rows("losses/prediction", 0, 13)
        )  # fmt: skip


def test_a_part_that_was_cut_off_goes_on_where_it_stopped(opsig, run):
    file = measure(opsig, run, "track", parts=[2])[0]
    with open_trajectory(file, "r+") as part:
        part.rewind(25)
    from conftest import TASKS

    again = opsig("track", run, "--part", "2/3", "-o", file, "--task", f"{TASKS}:Tiny")
    assert [r["step"] for r in again.records] == [30, 35]
    assert "2 checkpoints have losses already" in again.err


def test_parts_of_eigenvalues_agree_with_the_whole_and_their_overlap_is_compared(opsig, run):
    from conftest import TASKS

    files = measure(opsig, run, "sharpness", "--at", "iterate", "--steps", "20:40")
    done = opsig("merge", run, *files)
    assert sum(r["taken"] for r in done.records) == 5
    assert "missing" not in done.err
    found = opsig("sharpness", run, "--at", "iterate", "--steps", "20:40", "-q", "--task", f"{TASKS}:Tiny")
    assert [r["step"] for r in found.records] == [20, 25, 30, 35, 40]
    other = measure(opsig, run, "sharpness", "--at", "iterate", "--steps", "20:40", parts=[2], name="again")[0]
    with h5py.File(other, "r+") as file:
        values = np.asarray(file["sharpness/eigenvalue"])
        file["sharpness/eigenvalue"][...] = values * 1.01
        del file["sharpness/checksum"]
    opsig("merge", run, other).fails(1, "again2.h5", "hold different sharpness/eigenvalue at step 25", "0.0")


def test_metrics_of_samples_come_back_with_their_run(opsig, run):
    from conftest import TASKS

    command = ["sharpness", "--metrics", "gradient_norm,sample_sharpness", "--random", "4", "--steps", "40:60:2"]
    files = measure(opsig, run, *command)
    assert [r["taken"] for r in opsig("merge", run, *files).records] == [1, 1, 1]
    kept = opsig("sharpness", run, *command[1:], "-q", "--task", f"{TASKS}:Tiny").records
    with open_trajectory(run) as merged:
        for record in kept:
            assert record["gradient_norm"] == merged.row("per_sample/gradient_norm", record["step"])[record["sample"]]
        assert np.isfinite(merged.row("per_sample/sample_sharpness", 40)).sum() == 4
    # other samples of the same steps join those that are there
    more = measure(opsig, run, *command, "--seed", "1", parts=[1], name="more")
    assert [r["taken"] for r in opsig("merge", run, *more).records] == [1]
    with open_trajectory(run) as merged:
        assert np.isfinite(merged.row("per_sample/sample_sharpness", 40)).sum() > 4


def test_what_is_no_part_of_the_run_is_refused(opsig, run):
    from conftest import TASKS

    one, two = measure(opsig, run, "track", parts=[1, 2])
    opsig("merge", run, run).fails(1, "is no part of a run")
    stranger = run.parent / "stranger.h5"
    assert opsig(*[a for a in train_tiny(stranger, "--checkpoint-every", 20) if a != "--track"]).code == 0
    opsig("merge", stranger, one).fails(1, "part1.h5 is a part of another run")
    task = ["--task", f"{TASKS}:Tiny"]
    opsig("track", stranger, "--part", "1/3", "-o", one, *task).fails(1, "is a part of another run")
    opsig("track", run, "--part", "1/4", "-o", one, *task).fails(1, "is part 1/3, not 1/4")
    opsig("track", run, "--part", "1/3", "-o", run, *task).fails(1, "is no part of a run")
    with open_trajectory(one, "r+") as part:
        row = part.row("losses/loss", 0)
        part.rewrite("losses", 0, loss=row + 0.01, prediction=part.row("losses/prediction", 0))
    assert opsig("merge", run, two).code == 0
    again = measure(opsig, run, "track", parts=[1], name="again")[0]
    opsig("merge", run, one, again).fails(1, "hold different losses/loss at step 0")
    with open_trajectory(run) as trajectory:
        assert len(trajectory.steps("losses")) == 4, "nothing of a refused merge is taken"


def test_a_part_is_named_whole_or_by_an_array_of_slurm():
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    array |= {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "15"}
    assert part_of(None, "part.h5", array) == Part(4, 16)
    assert part_of("2/3", "part.h5", array) == Part(2, 3)
    assert part_of(None, None, array) is None
    retried = array | {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    for text, output, environment, words in [
        (None, "part.h5", retried, "does not say which part"),
        (None, "part.h5", {}, "Say which"),
        ("3/16", None, array, "Name it: -o part.h5"),
        ("4/3", "part.h5", {}, "'4/3' is no part"),
        ("three", "part.h5", {}, "is no part"),
    ]:
        with pytest.raises(UsageError, match=words):
            part_of(text, output, environment)


@pytest.mark.parametrize(("steps", "count"), [(0, 3), (1, 4), (13, 3), (1000, 16), (7, 7)])
def test_every_step_is_in_exactly_one_part(steps, count):
    shares = [Part(number, count).share(range(steps)) for number in range(1, count + 1)]
    assert [step for share in shares for step in share] == list(range(steps))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
