"""What an optimizer's state says it is, and what trainers logged, by hand-made files."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import TASKS

from opsig_cli.studies.importing import trainer_logs
from opsig_cli.studies.importing.optimizers import settings_of
from opsig_cli.trajectory.file import open_trajectory

sys.path.insert(0, str(TASKS.parent))
from tiny import Tiny

OWN = ("--task", f"{TASKS}:Tiny")
ADAM = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}


def kind_of(group, *state):
    states = {0: dict.fromkeys(state, 0.0)} if state else {}
    return settings_of({"state": states, "param_groups": [{"params": [0], **group}]})[0]["optimizer"]


@pytest.mark.parametrize(
    ("group", "state", "kind"),
    [
        (ADAM, (), "adam"),
        (ADAM, ("step", "exp_avg", "exp_avg_sq"), "adam"),
        (ADAM | {"decoupled_weight_decay": True, "fused": True, "initial_lr": 0.2}, (), "adam"),
        (ADAM | {"amsgrad": True}, (), "other"),
        (ADAM | {"maximize": True}, (), "other"),
        (ADAM, ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "other"),
        (ADAM, ("step", "exp_avg", "exp_avg_var"), "other"),  # AdaBelief
        (ADAM | {"caution": False}, (), "other"),
        (ADAM | {"k": 3, "r": 0.0, "weight_lr_power": 2.0, "train_mode": True}, ("z", "exp_avg_sq"), "other"),
        ({"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0}, ("exp_avg",), "other"),  # Lion
        (ADAM | {"d": 1e-6, "d0": 1e-6, "beta3": None}, (), "other"),  # Prodigy
        ({k: v for k, v in ADAM.items() if k != "amsgrad"}, ("step", "exp_avg", "exp_avg_sq"), "other"),  # RAdam
        ({k: v for k, v in ADAM.items() if k != "amsgrad"} | {"bias_correction": True}, (), "adam"),  # Apex's Adam
        ({k: v for k, v in ADAM.items() if k != "amsgrad"} | {"bias_correction": False}, (), "other"),
        (SGD, (), "momentum"),
        (SGD, ("momentum_buffer",), "momentum"),
        (SGD | {"momentum": 0.0, "dampening": 0.5}, (), "gd"),
        (SGD | {"dampening": 0.5}, (), "other"),
        (SGD | {"momentum": 0.9, "alpha": 0.9}, (), "other"),
        (SGD, ("momentum_buffer", "z"), "other"),
        ({"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "ns_steps": 5}, (), "other"),  # Muon
    ],
)
def test_an_optimizer_is_known_by_exactly_its_options_and_state(group, state, kind):
    assert kind_of(group, *state) == kind


def test_groups_of_two_optimizers_are_neither():
    groups = [{"params": [0], **ADAM}, {"params": [1], **SGD}]
    assert settings_of({"state": {}, "param_groups": groups})[0]["optimizer"] == "other"


def test_an_unknown_optimizer_at_rate_0_has_no_threshold_either():
    from opsig_cli.settings import Settings

    assert math.isnan(Settings("t", optimizer="other", learning_rate=0.0).threshold)


def trainer_folder(folder, history, step=4):
    place = folder / f"checkpoint-{step}"
    place.mkdir()
    torch.save(Tiny().model().state_dict(), place / "pytorch_model.bin")
    (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    return place


def test_a_trainer_s_log_lies_at_the_steps_that_its_values_are_of(opsig, tmp_path):
    history = [
        {"epoch": 0.1, "step": 1, "loss": 3.0, "grad_norm": 7.0, "learning_rate": 0.4},
        {"epoch": 0.2, "step": 2, "loss": 2.0, "grad_norm": 6.0, "learning_rate": 0.3},
        {"epoch": 0.4, "step": 4, "loss": 1.0, "grad_norm": 5.0, "learning_rate": 0.2},  # a mean over two steps
        {"epoch": 0.4, "step": 4, "eval_loss": 1.5},
        {"step": 4, "train_loss": 9.0, "train_runtime": 1.0},
    ]
    outcome = opsig("import", trainer_folder(tmp_path, history), *OWN, "-o", tmp_path / "run.h5")
    assert outcome.code == 0, outcome.err
    with open_trajectory(tmp_path / "run.h5") as run:
        assert run.steps("scalars").tolist() == [0, 1, 3]
        assert run.rows("scalars/learning_rate", 0, 3).tolist() == [0.4, 0.3, 0.2]
        assert run.rows("scalars/grad_norm", 0, 3).tolist() == [7.0, 6.0, 5.0]
        np.testing.assert_array_equal(run.rows("scalars/train_loss", 0, 3), [3.0, 2.0, np.nan])
        assert float(run.row("logged/loss", 4)) == 1.0
        assert float(run.row("logged/eval_loss", 4)) == 1.5
    again = opsig("import", tmp_path / "checkpoint-4", *OWN, "-o", tmp_path / "run.h5", "--append")
    assert again.code == 0, again.err


def test_older_trainers_logged_the_rate_of_the_step_that_follows():
    history = [{"step": step, "learning_rate": 0.5 - step / 10} for step in (1, 2, 3)]
    rates = {1: 0.4, 2: 0.3}  # of the optimizers in the checkpoints
    assert trainer_logs.of_trainer(history, rates) == {
        s: {"learning_rate": pytest.approx(0.5 - s / 10)} for s in (1, 2, 3)
    }
    newer = {1: 0.3, 2: 0.2}
    assert sorted(trainer_logs.of_trainer(history, newer)) == [0, 1, 2]


def test_lightning_s_metrics_lie_at_the_steps_that_they_are_of(opsig, tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,lr-Adam,step,train_loss,val_loss,acc_epoch\n"
        ",0.1,0,,,\n0,,0,3.0,,\n,0.2,1,,,\n0,,1,2.5,,\n0,,1,,2.2,0.5\n1,,2,2.0,,\n1,,3,1.5,,\n1,,3,,1.2,0.6\n"
    )
    run = tmp_path / "run.h5"
    torch.save(Tiny().model().state_dict(), tmp_path / "step2.pt")
    outcome = opsig("import", tmp_path / "step2.pt", *OWN, "-o", run, "--scalars", tmp_path / "metrics.csv")
    assert outcome.code == 0, outcome.err
    with open_trajectory(run) as kept:
        assert kept.steps("scalars").tolist() == [0, 1, 2, 3]
        assert kept.rows("scalars/train_loss", 0, 4).tolist() == [3.0, 2.5, 2.0, 1.5]
        assert kept.rows("scalars/learning_rate", 0, 2).tolist() == [0.1, 0.2]
        assert kept.steps("logged").tolist() == [2, 4]  # evaluated after the last step of each epoch
        assert kept.rows("logged/val_loss", 0, 2).tolist() == [2.2, 1.2]
        assert kept.rows("logged/acc_epoch", 0, 2).tolist() == [0.5, 0.6]


@pytest.mark.parametrize(
    ("text", "words"), [("{}", "no log_history"), ('{"log_history": []}', "empty"), ("[", "not JSON")]
)
def test_a_log_that_is_none_is_refused(opsig, tmp_path, text, words):
    (tmp_path / "trainer_state.json").write_text(text)
    torch.save(Tiny().model().state_dict(), tmp_path / "step2.pt")
    opsig(
        "import", tmp_path / "step2.pt", *OWN, "-o", tmp_path / "x.h5", "--scalars", tmp_path / "trainer_state.json"
    ).fails(1, words)


def test_two_models_in_a_list_are_one_checkpoint(opsig, tmp_path):
    state = Tiny().model().state_dict()
    torch.save([state, {"critic.weight": torch.zeros(3)}], tmp_path / "c7.pt")
    outcome = opsig("import", tmp_path / "c7.pt", *OWN, "-o", tmp_path / "x.h5")
    assert [r["step"] for r in outcome.records] == [7], outcome.err


def test_a_last_checkpoint_that_differs_is_not_dropped(opsig, tmp_path):
    state = Tiny().model().state_dict()
    torch.save({"model": state, "step": 3}, tmp_path / "c3.pt")
    torch.save({"model": {k: v + 1 for k, v in state.items()}, "step": 3}, tmp_path / "last.pt")
    run = ("import", tmp_path, *OWN, "-o", tmp_path / "x.h5", "--quiet")
    opsig(*run).fails(1, "are both at step 3")
    torch.save({"note": "another file", "model": state, "step": 3}, tmp_path / "last.pt")
    outcome = opsig("import", tmp_path, *OWN, "-o", tmp_path / "x.h5")
    assert outcome.code == 0, outcome.err
    assert "last.pt is left out: it holds the same as" in outcome.err
