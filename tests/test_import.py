"""Checkpoints of another program become a trajectory, on which every other command works as on the original."""

import argparse
import collections
import datetime
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TASKS, start_opsig, train_tiny
from torch import nn

from opsig_cli.recorder import read_state
from opsig_cli.trajectory import open_trajectory

sys.path.insert(0, str(TASKS.parent))
from tiny import Tiny

OWN = ("--task", f"{TASKS}:Tiny")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Runs of `opsig train` by the name of their optimizer, with checkpoints every ten steps."""
    folder = tmp_path_factory.mktemp("original")
    for name, task, more in (
        ("adam", "Tiny", ("--learning-rate", 0.02, "--beta1", 0.8, "--weight-decay", 0.01)),
        ("momentum", "Tiny:norm=true", ("--learning-rate", 0.05, "--momentum", 0.7)),
    ):
        every = ("--checkpoint-every", 10, "--track-every", 10)
        arguments = train_tiny(folder / f"{name}.h5", "--optimizer", name, *every, task=task, steps=40)
        process = start_opsig(*arguments, *more)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return folder


def export(run, folder, name, task):
    """Write each checkpoint as a plain script saves it: a model under DataParallel, with torch.optim's own state."""
    with open_trajectory(run) as kept:
        stored = kept.attributes["settings_json"]
        for step in kept.steps("checkpoints").tolist():
            state = read_state(kept, step)
            model = task.model()
            vectors = {"params": torch.from_numpy(state.params)}
            nn.utils.vector_to_parameters(vectors["params"], model.parameters())
            place = 0
            for buffer in model.buffers():
                values = torch.from_numpy(state.buffers[place : place + buffer.numel()].copy())
                buffer.copy_(values.view(buffer.shape))
                place += buffer.numel()
            if name == "adam":
                betas = (stored["beta1"], stored["beta2"])
                made = torch.optim.Adam(model.parameters(), stored["learning_rate"], betas, weight_decay=0.01)
            else:
                made = torch.optim.SGD(model.parameters(), stored["learning_rate"], stored["momentum"])
            place = 0
            for parameter in model.parameters():
                for slot, row in state.optimizer.items():
                    part = torch.from_numpy(row[place : place + parameter.numel()].copy())
                    made.state[parameter][slot] = part.view(parameter.shape)
                    if name == "adam":
                        made.state[parameter]["step"] = torch.tensor(float(step))
                place += parameter.numel()
            torch.save(
                {
                    "model": nn.DataParallel(model).state_dict(), "optimizer": made.state_dict(), "epoch": step // 25,
                    "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "when": datetime.datetime.now(),
                    "rng": np.random.default_rng(0).random(3), "out": pathlib.Path("x"),
                    "meters": collections.defaultdict(list, loss=[1.0]),
                },
                folder / f"ckpt_{step}.pt",
            )  # fmt: skip


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_an_imported_run_is_the_original_to_the_bit_and_measures_the_same(opsig, original, tmp_path, name):
    spec = f"{TASKS}:Tiny" + (":norm=true" if name == "momentum" else "")
    export(original / f"{name}.h5", tmp_path, name, Tiny(norm=name == "momentum"))
    run, same = tmp_path / "run.h5", shutil.copy(original / f"{name}.h5", tmp_path / "original.h5")
    files = sorted(map(str, tmp_path.glob("*.pt")))  # ckpt_10 before ckpt_9, as a shell has them
    found = opsig("import", *files, "--task", spec, "--statistics", "chunk", "--track", "-o", run)
    assert found.code == 0, found.err
    assert [r["step"] for r in found.records] == [0, 10, 20, 30, 40]
    with open_trajectory(run) as imported, open_trajectory(same) as kept:
        for step in kept.steps("checkpoints").tolist():
            ours, theirs = read_state(imported, step), read_state(kept, step)
            np.testing.assert_array_equal(ours.params, theirs.params)
            np.testing.assert_array_equal(ours.buffers, theirs.buffers)
            assert ours.optimizer.keys() == theirs.optimizer.keys()
            for slot, row in theirs.optimizer.items():
                np.testing.assert_array_equal(ours.optimizer[slot], row)
            np.testing.assert_array_equal(imported.row("losses/loss", step), kept.row("losses/loss", step))
        held = {key: imported.attributes["settings_json"][key] for key in kept.attributes["settings_json"]}
        for key in ("optimizer", "learning_rate", "momentum", "beta1", "beta2", "epsilon", "weight_decay"):
            if key != "momentum" or name == "momentum":
                assert held[key] == kept.attributes["settings_json"][key], key
    for command in (("sharpness", "-k", 2), ("cluster",), ("sharpness", "--metrics", "critical_sharpness")):
        ours, theirs = (opsig(command[0], path, *command[1:], "--task", spec) for path in (run, same))
        assert ours.code == theirs.code == 0, ours.err
        assert theirs.records
        assert [r | {"trajectory": 0} for r in ours.records] == [r | {"trajectory": 0} for r in theirs.records]
    assert opsig("verify", run).code == 0
    assert all(not r["damaged"] for r in opsig("verify", run).records)
