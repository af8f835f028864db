"""Several processes that measure together: gloo on one machine."""

import os
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from conftest import TASKS, train_tiny
from opsig_torch.group import Group
from opsig_torch.serving import require_own_gpu
from together import finish, start

from opsig_cli import open_trajectory
from opsig_cli.commands.launched import Launch, launched
from opsig_cli.errors import OpsigError, UsageError

CHECK = str(TASKS.parent.parent / "together_check.py")
pytestmark = pytest.mark.timeout(900)
"""Several processes that wait for each other take many times as long where others have the processors."""
INTERRUPTED = """
import os, signal
from opsig_torch.session import TorchSession

def features(*_):
    signal.raise_signal(signal.SIGINT)

if os.environ["RANK"] == "0":
    TorchSession.features = features
from opsig_cli.main import run

run()
"""
"""The command, interrupted in the midst of what the processes share."""
ONE_LINE = "Every finished step is kept: run the same command again"


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.long), 3])
def test_every_number_has_the_same_bits_on_several_processes(count):
    ends = finish(start(count, program=(CHECK,)))
    assert [end.code for end in ends] == [0] * count, ends
    assert [end.out for end in ends] == [""] * count
    assert "refused: OpsigError: the checkpoint has 418 parameters" in ends[0].err


def test_a_command_prints_once_and_writes_the_file_of_one_process(opsig, tmp_path):
    alone, together = tmp_path / "alone.h5", tmp_path / "together.h5"
    assert opsig(*train_tiny(alone, "--chunk-size", 9, steps=20)).code == 0
    ends = finish(start(2, *train_tiny(together, "--chunk-size", 9, "--quiet", steps=20)))
    assert [end.code for end in ends] == [0, 0], ends
    assert ends[0].out
    assert ends[1].out == ends[1].err == ""
    with open_trajectory(alone) as one, open_trajectory(together) as two:
        assert np.array_equal(one.losses(), two.losses())
        assert np.array_equal(one.row("checkpoints/params", 20), two.row("checkpoints/params", 20))


def test_a_users_mistake_is_one_line_of_the_first_process():
    ends = finish(start(2, "track", "nowhere.h5"))
    assert [end.code for end in ends] == [1, 0]
    assert ends[0].err == "opsig: nowhere.h5 does not exist\n"
    assert ends[1].out == ends[1].err == ""


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_process_that_dies_ends_the_others_and_nothing_is_lost(tmp_path, opsig, victim):
    run = tmp_path / "run.h5"
    arguments = ["sharpness", run, "--at", "iterate", "--task", f"{TASKS}:Tiny", "-q"]
    assert opsig(*[a for a in train_tiny(run, "--checkpoint-every", 1) if a != "--track"]).code == 0
    processes = start(2, *arguments)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        with open_trajectory(run) as open_run:
            if len(open_run.steps("sharpness")) > 2:
                break
        time.sleep(0.05)
    os.kill(processes[victim].pid, signal.SIGKILL)
    ends = finish(processes)
    left = ends[1 - victim]
    assert left.code == 1, left
    assert left.err.count("\n") == 1, left.err
    assert ONE_LINE in left.err
    with open_trajectory(run) as open_run:
        kept = open_run.steps("sharpness").tolist()
        before = open_run.rows("sharpness/eigenvalue", 0, len(kept))
    assert 2 < len(kept) < 61
    again = opsig(*arguments)
    assert again.code == 0, again.err
    with open_trajectory(run) as open_run:
        assert len(open_run.steps("sharpness")) == 61
        assert np.array_equal(open_run.rows("sharpness/eigenvalue", 0, len(kept)), before)


def test_nobody_waits_for_a_first_process_that_was_interrupted(tmp_path, opsig):
    run = tmp_path / "run.h5"
    assert opsig(*train_tiny(run, "--checkpoint-every", 1)).code == 0
    processes = start(2, "cluster", run, "--task", f"{TASKS}:Tiny", "-q", program=("-c", INTERRUPTED))
    ends = finish(processes, timeout=200)
    assert [end.code for end in ends] == [130, 1], ends
    assert ends[1].err.splitlines()[-1].endswith(ONE_LINE)


def test_processes_know_their_place_from_torchrun_or_a_step_of_slurm():
    torchrun = {"RANK": "1", "WORLD_SIZE": "4"}
    assert launched(["track", "run.h5"], torchrun) == Launch(1, 4)
    assert launched(["track", "run.h5", "--part", "1/4", "-o", "p"], torchrun) is None
    assert launched(["track", "run.h5"], {"RANK": "0", "WORLD_SIZE": "1"}) is None
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "12"}
    assert launched(["track", "run.h5"], step) == Launch(3, 8)
    assert step["MASTER_ADDR"] == "gpu07"
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}  # the script of a job is one process, whatever it asked for
    assert launched(["track", "run.h5"], batch) is None
    with pytest.raises(UsageError, match="no numbers"):
        launched([], {"RANK": "first", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("gpus", "refused"),
    [(["a 1", "b 1"], None), (["a 1", "a 2", "a 1"], "processes 0 and 2 have the same GPU. Start as many processes")],
)
def test_two_processes_on_one_gpu_are_refused_and_those_that_each_see_one_alone_are_not(monkeypatch, gpus, refused):
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    group = SimpleNamespace(said=lambda words: [gpus[0], *gpus[1:]] if words.endswith(" 1") else [])
    with pytest.raises(OpsigError, match=refused) if refused else nullcontext():
        require_own_gpu(cast(Group, group))
