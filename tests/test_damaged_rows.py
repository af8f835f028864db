"""Rows that decide are checked: where some are damaged, the answer is that of the run without them, and says so."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TASKS, start_opsig, train_tiny

from opsig_cli.trajectory.checking import DamagedRows, without_damage
from opsig_cli.trajectory.file import create_trajectory, open_trajectory

TASK = ("--task", f"{TASKS}:Tiny")
ANSWERS = {
    "info": ("info",),
    "mine": ("mine", "--top", 12),
    "mine one step": ("mine", "--step", 31),
    "mine a window": ("mine", "--window", "10:40", "--score", "variation", "--share", 22),
    "cluster by losses": ("cluster", "--by", "loss", "--explain", 22),
    "cluster": ("cluster", *TASK),
    "compare": ("compare",),
    "metrics": ("sharpness", "--metrics", "gradient_norm,curvature", *TASK),
    "projection": ("probe", "--projection"),
    "sharpness": ("sharpness", "--at", "iterate", *TASK),
    "track": ("track", *TASK),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tracked run with checkpoints at every tenth step and the sharpness of every second of these."""
    path = tmp_path_factory.mktemp("whole") / "run.h5"
    for command in (
        train_tiny(path, "--checkpoint-every", 10),
        ["sharpness", path, "--steps", "0:60:2", "--at", "iterate", *TASK],
    ):
        process = start_opsig(*command)
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
    return path


def without(source: Path, target: Path, left_out: dict[str, list[int]]) -> Path:
    """The run as if rows had never been recorded."""
    with open_trajectory(source) as run, create_trajectory(target, run.samples, replace=True) as copy:
        for key, value in run._file.attrs.items():
            copy._file.attrs[key] = value
        for name in run.names():
            group, *_ = name.split("/")
            if name not in copy._file and not run.has(f"{group}/step"):
                copy.write(name, run.read(name))
        for group in ("scalars", "losses", "checkpoints", "sharpness"):
            names = [n.removeprefix(f"{group}/") for n in run.names() if n.startswith(f"{group}/")]
            for step in run.steps(group).tolist():
                if step not in left_out.get(group, []):
                    columns = {n: run.row(f"{group}/{n}", step) for n in names if n not in ("step", "checksum")}
                    copy.append(group, step, **{n.replace("/", "__"): value for n, value in columns.items()})
    return target


def damage(path: Path, rows: dict[str, list[int]]) -> None:
    """Change one number of each of these rows, as a disk does: behind the checksum's back."""
    columns = {"losses": "loss", "checkpoints": "params", "scalars": "grad_norm", "sharpness": "eigenvalue"}
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        for group, steps in rows.items():
            places = np.searchsorted(file[f"{group}/step"][()], steps)
            for place in places:
                row = np.array(file[f"{group}/{columns[group]}"][place])
                row.reshape(-1)[0] += 1
                file[f"{group}/{columns[group]}"][place] = row


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_answer_is_that_of_the_run_without_its_damaged_rows(answer, whole, tmp_path, opsig):
    rows = {"losses": [0, 17, 30, 45], "checkpoints": [10, 50], "scalars": [40, 60], "sharpness": [0, 40]}
    if answer == "info":  # it looks at the first and the last row of each group alone
        rows = {"losses": [0, 17], "checkpoints": [60], "scalars": [40, 60]}
    broken, reference = tmp_path / "run.h5", tmp_path / "reference" / "run.h5"
    reference.parent.mkdir()
    shutil.copy(whole, broken)
    damage(broken, rows)
    without(whole, reference, rows)
    command, *more = ANSWERS[answer]
    ours, theirs = opsig(command, broken, *more), opsig(command, reference, *more)
    assert (ours.code, theirs.code) == (0, 0), ours.err + theirs.err
    expected = theirs.out.replace(str(reference), str(broken))
    left = [json.loads(line) for line in ours.out.splitlines()]
    right = [json.loads(line) for line in expected.splitlines()]
    if answer == "info":  # counts bytes and the names of dimensions, too
        left, right = ([{k: v for k, v in r.items() if k not in ("bytes", "groups")} for r in x] for x in (left, right))
    assert left == right
    said = [line for line in ours.err.splitlines() if "damaged and left out" in line]
    assert said, ours.err
    assert all(str(broken) in line for line in said)


def test_the_report_leaves_damaged_rows_out_and_says_so(whole, tmp_path, opsig):
    broken = tmp_path / "run.h5"
    shutil.copy(whole, broken)
    damage(broken, {"losses": [17]})
    outcome = opsig("report", broken, "--by", "loss", "-o", tmp_path / "r.html", "--quiet")
    assert outcome.code == 0
    assert outcome.err == f"note: {broken}: 1 of 61 rows of losses is damaged and left out: step 17\n"
    assert "1 of 61 rows of losses is damaged and left out: step 17" in (tmp_path / "r.html").read_text()


def test_what_reads_rows_refuses_them_by_name(whole, tmp_path):
    shutil.copy(whole, tmp_path / "run.h5")
    damage(tmp_path / "run.h5", {"losses": [17, 30]})
    with open_trajectory(tmp_path / "run.h5") as run:
        for read in (
            lambda: run.rows("losses/loss", 0, 20),
            lambda: run.series("losses/loss", np.array([3]), 10),
            lambda: list(run.blocks("losses/prediction")),
            lambda: run.row("losses/prediction", 17),
            lambda: run.check("losses", [3, 17]),
        ):
            with pytest.raises(DamagedRows, match=r"losses at steps? 17"):
                read()
        assert len(run.rows("losses/loss", 18, 30)) == 12
        said = []
        assert without_damage(lambda: len(run.series("losses/loss", np.array([0, 1]))), said.append) == 59
        assert said == [f"{tmp_path / 'run.h5'}: 2 of 61 rows of losses are damaged and left out: steps 17, 30"]
        assert run.steps("losses").tolist() == [s for s in range(61) if s not in (17, 30)]


def test_a_damaged_step_is_a_damaged_row_wherever_it_moves(whole, tmp_path, opsig):
    for number, wrong in enumerate((16, -3, 1 << 40, 200)):
        path = tmp_path / f"{number}.h5"
        shutil.copy(whole, path)
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            file["losses/step"][17] = wrong
        assert opsig("mine", path).out == opsig(
            "mine", without(whole, tmp_path / "w.h5", {"losses": [17]})
        ).out.replace("w.h5", f"{number}.h5")


def test_a_checkpoint_whose_step_moved_out_of_the_run_is_named(whole, tmp_path, opsig):
    path = tmp_path / "run.h5"
    shutil.copy(whole, path)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file["checkpoints/step"][-1] = 1 << 34
    said = opsig("cluster", path, "--test", "none", *TASK)
    assert "1 of 7 rows of checkpoints is damaged and left out: step 17179869184" in said.err


def test_losses_whose_step_moved_out_of_the_run_are_named_and_measured_again(whole, tmp_path, opsig):
    path = tmp_path / "run.h5"
    shutil.copy(whole, path)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        file["losses/step"][-1] = 1 << 41
    said = opsig("track", path, *TASK)
    assert [record["step"] for record in said.records] == [60]
    assert "1 of 61 rows of losses is damaged and left out: step 2199023255552" in said.err


def test_one_unreadable_chunk_costs_its_own_rows(tmp_path, opsig):
    values = np.random.default_rng(0).random((200, 30), np.float32)
    with create_trajectory(tmp_path / "run.h5", np.arange(30)) as run:
        for step, losses in enumerate(values):
            run.append("losses", step, loss=losses)
    assert opsig("repack", tmp_path / "run.h5").code == 0
    with h5py.File(tmp_path / "run.h5") as file:
        chunk = file["losses/loss"].id.get_chunk_info(1)
    with open(tmp_path / "run.h5", "r+b") as file:
        file.seek(chunk.byte_offset + 40)
        file.write(b"\0" * 99)
    with open_trajectory(tmp_path / "run.h5") as run:
        kept = without_damage(lambda: run.rows("losses/loss", 0, 200), lambda _: None)
    np.testing.assert_array_equal(kept, np.delete(values, range(64, 128), 0))


def test_a_damaged_row_can_be_measured_again(whole, tmp_path, opsig):
    broken = tmp_path / "run.h5"
    shutil.copy(whole, broken)
    damage(broken, {"losses": [30], "sharpness": [40]})
    assert [r["step"] for r in opsig("track", broken, *TASK).records] == [30]
    assert opsig("sharpness", broken, "--at", "iterate", *TASK).code == 0
    assert opsig("verify", broken).code == 0
    with open_trajectory(broken) as run, open_trajectory(whole) as before:
        np.testing.assert_allclose(run.row("losses/loss", 30), before.row("losses/loss", 30), rtol=1e-5)
        np.testing.assert_allclose(run.row("sharpness/eigenvalue", 40), before.row("sharpness/eigenvalue", 40), 0.02)


@pytest.mark.parametrize("names", ["1,2,3", "pair:1"])
def test_a_branch_leaves_damaged_rows_out_and_says_so(whole, tmp_path, opsig, names):
    broken, reference = tmp_path / "run.h5", tmp_path / "reference" / "run.h5"
    reference.parent.mkdir()
    shutil.copy(whole, broken)
    rows = {"losses": [17, 35, 60], "scalars": [36], "checkpoints": [50]}
    damage(broken, rows)
    without(whole, reference, rows)
    more = ("--from", 30, "--steps", 10, "--drop", names, "--draws", 0, *TASK)
    ours = opsig("branch", broken, "-o", tmp_path / "branch.h5", *more, "--quiet")
    theirs = opsig("branch", reference, "-o", reference.parent / "branch.h5", *more, "--quiet")
    assert (ours.code, theirs.code) == (0, 0), ours.err + theirs.err
    assert ours.out == theirs.out.replace(str(reference.parent), str(tmp_path))
    said = [line.split(": ", 2)[2] for line in ours.err.splitlines()]
    assert "3 of 61 rows of losses are damaged and left out: steps 17, 35, 60" in said
    assert "1 of 61 rows of scalars is damaged and left out: step 36" in said
    assert ("1 of 7 rows of checkpoints is damaged and left out: step 50" in said) == (names == "pair:1")


def test_a_branch_is_compared_without_its_damaged_last_row(whole, tmp_path, opsig):
    run, branch = tmp_path / "run.h5", tmp_path / "branch.h5"
    shutil.copy(whole, run)
    assert opsig("branch", run, "--from", 30, "--steps", 10, "-o", branch, "--draws", 0, *TASK).code == 0
    damage(branch, {"scalars": [40]})
    found = opsig("compare", run, branch)
    assert found.code == 0, found.err
    assert [record["steps"] for record in found.records] == [39, 39]
    assert "from the fork on, steps 30 to 39" in found.err
