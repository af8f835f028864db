"""What people's own training scripts leave behind: schedules, minibatches, several groups, odd tensors."""

import csv
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import TASKS

from opsig_cli.trajectory.file import open_trajectory
from opsig_cli.trajectory.states import read_state

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


def test_a_run_whose_batch_size_is_not_told_is_not_held_to_be_full_batch(opsig, tmp_path):
    files = train(tmp_path, sgd(momentum=0.9), batch=10)
    arguments = (*files, "--scalars", tmp_path / "log.csv", "--track")
    run, outcome = imports(opsig, tmp_path, *arguments)
    assert len(outcome.records) == 3  # the mean of all losses is not the loss of a minibatch, and need not be
    assert "do not say the batch size" in outcome.err
    opsig("train", "-o", run, "--resume", *OWN).fails(1, "does not tell its batch size", "--batch-size")
    opsig("train", "-o", tmp_path / "y.h5", "--like", run, *OWN).fails(2, "Give --batch-size")
    assert opsig("report", run, *OWN, "-o", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "batch size not known" in page
    assert "full batch" not in page
    (record,) = opsig("compare", run).records
    assert record["batch_size"] is None
    run, outcome = imports(opsig, tmp_path, *arguments, "--batch-size", 10)
    assert "batch size" not in outcome.err
    assert settings(run)["batch_size"] == 10
    again = opsig("import", *arguments, "--batch-size", "full", *OWN, "-o", run, "--replace", "--quiet")
    again.fails(1, "the task's mean loss is", "training logged")
    opsig("import", *files, *OWN, "-o", tmp_path / "x.h5", "--batch-size", "all").fails(2, "a number or 'full'")
    opsig("import", *files, *OWN, "-o", tmp_path / "x.h5", "--batch-size", "0").fails(2, "a number or 'full'")


def test_a_full_batch_run_that_is_said_to_be_one_is_held_against_its_log_and_goes_on(opsig, tmp_path):
    files = train(tmp_path, sgd(momentum=0.9))
    run, _ = imports(opsig, tmp_path, *files, "--scalars", tmp_path / "log.csv", "--track", "--batch-size", "full")
    assert settings(run)["batch_size"] is None
    assert opsig("train", "-o", run, "--resume", "--steps", 4, *OWN).code == 0


def two_groups(kind, **options):
    def make(model):
        weights = [p for p in model.parameters() if p.ndim >= 2]
        biases = [p for p in model.parameters() if p.ndim < 2]
        extra = [torch.nn.Parameter(torch.zeros(1)) for _ in range(9)]  # many and small: counted by numbers, not names
        return kind([{"params": [*biases, *extra], "weight_decay": 0.0, "lr": 0.5}, {"params": weights}], **options)

    return make


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_of_several_groups_the_one_with_most_numbers_is_taken_and_what_differs_is_said(opsig, tmp_path, kind):
    files = train(tmp_path, two_groups(kind, lr=0.01, weight_decay=0.1))
    run, outcome = imports(opsig, tmp_path, *files)
    assert "learning rates 0.01 to 0.5; that of most parameters, 0.01, is taken" in outcome.err
    assert "weight decays 0 to 0.1" in outcome.err
    assert settings(run)["learning_rate"] == 0.01
    assert settings(run)["weight_decay"] == (0.1 if kind is torch.optim.Adam else 0)
    assert ("AdamW's weight decay of 0.1" in outcome.err) == (kind is torch.optim.AdamW)


def test_a_decay_of_which_a_file_does_not_say_whether_it_is_adamw_s_is_left_out(opsig, tmp_path):
    files = train(tmp_path, lambda model: torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    for file in files:
        content = torch.load(file)
        del content["optimizer"]["param_groups"][0]["decoupled_weight_decay"]  # as torch wrote it before 2.7
        torch.save(content, file)
    run, outcome = imports(opsig, tmp_path, *files)
    assert "does not say whether its weight decay of 0.1 is AdamW's" in outcome.err
    assert settings(run)["weight_decay"] == 0
    run, outcome = imports(opsig, tmp_path, *files, "--weight-decay", 0.1)
    assert settings(run)["weight_decay"] == 0.1


def thresholds(opsig, run, *metrics):
    found = opsig("sharpness", run, *OWN, *metrics)
    assert found.code == 0, found.err
    return [r["threshold"] for r in found.records], found.err


def test_nesterov_s_threshold_is_its_own(opsig, tmp_path):
    files = train(tmp_path, sgd(momentum=0.9, nesterov=True))
    run, outcome = imports(opsig, tmp_path, *files, "--batch-size", "full")
    assert "nesterov" in outcome.err
    assert thresholds(opsig, run)[0] == pytest.approx([3.8 / 2.8 / 0.05] * 3)
    opsig("train", "-o", run, "--resume", *OWN).fails(1, "nesterov")
    run, _ = imports(opsig, tmp_path, *files, "--optimizer", "momentum", "--momentum", 0.9)
    assert thresholds(opsig, run)[0] == pytest.approx([3.8 / 0.05] * 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01),
        lambda model: torch.optim.NAdam(model.parameters(), lr=0.01),
        lambda model: torch.optim.RAdam(model.parameters(), lr=0.01),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, dampening=0.5),
    ],
)
def test_of_an_optimizer_that_is_not_known_no_threshold_is_made_up(opsig, tmp_path, make):
    files = train(tmp_path, make)
    run, outcome = imports(opsig, tmp_path, *files)
    assert "thresholds are left out. --optimizer" in outcome.err
    assert thresholds(opsig, run)[0] == [None] * 3
    found, err = thresholds(opsig, run, "--metrics", "critical_sharpness")
    assert found == [None] * 3
    assert "does not hold the optimizer's update" in err
    opsig("train", "-o", run, "--resume", *OWN).fails(1, "optimizer")
    run, _ = imports(opsig, tmp_path, *files, "--optimizer", "gd")
    assert thresholds(opsig, run)[0] == pytest.approx([200.0] * 3)


def test_names_of_parameters_in_the_optimizer_say_the_order(opsig, tmp_path):
    """Two groups with like shapes, which cannot be told apart, unless torch was given names."""
    torch.manual_seed(0)
    model = Tiny().model()
    named = list(model.named_parameters())
    made = torch.optim.SGD([{"params": named[::-2]}, {"params": named[-2::-2]}], lr=0.1, momentum=0.9)
    model(Tiny().x).square().sum().backward()
    made.step()
    torch.save({"model": model.state_dict(), "optimizer": made.state_dict()}, tmp_path / "c1.pt")
    run, _ = imports(opsig, tmp_path, tmp_path / "c1.pt")
    expected = torch.cat([made.state[p]["momentum_buffer"].reshape(-1) for p in model.parameters()])
    with open_trajectory(run) as kept:
        np.testing.assert_array_equal(read_state(kept, 1).optimizer["momentum_buffer"], expected.numpy())


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


def test_an_interruption_before_anything_is_written_does_not_advise_to_append(opsig, tmp_path, monkeypatch):
    from opsig_cli.studies.importing import flow

    def interrupted(*_):
        raise KeyboardInterrupt

    file = save(tmp_path, "c1.pt", weights())
    monkeypatch.setattr(flow, "glance", interrupted)
    run = tmp_path / "run.h5"
    for before in (False, True):  # with --replace, a file that is there is the old one
        run.write_bytes(b"old") if before else None
        outcome = opsig("import", file, *OWN, "-o", run, "--replace")
        assert outcome.code == 130
        assert "--append" not in outcome.err
        assert "nothing was written" in outcome.err
        assert run.exists() == before


def test_control_c_while_losses_are_tracked_keeps_the_checkpoints(opsig, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        TASKS.read_text() + "\n\nclass Slow(Tiny):\n    def losses(self, model, batch):\n        import time\n"
        "        time.sleep(1)\n        return super().losses(model, batch)\n"
    )
    files = [str(save(tmp_path, f"c{step}.pt", weights())) for step in range(40)]
    run = tmp_path / "run.h5"
    command = [
        sys.executable,
        "-m",
        "opsig_cli.main",
        "import",
        *files,
        "--task",
        f"{slow}:Slow",
        "--track",
        "-o",
        str(run),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not run.exists() or os.path.getsize(run) < 30_000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 130, err
    assert "--append" in err
    assert opsig("info", run).records[0]["checkpoints"] == 40


def test_a_checkpoint_that_was_compressed_is_refused_and_not_read_as_it_lies(opsig, tmp_path):
    save(tmp_path, "whole.pt", {"model": weights()})
    deflated = zipfile.ZipFile(tmp_path / "c1.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, deflated as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    opsig("import", tmp_path / "c1.pt", *OWN, "-o", tmp_path / "x.h5").fails(1, "c1.pt holds compressed tensors")


def test_a_torchscript_program_is_called_one(opsig, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Tiny().model(), Tiny().x), tmp_path / "c1.pt")
    opsig("import", tmp_path / "c1.pt", *OWN, "-o", tmp_path / "x.h5").fails(1, "c1.pt is a TorchScript program")
