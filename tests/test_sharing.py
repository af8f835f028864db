"""A run's file among others: moved, removed, replaced, read and locked by others while it is written."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
from conftest import TASKS, start_opsig, train_tiny
from test_train import arrays, assert_same_run

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import integrity, locks, recovery, store
from opsig_cli.trajectory.file import create_trajectory, open_trajectory
from opsig_cli.trajectory.recorder import Recorder

SAMPLES = 50


def row(step: int, offset: float = 0.0) -> np.ndarray:
    return np.random.default_rng(step).random(SAMPLES, np.float32) + np.float32(offset)


def make(path, steps: int, offset: float = 0.0) -> None:
    with create_trajectory(path, np.arange(SAMPLES)) as run:
        write(run, 0, steps, offset)


def write(run, first: int, last: int, offset: float = 0.0) -> None:
    for step in range(first, last):
        run.append("losses", step, loss=row(step, offset))
        run.commit()


def holds(path, steps: int, offset: float = 0.0) -> bool:
    """Whether plain h5py finds these steps and no others in the file, and nothing of a writer is left beside it."""
    with h5py.File(path) as file:
        rows = file["losses/loss"][()]
    left = [name for name in os.listdir(os.path.dirname(path)) if name.startswith(os.path.basename(path) + ".")]
    return not left and np.array_equal(rows, [row(step, offset) for step in range(steps)])


def killed(path, steps: int, offset: float = 0.0) -> None:
    """Leave a run and its log as a killed writer does that could not apply its commits."""
    child = os.fork()
    if not child:
        run = create_trajectory(path, np.arange(SAMPLES))
        reader = open_trajectory(path)
        write(run, 0, steps, offset)
        assert reader
        os._exit(9)
    os.waitpid(child, 0)


# -- the file under the writer


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_what_a_writer_recorded_outlives_its_file(tmp_path, how):
    path = tmp_path / "run.h5"
    make(tmp_path / "other.h5", 3, 9.0)
    run = create_trajectory(path, np.arange(SAMPLES))
    write(run, 0, 5)
    if how == "removed":
        path.unlink()
    else:
        os.replace(tmp_path / "other.h5", path)
    with pytest.raises(OpsigError, match=rf"was {how} .*while it was being written.* kept in .*run\.kept\.h5"):
        write(run, 5, 6)
    with pytest.raises(OpsigError, match="kept in"):  # and again: nothing is dropped without a word
        write(run, 6, 7)
    run.abort()
    assert holds(tmp_path / "run.kept.h5", 6)
    assert holds(path, 3, 9.0) if how == "replaced" else not path.exists()


def test_a_file_that_is_gone_when_its_writer_closes_is_kept_too(tmp_path):
    path = tmp_path / "run.h5"
    run = create_trajectory(path, np.arange(SAMPLES))
    write(run, 0, 5)
    path.unlink()
    with pytest.raises(OpsigError, match="removed"):
        run.close()
    assert holds(tmp_path / "run.kept.h5", 5)


def test_a_removed_folder_leaves_the_rows_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    run = create_trajectory("runs/run.h5", np.arange(SAMPLES))
    write(run, 0, 2)
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(OpsigError, match="kept in"):
        write(run, 2, 3)
    run.abort()
    assert holds(tmp_path / "run.kept.h5", 3)


@pytest.mark.parametrize("folder", [False, True])
def test_a_writer_follows_its_renamed_file(tmp_path, folder, caplog):
    (tmp_path / "a").mkdir()
    path, moved = tmp_path / "a" / "run.h5", tmp_path / ("b/run.h5" if folder else "a/good.h5")
    with create_trajectory(path, np.arange(SAMPLES)) as run:
        write(run, 0, 3)
        os.rename(*((tmp_path / "a", tmp_path / "b") if folder else (path, moved)))
        write(run, 3, 5)
        with pytest.raises(OpsigError, match="being written"):
            open_trajectory(moved, "r+")
        if not folder:
            make(path, 2, 9.0)  # the old name is free
    assert "was renamed" in caplog.text
    assert holds(moved, 5)
    assert folder or holds(path, 2, 9.0)


def test_a_removed_log_is_made_anew_with_what_only_it_had(tmp_path, caplog):
    path = tmp_path / "run.h5"
    run = create_trajectory(path, np.arange(SAMPLES))
    reader = open_trajectory(path)
    write(run, 0, 3)  # in the log alone, as somebody reads
    os.remove(f"{path}.redo")
    write(run, 3, 5)
    assert "was removed" in caplog.text
    with open_trajectory(path) as late:
        assert late.steps("losses").tolist() == list(range(5))
    reader.abort()
    run.close()
    assert holds(path, 5)


def test_two_writers_after_a_removed_log_do_not_mix(tmp_path):
    path = tmp_path / "run.h5"
    first = create_trajectory(path, np.arange(SAMPLES))
    write(first, 0, 3)
    os.remove(f"{path}.redo")
    with open_trajectory(path, "r+") as second:
        with pytest.raises(OpsigError, match=f"taken over by process {os.getpid()}.* kept in"):
            write(first, 3, 4)
        first.abort()
        write(second, 3, 5)
    assert holds(path, 5)
    assert holds(tmp_path / "run.kept.h5", 4)


def test_another_name_of_a_file_is_the_same_file_to_a_second_writer(tmp_path):
    path, link = tmp_path / "run.h5", tmp_path / "link.h5"
    os.symlink(path, link)
    run = create_trajectory(path, np.arange(SAMPLES))
    write(run, 0, 1)
    with pytest.raises(OpsigError, match="being written"):
        open_trajectory(link, "r+")
    os.link(path, tmp_path / "hard.h5")  # under which its lock is not seen
    with pytest.raises(OpsigError, match=r"has another name, too .*cp "):
        open_trajectory(tmp_path / "hard.h5", "r+")
    write(run, 1, 2)
    run.close()
    assert holds(path, 2)


# -- identity


def test_a_log_is_not_applied_to_another_run_of_the_same_shape(tmp_path, opsig):
    path = tmp_path / "run.h5"
    killed(path, 5)
    make(tmp_path / "other.h5", 5, 700.0)
    shutil.copy(tmp_path / "other.h5", path)
    opsig("verify", path).fails(1, "is the log of another file")
    for mode in ("r", "r+"):
        with pytest.raises(OpsigError, match="is the log of another file"):
            open_trajectory(path, mode)
    with pytest.raises(OpsigError, match="another file"):
        create_trajectory(path, np.arange(SAMPLES), replace=True)
    os.remove(f"{path}.redo")
    assert holds(path, 5, 700.0)


def test_a_log_is_not_applied_to_its_own_file_at_another_commit(tmp_path):
    path = tmp_path / "run.h5"
    make(path, 3)
    copies = [shutil.copy(path, tmp_path / "early.h5")]
    with open_trajectory(path, "r+") as run:
        write(run, 3, 5)
    later = shutil.copy(path, tmp_path / "later.h5")
    child = os.fork()
    if not child:
        run = open_trajectory(path, "r+")
        reader = open_trajectory(path)
        write(run, 5, 8)
        assert reader
        os._exit(9)
    os.waitpid(child, 0)
    with open_trajectory(tmp_path / "early.h5", "r+") as run:  # goes on as the run did, by other commits
        write(run, 3, 5)
    for copy in copies:
        shutil.copy(copy, path)
        with pytest.raises(OpsigError, match="is the log of another file"):
            open_trajectory(path)
    shutil.copy(later, path)  # the commit at which the log began
    open_trajectory(path, "r+").close()
    assert holds(path, 8)


def test_the_log_of_a_run_that_was_moved_away_is_not_thrown_away(tmp_path):
    path = tmp_path / "run.h5"
    killed(path, 5)
    os.rename(path, tmp_path / "moved.h5")
    with pytest.raises(OpsigError, match="holds the last steps of a run that is not here"):
        create_trajectory(path, np.arange(SAMPLES))
    os.rename(f"{path}.redo", tmp_path / "moved.h5.redo")
    open_trajectory(tmp_path / "moved.h5", "r+").close()
    assert holds(tmp_path / "moved.h5", 5)


def test_a_run_of_schema_1_0_gets_an_id_when_it_is_written(tmp_path, opsig):
    path = shutil.copy(TASKS.parent.parent / "data" / "trajectory-1.0.h5", tmp_path / "run.h5")
    with open_trajectory(path, "r+") as run:
        run.append("losses", 6, loss=np.zeros(3, np.float32))
    with open_trajectory(path) as run:
        assert run.attributes["schema_version"] == "1.1"
        run_id = run.attributes["run_id"]
        assert len(run_id) == 32
        assert run.steps("losses").tolist() == [0, 1, 2, 5, 6]
    assert opsig("repack", path).code == opsig("verify", path).code == 0
    with open_trajectory(path) as run:
        assert run.attributes["run_id"] == run_id


# -- several at a time


def test_readers_in_turn_do_not_starve_a_writer(tmp_path, monkeypatch):
    path, ends = tmp_path / "run.h5", threading.Event()
    monkeypatch.setattr(store, "BEHIND_SECONDS", 0.5)
    with create_trajectory(path, np.arange(SAMPLES)) as run:
        write(run, 0, 1)

        def read():
            while not ends.is_set():
                with open_trajectory(path) as reader:
                    steps = reader.steps("losses").tolist()
                    assert steps == list(range(len(steps)))
                    time.sleep(0.05)

        readers = [threading.Thread(target=read) for _ in range(10)]
        for reader in readers:
            reader.start()
        step, waited, applied, until = 1, 0, 0, time.monotonic() + 20
        while applied < 3 and time.monotonic() < until:
            write(run, step, step + 1)
            step += 1
            if run._store.overlay.extents:
                waited += 1
            elif waited:
                applied, waited = applied + 1, 0
            time.sleep(0.01)
        run.close()  # while they go on
        complete = holds(path, step)
        ends.set()
        for reader in readers:
            reader.join()
    assert applied == 3
    assert complete


def test_a_run_is_whole_for_others_though_a_reader_never_leaves(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store, "CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(locks, "SAY_SECONDS", 0.1)
    path = tmp_path / "run.h5"
    run = create_trajectory(path, np.arange(SAMPLES))
    write(run, 0, 2)
    reader, plain = open_trajectory(path), h5py.File(path)
    write(run, 2, 5)
    run.close()
    assert "waiting up to 0 seconds for process" in caplog.text
    assert holds(path, 5)
    assert reader.steps("losses").tolist() == plain["losses/step"][()].tolist() == [0, 1]
    np.testing.assert_array_equal(reader.row("losses/loss", 1), row(1))
    reader.abort()
    plain.close()


def test_the_log_stays_bounded_though_a_reader_never_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BEHIND_SECONDS", 0.05)
    monkeypatch.setattr(store, "LOG_BYTES", 100_000)
    path = tmp_path / "run.h5"
    longest = 0
    with create_trajectory(path, np.arange(SAMPLES)) as run:
        write(run, 0, 2)
        with open_trajectory(path) as reader:
            for step in range(2, 60):
                write(run, step, step + 1)
                longest = max(longest, os.path.getsize(f"{path}.redo"))
            assert reader.steps("losses").tolist() == [0, 1]
    assert longest < 150_000
    assert holds(path, 60)


def test_a_killed_writers_log_is_applied_though_a_reader_never_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "READER_SECONDS", 0.1)
    path = tmp_path / "run.h5"
    killed(path, 5)
    with open_trajectory(path) as reader:
        with open_trajectory(path, "r+") as run:
            write(run, 5, 7)
        assert holds(path, 7)
        assert reader.steps("losses").tolist() == list(range(5))
        np.testing.assert_array_equal(reader.row("losses/loss", 4), row(4))


@pytest.mark.parametrize("command", ["info", "repack"])
def test_a_lock_of_another_program_is_waited_for_and_named(tmp_path, command):
    path = tmp_path / "run.h5"
    make(path, 2)
    waits = "from opsig_cli.trajectory import locks; locks.LOCK_SECONDS, locks.SAY_SECONDS = 0.6, 0.2; "
    with open(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        call = f"{waits}import sys; sys.argv = ['opsig', '{command}', '{path}']; from opsig_cli.main import run; run()"
        done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=250)
    said, failed = done.stderr.splitlines()
    assert f"waiting up to 1 seconds for process {os.getpid()}" in said
    assert failed.startswith(f"opsig: {path} has been locked")
    assert done.returncode == 1


def test_a_child_that_outlives_the_writer_does_not_hold_its_lock(tmp_path):
    path = tmp_path / "run.h5"
    run = create_trajectory(path, np.arange(SAMPLES))
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    write(run, 0, 2)
    run._store.let_go()  # as a kill does
    try:
        with open_trajectory(path, "r+") as again:
            write(again, 2, 3)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert holds(path, 3)


def test_who_fails_to_open_a_run_does_not_keep_it_from_others(tmp_path):
    path = tmp_path / "run.h5"
    make(path, 1)
    with pytest.raises(OpsigError, match="recorded over 50 samples") as kept:
        Recorder(path, 7, resume=True)
    with open_trajectory(path, "r+") as run:
        write(run, 1, 2)
    assert kept
    assert holds(path, 2)


def test_nobody_writes_to_a_run_that_is_being_repacked(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    make(path, 5)
    packed = integrity.copy_packed

    def pack(run, copy):
        with pytest.raises(OpsigError, match="being written by"):
            open_trajectory(path, "r+")
        packed(run, copy)

    monkeypatch.setattr(integrity, "copy_packed", pack)
    integrity.repack(str(path), str(path))
    assert holds(path, 5)


def test_repack_leaves_a_run_that_was_written_meanwhile(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    make(path, 5)
    packed = integrity.copy_packed

    def pack(run, copy):
        packed(run, copy)
        run.abort()
        os.remove(f"{path}.redo")  # a person who thinks that it is stale
        with open_trajectory(path, "r+") as other:
            write(other, 5, 7)

    monkeypatch.setattr(integrity, "copy_packed", pack)
    with pytest.raises(OpsigError, match="was written or replaced meanwhile"):
        integrity.repack(str(path), str(path))
    assert holds(path, 7)


# -- from the command line


def test_a_run_killed_before_its_first_step_is_taken_up(tmp_path, opsig):
    whole, cut, own = tmp_path / "whole.h5", tmp_path / "cut.h5", ("--task", f"{TASKS}:Tiny")
    assert opsig(*train_tiny(whole, steps=8)).code == 0
    with open_trajectory(whole) as run:
        stated = {k: v for k, v in run.attributes.items() if k not in ("run_id", "schema_version")}
        create_trajectory(cut, run.samples, stated).abort()  # all that there is after the first commit
    assert opsig("train", "-o", cut, "--resume", *own).code == 0
    assert_same_run(whole, cut)
    os.remove(cut)
    (tmp_path / "cut.h5.redo").touch()  # before that
    outcome = opsig(*train_tiny(cut, "--resume", steps=8))
    assert "was cut off before it had its name" in outcome.err
    assert_same_run(whole, cut)
    opsig("train", "-o", tmp_path / "none.h5", "--resume", *own).fails(1, "none.h5 does not exist")


def test_a_run_with_sharpness_resumes_to_the_same_bits(tmp_path, opsig):
    own = ("--task", f"{TASKS}:Tiny")
    more = ("--checkpoint-every", 20, "--sharpness-every", 7, "--optimizer", "sgd", "--batch-size", 20)
    assert opsig(*train_tiny(tmp_path / "whole.h5", *more)).code == 0
    process = start_opsig(*train_tiny(tmp_path / "cut.h5", *more, "--commit-every", 1))
    checkpoints = 0
    while checkpoints < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
        if (tmp_path / "cut.h5").exists():
            with open_trajectory(tmp_path / "cut.h5") as run:
                checkpoints = len(run.steps("checkpoints"))
    process.kill()
    process.communicate()
    assert opsig("train", "-o", tmp_path / "cut.h5", "--resume", *own).code == 0
    assert len(arrays(tmp_path / "cut.h5")["sharpness/step"]) == 9
    assert_same_run(tmp_path / "whole.h5", tmp_path / "cut.h5")


def test_an_old_run_stays_until_its_replacement_has_begun(tmp_path, opsig):
    path = tmp_path / "run.h5"
    assert opsig(*train_tiny(path, steps=3)).code == 0
    before = arrays(path)
    for task in ("Tiny:sample=0", "NoSuchTask"):
        assert opsig(*train_tiny(path, "--replace", task=task)).code != 0
        assert before.keys() == arrays(path).keys()
