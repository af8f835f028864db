"""A trajectory file loses nothing that was committed: killed, cut off from power, on a full disk, many times over."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import crash
import h5py
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import create_trajectory, open_trajectory
from opsig_cli.trajectory.recorder import Recorder

SAMPLES = 300
LAYERS = 40_000  # parameters: enough for writes that go straight to the file


def row(step: int) -> np.ndarray:
    return np.random.default_rng(step).random(SAMPLES, np.float32)


def params(step: int) -> np.ndarray:
    return np.random.default_rng([step, 1]).random(LAYERS, np.float32)


def write_step(run, step: int) -> None:
    run.append("losses", step, loss=row(step), prediction=np.arange(SAMPLES) % 7)
    if step % 3 == 0:
        run.append("checkpoints", step, params=params(step))


def record_a_writer(path, steps: int) -> list[tuple]:
    with crash.recorded() as recorder:
        run = create_trajectory(path, np.arange(SAMPLES))
        run.commit()
        recorder.mark(-1)
        for step in range(steps):
            write_step(run, step)
            run.commit()
            recorder.mark(step)
        run.close()
        run = open_trajectory(path, "r+")
        for step in range(steps, steps + 3):
            write_step(run, step)
            run.commit()
            recorder.mark(step)
        run.close()
    return recorder.operations


def check(path, promised: list[int]) -> None:
    """Everything promised is there and right, nothing else is wrong, and writing can go on."""
    if not promised:
        return
    for mode in ("r", "r+"):
        with open_trajectory(path, mode) as run:
            steps = run.steps("losses").tolist()
            assert set(promised) - {-1} <= set(steps)
            for step in steps:
                np.testing.assert_array_equal(run.row("losses/loss", step), row(step))
            for step in run.steps("checkpoints").tolist():
                np.testing.assert_array_equal(run.row("checkpoints/params", step), params(step))
            if mode == "r+":
                write_step(run, 900)
    with h5py.File(path) as file:  # what is left is one plain file
        assert file["losses/step"][-1] == 900
        np.testing.assert_array_equal(file["losses/loss"][-1], row(900))
    assert not os.path.exists(f"{path}.redo")


def test_a_writer_cut_off_at_any_system_call_loses_nothing(tmp_path):
    operations = record_a_writer(tmp_path / "run.h5", 4)
    states = list(crash.kill_states(operations))
    assert len(states) > 200
    for files, promised in states[:: max(1, len(states) // 150)]:
        crash.lay_out(files, tmp_path / "cut")
        check(tmp_path / "cut" / "run.h5", promised)


def test_a_power_cut_loses_nothing(tmp_path):
    operations = record_a_writer(tmp_path / "run.h5", 4)
    for seed in range(60):
        files, promised = crash.power_loss(operations, random.Random(seed))
        crash.lay_out(files, tmp_path / "cut")
        check(tmp_path / "cut" / "run.h5", promised)


def test_the_crash_harness_can_fail(tmp_path):
    """The same power cuts do lose steps when nothing is waited for."""
    operations = [o for o in record_a_writer(tmp_path / "run.h5", 4) if o[0] != "sync"]
    lost = 0
    for seed in range(40):
        files, promised = crash.power_loss(operations, random.Random(seed))
        crash.lay_out(files, tmp_path / "cut")
        try:
            check(tmp_path / "cut" / "run.h5", promised)
        except (AssertionError, OpsigError):
            lost += 1
    assert lost > 5


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_store import *
run = open_trajectory(sys.argv[1], "r+")
for step in range(len(run.steps("losses")), 100000):
    write_step(run, step)
    run.commit()
    print(step, flush=True)
"""


def start_writer(path, **keywords) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), os.path.dirname(__file__)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords)


def test_killed_and_resumed_again_and_again(tmp_path):
    path = tmp_path / "run.h5"
    create_trajectory(path, np.arange(SAMPLES)).close()
    for _ in range(4):
        writer = start_writer(path)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.uniform(0.02, 0.3))
        writer.kill()
        written = [int(line) for line in writer.stdout.read().split("\n")[:-1] if line]
        writer.communicate()
        with open_trajectory(path) as run:
            steps = run.steps("losses").tolist()
            assert steps == list(range(len(steps)))
            assert not written or written[-1] <= steps[-1]
            assert run.damaged_steps("losses") == []
    grown = path.stat().st_size
    with create_trajectory(tmp_path / "once.h5", np.arange(SAMPLES)) as run:
        for step in steps:
            write_step(run, step)
            run.commit()
    open_trajectory(path, "r+").close()
    assert path.stat().st_size <= 1.02 * (tmp_path / "once.h5").stat().st_size
    assert grown >= path.stat().st_size


def test_a_full_disk_is_one_error_and_the_writer_can_go_on(tmp_path):
    path = tmp_path / "run.h5"
    run = create_trajectory(path, np.arange(SAMPLES))
    run.commit()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    committed = -1
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, before[1]))
        try:
            for step in range(100):
                write_step(run, step)
                run.commit()
                committed = step
        except OpsigError as error:
            assert "the disk is full" in str(error)
        assert 0 < committed < 99
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with open_trajectory(path) as reader:
        assert reader.steps("losses").tolist() == list(range(committed + 1))
    run.commit()  # there is space again
    run.close()
    check(path, list(range(committed + 2)))


# -- several processes


def test_a_second_writer_is_refused_by_name(tmp_path):
    path = tmp_path / "run.h5"
    with create_trajectory(path, np.arange(3)) as run:
        run.commit()
        with pytest.raises(OpsigError, match=f"being written by process {os.getpid()} on "):
            open_trajectory(path, "r+")
        with pytest.raises(OpsigError, match="being written"):
            create_trajectory(path, np.arange(3), replace=True)


def test_readers_see_one_state_while_a_writer_goes_on(tmp_path):
    path = tmp_path / "run.h5"
    with create_trajectory(path, np.arange(SAMPLES)) as run:
        write_step(run, 0)
        run.commit()
        write_step(run, 1)
        with open_trajectory(path) as reader, h5py.File(path) as plain:
            assert reader.steps("losses").tolist() == [0]
            assert plain["losses/step"][()].tolist() == [0]
        reader = open_trajectory(path)
        for step in range(2, 9):
            write_step(run, step)
            run.commit()  # cannot be applied while the reader is there
        assert reader.steps("losses").tolist() == [0]
        np.testing.assert_array_equal(reader.row("losses/loss", 0), row(0))
        with open_trajectory(path) as late:
            assert late.steps("losses").tolist() == list(range(9))
            np.testing.assert_array_equal(late.rows("losses/loss", 3, 5), [row(3), row(4)])
        reader.abort()
    with h5py.File(path) as plain:
        assert plain["losses/step"][()].tolist() == list(range(9))


def test_a_log_beside_another_file_is_not_applied(tmp_path):
    path = tmp_path / "run.h5"
    create_trajectory(path, np.arange(SAMPLES)).close()
    writer = start_writer(path)
    assert writer.stdout is not None
    for _ in range(5):
        writer.stdout.readline()
    writer.kill()
    writer.communicate()
    with create_trajectory(tmp_path / "other.h5", np.arange(5)) as other:
        other.append("scalars", 0, train_loss=1.0)
    os.replace(tmp_path / "other.h5", path)
    for mode in ("r", "r+"):
        with pytest.raises(OpsigError, match="is the log of another file"):
            open_trajectory(path, mode)


# -- any sequence of operations agrees with a model in memory


class Machine(RuleBasedStateMachine):
    @initialize()
    def start(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.folder.name, "run.h5")
        self.committed: dict[int, tuple] = {}
        self.pending: dict[int, tuple] = {}
        self.run = create_trajectory(self.path, np.arange(4))
        self.run.commit()

    @rule(step=st.integers(0, 30), value=st.floats(-5, 5, width=32), predicted=st.booleans())
    def append(self, step, value, predicted):
        columns = {"loss": np.full(4, value, np.float32)} | ({"prediction": np.arange(4)} if predicted else {})
        if step in self.committed or step in self.pending:
            with pytest.raises(OpsigError, match="already has losses"):
                self.run.append("losses", step, **columns)
        else:
            self.run.append("losses", step, **columns)
            self.pending[step] = (value, predicted)

    @rule()
    def commit(self):
        self.run.commit()
        self.committed |= self.pending
        self.pending = {}

    @rule()
    def abort(self):
        self.run.abort()
        self.pending = {}
        self.run = open_trajectory(self.path, "r+")

    @rule()
    def reopen(self):
        self.run.close()
        self.committed |= self.pending
        self.pending = {}
        self.run = open_trajectory(self.path, "r+")

    @precondition(lambda self: hasattr(self, "run"))
    @invariant()
    def agrees(self):
        self._compare(self.run, self.committed | self.pending)
        with open_trajectory(self.path) as reader:
            self._compare(reader, self.committed)

    def _compare(self, run, model):
        steps = run.steps("losses").tolist()
        assert steps == sorted(model)
        for step in steps:
            value, predicted = model[step]
            np.testing.assert_array_equal(run.row("losses/loss", step), np.full(4, value, np.float32))
            if run.has("losses/prediction"):
                expected = np.arange(4) if predicted else np.full(4, -1)
                np.testing.assert_array_equal(run.row("losses/prediction", step), expected)

    def teardown(self):
        if hasattr(self, "run"):
            self.run.abort()
            self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_a_file_with_two_names_takes_no_writer_and_is_read_under_both(tmp_path):
    path, other = tmp_path / "run.h5", tmp_path / "other.h5"
    with Recorder(path, 3) as recorder:
        recorder.record(0, losses=[1.0, 2.0, 3.0])
    os.link(path, other)
    for name in (path, other):
        with pytest.raises(OpsigError, match=r"has another name, too \(a hard link\).*cp .* NEW && mv NEW"):
            Recorder(name, 3, resume=True)
        with open_trajectory(name) as run:
            assert run.losses().tolist() == [[1, 2, 3]]
    os.remove(other)
    with Recorder(path, 3, resume=True) as recorder:
        recorder.record(1, losses=[1.0, 2.0, 3.0])
