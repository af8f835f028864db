"""What people's own training scripts leave behind: schedules, minibatches, several groups, odd tensors."""

import csv
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import TASKS

from opsig_cli.trajectory import open_trajectory

sys.path.insert(0, str(TASKS.parent))
from tiny import Tiny

OWN = ("--task", f"{TASKS}:Tiny")


def imports(opsig, tmp_path, *arguments, task=OWN):
    """Import into a new file and return its path with the outcome."""
    run = tmp_path / "run.h5"
    outcome = opsig("import", *arguments, *task, "-o", run, "--replace")
    assert outcome.code == 0, outcome.err
    return run, outcome


def train(folder, make, steps=3, batch=None, **more):
    """Train Tiny as a plain script does; returns checkpoints, saved before every step, beside a log of losses."""
    torch.manual_seed(0)
    task = Tiny()
    model = task.model()
    made = make(model)
    log = []
    for step in range(steps):
        torch.save({"model": model.state_dict(), "optimizer": made.state_dict(), **more}, folder / f"c{step}.pt")
        chosen = slice(None) if batch is None else slice(step * batch, (step + 1) * batch)
        loss = task.losses(model, (task.x[chosen], task.y[chosen])).mean()
        made.zero_grad()
        loss.backward()
        made.step()
        log.append((step, loss.item()))
    with open(folder / "log.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *log])
    return sorted(map(str, folder.glob("c*.pt")))


def sgd(**options):
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.05, **options)


def settings(run):
    with open_trajectory(run) as kept:
        return kept.attributes["settings_json"]


def two_groups(kind, **options):
    def make(model):
        weights = [p for p in model.parameters() if p.ndim >= 2]
        biases = [p for p in model.parameters() if p.ndim < 2]
        extra = [torch.nn.Parameter(torch.zeros(1)) for _ in range(9)]  # many and small: counted by numbers, not names
        return kind([{"params": [*biases, *extra], "weight_decay": 0.0, "lr": 0.5}, {"params": weights}], **options)

    return make


def thresholds(opsig, run, *metrics):
    found = opsig("sharpness", run, *OWN, *metrics)
    assert found.code == 0, found.err
    return [r["threshold"] for r in found.records], found.err


def save(folder, name, content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, folder / name)
    return folder / name


def weights(change=lambda value: value):
    torch.manual_seed(0)
    return {name: change(value) for name, value in Tiny().model().state_dict().items()}


def test_tensors_of_odd_kinds_beside_the_weights_are_passed_over(opsig, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of a prototype
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    odd = {"meta": torch.empty(1, device="meta"), "nested": nested, "sparse": torch.ones(1).to_sparse(),
           "large": torch.zeros(1).expand(10**9, 10**6)}  # fmt: skip
    file = save(tmp_path, "c7.pt", {"model": weights(), "step": torch.empty(1, device="meta"), **odd})
    _, outcome = imports(opsig, tmp_path, file)
    assert [r["step"] for r in outcome.records] == [7]


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64])
def test_weights_that_are_not_real_numbers_are_refused(opsig, tmp_path, kind):
    file = save(tmp_path, "c7.pt", {"model": weights(lambda value: value.to(kind))})
    opsig("import", file, *OWN, "-o", tmp_path / "x.h5", "--quiet").fails(
        1, f"c7.pt holds 0.weight in {str(kind).removeprefix('torch.')}", "not weights"
    )


def test_weights_without_data_are_none(opsig, tmp_path):
    file = save(tmp_path, "c7.pt", {"model": weights(lambda value: value.to("meta"))})
    opsig("import", file, *OWN, "-o", tmp_path / "x.h5").fails(1, "c7.pt holds no tensors")


def test_options_of_the_script_are_no_step(opsig, tmp_path):
    more = {"args": {"steps": 10000, "step": 30, "iter": 9}, "scheduler": {"step_size": 3}, "epochs": 90}
    file = save(tmp_path, "model_0100.pth", {"model": weights(), **more})
    _, outcome = imports(opsig, tmp_path, file)
    assert "step 100 is taken from the names" in outcome.err


def test_epochs_are_said_to_be_no_steps(opsig, tmp_path):
    files = [save(tmp_path, f"epoch_{epoch}.pt", weights()) for epoch in (1, 2)]
    _, outcome = imports(opsig, tmp_path, *files)
    assert "steps 1 to 2 are taken from the epochs in the names" in outcome.err
    assert "epochs, not optimizer steps" in outcome.err
    files = [save(tmp_path, f"{name}.pt", {"model": weights(), "epoch": i}) for i, name in enumerate("ab")]
    _, outcome = imports(opsig, tmp_path, *files)
    assert "epochs, not optimizer steps" in outcome.err


def test_gradients_beside_the_weights_are_not_taken_for_them(opsig, tmp_path):
    file = save(tmp_path, "c7.pt", {"grads": weights(torch.zeros_like), "init": weights(), "model_now": weights()})
    _, outcome = imports(opsig, tmp_path, file)
    assert "the model's weights lie under model_now." in outcome.err


def test_only_the_arrays_that_are_asked_for_are_read_from_a_table_of_losses(opsig, tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "l.npz", losses=np.ones((3, 4)), other=np.zeros(3))
    loaded = np.lib.npyio.NpzFile.__getitem__
    seen = []
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: seen.append(key) or loaded(self, key))
    assert opsig("import", "--losses", tmp_path / "l.npz", "-o", tmp_path / "x.h5").code == 0
    assert seen == ["losses"]
