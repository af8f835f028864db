"""Data in another order, or with dropout, than the run was recorded with."""

import re

import h5py
import numpy as np
import pytest
from conftest import TASKS

SHUFFLED = """
import torch
from tiny import Tiny
from torch import nn


class Shuffled(Tiny):
    '''In an order of its own, as that of a set or of a folder is in every process.'''

    def __init__(self, order=0, drop=0.0, norm=False):
        super().__init__(norm=norm)
        self.drop = drop
        if order:
            chosen = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(order))
            self.x, self.y = self.x[chosen], self.y[chosen]

    def model(self):
        model = super().model()
        return nn.Sequential(model, nn.Dropout(self.drop)) if self.drop else model

    label = None
"""


@pytest.fixture
def shuffled(tmp_path):
    (tmp_path / "shuffled.py").write_text(f"import sys\nsys.path.insert(0, {str(TASKS.parent)!r})\n{SHUFFLED}")
    return lambda options="": ("--task", f"{tmp_path / 'shuffled.py'}:Shuffled{options}")


def contents(run):
    """Every dataset's bytes and all attributes, but the commit's stamp, which opening for writing may draw anew."""
    found = {}
    with h5py.File(run) as file:
        found.update({f"@{name}": np.asarray(value).tobytes() for name, value in file.attrs.items()})
        file.visititems(lambda name, item: found.update({name: item[()].tobytes()}) if hasattr(item, "dtype") else None)
    return {name: values for name, values in found.items() if name != "commit"}


@pytest.mark.parametrize("norm", [False, True])
def test_data_in_another_order_are_found_before_anything_is_measured(opsig, tmp_path, shuffled, norm):
    run, kind = tmp_path / "run.h5", f"norm={norm}"
    train = ("--learning-rate", 0.3, "--track-every", 4, "--checkpoint-every", 2, "--steps", 22, "--chunk-size", 16)
    assert opsig("train", *shuffled(f":{kind}"), *train, "-o", run).code == 0
    again, other = shuffled(f":{kind}"), shuffled(f":order=3,{kind}")
    page = ("-o", tmp_path / "a.html")
    for command in (
        ("track", run), ("cluster", run), ("sharpness", run, "--steps", 22), ("report", run, *page),
        ("train", "-o", run, "--resume", "--steps", 24),
    ):  # fmt: skip
        reads = command[0] in ("cluster", "report")
        before = run.read_bytes() if reads else contents(run)
        refused = opsig(*command, *other)
        assert (refused.code, refused.out) == (1, "")
        assert re.search(r"sample 0 is .* was recorded as .* --allow-changed-data", refused.err.splitlines()[-1])
        assert (run.read_bytes() if reads else contents(run)) == before
        assert not (tmp_path / "a.html").exists()
    outcome = opsig("track", run, *other, "--allow-changed-data")
    assert outcome.code == 0, outcome.err
    assert "note: " in outcome.err
    assert "the loss of sample 0 is" in outcome.err
    assert opsig("train", "-o", run, "--resume", "--steps", 24, *again, "-q").code == 0
    assert opsig("sharpness", run, *again, "--steps", 24, "-q").code == 0


def test_checkpoints_in_bfloat16_are_the_same_data_still(opsig, tmp_path, shuffled):
    run = tmp_path / "run.h5"
    train = ("--learning-rate", 0.3, "--track", "--checkpoint-dtype", "bfloat16", "--steps", 20)
    assert opsig("train", *shuffled(), *train, "-o", run).code == 0
    assert opsig("sharpness", run, *shuffled(), "--steps", 20, "--tolerance", 0.1).code == 0
    opsig("sharpness", run, *shuffled(":order=3"), "--steps", 20).fails(1, "--allow-changed-data")


def test_dropout_that_full_batch_training_leaves_out_is_said(opsig, tmp_path, shuffled):
    run = ("--steps", 1, "--replace", "-o", tmp_path / "run.h5")
    assert "leaves the model's dropout out" in opsig("train", *shuffled(":drop=.5"), *run).err
    assert "model's dropout" not in opsig("train", *shuffled(), *run).err
    batches = ("--optimizer", "sgd", "--batch-size", 10)
    assert "model's dropout" not in opsig("train", *shuffled(":drop=.5"), *batches, *run).err
