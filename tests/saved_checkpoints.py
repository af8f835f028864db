"""Checkpoints of the small task as a script saves them, and their import."""

import sys

import torch
from conftest import TASKS

from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state

sys.path.insert(0, str(TASKS.parent))
from tiny import Tiny

OWN = ("--task", f"{TASKS}:Tiny")


def save(folder, name, content, **options):
    path = folder / name
    torch.save(content, path, **options)
    return path


def weights(shift=0.0):
    """The state dict of a task's model, every tensor moved by a number."""
    torch.manual_seed(0)
    return {name: value + shift for name, value in Tiny().model().state_dict().items()}


def params_of(run, step):
    with open_trajectory(run) as kept:
        return read_state(kept, step).params


def flat(state):
    return torch.cat([value.float().reshape(-1) for value in state.values()]).numpy()


def imports(opsig, tmp_path, *arguments, task=OWN):
    """Import into a new file and return its path with the outcome."""
    run = tmp_path / "run.h5"
    outcome = opsig("import", *arguments, *task, "-o", run, "--replace")
    assert outcome.code == 0, outcome.err
    return run, outcome
