"""Results of `cluster` and `mine` in the file: read back where nothing changed, computed anew where anything did."""

import shutil
import subprocess
import sys
from dataclasses import dataclass

import h5py
import numpy as np
import pytest
from conftest import TASKS, start_opsig, train_tiny

from opsig_cli import open_trajectory
from opsig_cli.studies import kept, mining
from opsig_cli.studies.packed import pack, unpack

READ_BACK = "kept in the file"


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """A short run of a task of one's own whose groups are kept in it, the task's file, and what `cluster` printed."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copy(TASKS, folder / "own.py")
    run, task = folder / "run.h5", f"{folder / 'own.py'}:Tiny"
    arguments = ["--task", task, "--budget", "32"]
    for command in (["train", *train_tiny(run)[1:], "--task", task], ["cluster", run, *arguments]):
        process = start_opsig(*command)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert READ_BACK not in err
    return run, folder / "own.py", out


@pytest.fixture
def run_of(clustered, tmp_path):
    """A copy of that run, and the options with which it was clustered, of which the task's file is a copy, too."""
    run, own, out = clustered
    copy = shutil.copy(run, tmp_path / "run.h5")
    return copy, ["--task", f"{own}:Tiny", "--budget", "32"], out.replace(str(run), str(copy))


def test_groups_are_read_back_as_they_were_found_without_loading_torch(run_of, tmp_path):
    run, options, out = run_of
    for command, expected in ((["cluster", run], out), (["report", run, "-o", str(tmp_path / "page.html")], None)):
        given = options[:2] if command[0] == "report" else options
        if command[0] == "report":  # the default budget is another, of which nothing is kept yet
            start_opsig("cluster", run, *options[:2]).communicate(timeout=300)
        code = (
            f"import sys; sys.argv = ['opsig', *{[str(word) for word in [*command, *given]]!r}]\n"
            "from opsig_cli.main import run\nrun()\nassert 'torch' not in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert READ_BACK in done.stderr
        assert expected is None or done.stdout == expected


def test_what_is_asked_for_otherwise_or_anew_is_found_anew(opsig, run_of):
    run, options, out = run_of
    assert READ_BACK in opsig("cluster", run, *options).err
    for more in (["--top", 20], ["--no-join"], ["--by", "loss"]):
        assert READ_BACK not in opsig("cluster", run, *options, *more).err
        assert READ_BACK in opsig("cluster", run, *options, *more).err  # and this is kept beside it
    again = opsig("cluster", run, *options, "--replace")
    assert READ_BACK not in again.err
    assert again.out == out
    assert opsig("verify", run).code == 0


def test_what_changed_in_the_run_or_in_the_task_is_seen(opsig, run_of, tmp_path):
    run, options, _ = run_of
    own = tmp_path / "edited.py"
    own.write_text(TASKS.read_text() + "\n# another\n")
    edited = ["--task", f"{own}:Tiny", *options[2:]]
    assert READ_BACK not in opsig("cluster", run, *edited).err
    assert READ_BACK in opsig("cluster", run, *edited).err
    own.write_text(TASKS.read_text() + "\n# again\n")
    assert READ_BACK not in opsig("cluster", run, *edited).err
    with open_trajectory(run, "r+") as trajectory:
        trajectory.append("scalars", 10_000, train_loss=1.0)
    assert READ_BACK not in opsig("cluster", run, *edited).err


def test_damage_to_what_groups_were_found_from_is_noticed(opsig, run_of):
    run, options, _ = run_of
    with h5py.File(run, "r+") as file:
        file["losses/loss"][30, 5] += 1
    again = opsig("cluster", run, *options)
    assert again.code == 0
    assert READ_BACK not in again.err
    assert "left out: step 30" in again.err


def test_damage_to_what_no_group_is_found_from_is_not_looked_at(opsig, run_of):
    run, options, out = run_of
    with open_trajectory(run, "r+") as trajectory:
        for step in (1, 2):
            trajectory.append("logged", step, accuracy=0.5)
    with h5py.File(run, "r+") as file:
        file["logged/step"][0] = 2
    found = opsig("cluster", run, *options)
    assert (found.code, found.out) == (0, out)
    assert "damaged" not in found.err


@pytest.mark.parametrize("harm", ["bytes", "origin", "fields", "places"])
def test_a_result_that_is_damaged_or_forged_is_found_anew(opsig, run_of, harm):
    run, options, out = run_of
    with open_trajectory(run, "r+") as trajectory:
        whole = trajectory.read("clusters/kept")
        if harm == "bytes":
            trajectory._file["clusters/kept"][len(whole) // 2] ^= 1
        else:
            data = whole.tobytes()
            changed = {
                "origin": data.replace(b'"results": [', b'"results": [7, ', 1),
                "fields": data.replace(b'"cohesion"', b'"cohesian"', 1),
                "places": data.replace(b'"rise_row": ', b'"rise_row": 9', 1),
            }[harm]
            head, _, rest = changed.partition(b"\n")
            before = len(data) - data.index(b"\n") - 1
            head = head.replace(b'"bytes": %d' % before, b'"bytes": %d' % len(rest))
            assert changed != data
            trajectory.remove("clusters")
            trajectory.write("clusters/kept", np.frombuffer(head + b"\n" + rest, np.uint8))
    again = opsig("cluster", run, *options)
    assert READ_BACK not in again.err
    assert again.out == out


def test_a_run_that_is_written_or_read_by_others_is_left_alone(opsig, run_of):
    run, options, _ = run_of
    for mode in ("r", "r+"):
        with open_trajectory(run, mode):
            others = opsig("cluster", run, *options, "--top", 20)
            assert others.code == 0, others.err
        with open_trajectory(run) as trajectory:
            assert b'"top": 20' not in trajectory.read("clusters/kept").tobytes()


def test_what_hdf5_says_of_a_damaged_file_that_is_written_ends_no_command(opsig, run_of, monkeypatch):
    def refused(*_):
        raise ValueError("Unable to synchronously create group (incorrect metadata checksum)")

    monkeypatch.setattr(kept, "_write", refused)
    run, *_ = run_of
    done = opsig("cluster", run, "--by", "loss", "--replace")
    assert done.code == 0, done.err


def test_branch_takes_groups_that_were_found(opsig, run_of, tmp_path):
    run, options, _ = run_of
    arguments = ["--from", 18, "--steps", 4, "--drop", "group:1", "--draws", 0, "-o", tmp_path / "b.h5"]
    branched = opsig("branch", run, *arguments, *options[:2])
    assert branched.code == 0, branched.err
    assert READ_BACK in branched.err


def test_what_was_mined_in_a_long_run_is_kept(opsig, run_of, monkeypatch):
    run = run_of[0]
    plain = opsig("mine", run)
    monkeypatch.setattr(mining, "LONG_BYTES", 0)
    first = opsig("mine", run)
    monkeypatch.setattr(mining, "_find", None)  # nothing is looked for again
    second = opsig("mine", run)
    assert plain.out == first.out == second.out
    with open_trajectory(run) as trajectory:
        assert trajectory.has("mined/kept")


@dataclass(frozen=True)
class Leaf:
    values: np.ndarray
    name: str | None
    pair: tuple[int, float]


@dataclass(frozen=True)
class Tree:
    leaves: list[Leaf]
    by_number: dict[int, tuple[str, ...]]
    single: float


def test_packed_values_come_back_bit_for_bit():
    arrays = [np.arange(6.0).reshape(2, 3).T, np.array(["a", "bcd"]), np.empty((0, 4), np.float32), np.array([np.nan])]
    tree = Tree([Leaf(a, None, (2, float("inf"))) for a in arrays], {3: ("x", "y")}, np.float32(0.1))  # pyright: ignore
    back = unpack(Tree, pack(tree))
    for one, other in zip(tree.leaves, back.leaves, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        assert (one.values.dtype, one.values.shape) == (other.values.dtype, other.values.shape)
    assert (back.by_number, back.single, type(back.single)) == (tree.by_number, tree.single, np.float32)


@pytest.mark.parametrize("data", [b"", b"{}\n", b'{"leaves": 3, "by_number": [], "single": 1}\n', b"[1]\n", b"nul\n"])
def test_what_is_no_packed_value_is_refused(data):
    with pytest.raises(ValueError, match="it is no Tree"):
        unpack(Tree, data)
    with pytest.raises(TypeError, match="object is not packed"):
        pack({"a": object()})
