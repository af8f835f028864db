"""Branches of a run: what they change, what comes along, and that nothing else differs."""

import json
import re
import shlex

import h5py
import numpy as np
import pytest
import torch
from conftest import TASKS, train_tiny
from test_train import arrays

import opsig_cli
from opsig_cli import tasks
from opsig_cli.backends import minibatch
from opsig_cli.studies.branching import effects
from opsig_cli.studies.branching.controls import drawn
from opsig_cli.trajectory.file import open_trajectory

OWN = ("--task", f"{TASKS}:Tiny")


QUADRATIC = f"{TASKS}:Quadratic"


def branch(opsig, run, *more, start=30, steps=12, task=OWN, out="branch.h5"):
    return opsig("branch", run, "--from", start, "--steps", steps, "-o", run.parent / out, *task, *more)


def own_task(name):
    return tasks.load(tasks.parse_spec(f"{TASKS}:{name}"))[0]


def own(records):
    return [r for r in records if r["kind"] == "branch" and r["control"] is None]


# -- nothing changed


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--optimizer", "momentum", "--learning-rate", "0.02", "--batch-size", "16"),
        ("--optimizer", "adam", "--learning-rate", "0.01"),
        ("--optimizer", "splitsgd", "--learning-rate", "0.02", "--batch-size", "16"),
        ("--task", f"{TASKS}:Tiny:norm=true"),
        ("--task", f"{TASKS.parent / 'partly.py'}:Head"),
        ("--task", f"{TASKS}:Tiny:norm=true", "--optimizer", "sgd", "--batch-size", "16", "--track-every", "4"),
    ],
)
def test_the_unchanged_branch_is_the_run_bit_for_bit(opsig, tmp_path, options):
    path = tmp_path / "run.h5"
    assert opsig(*train_tiny(path, "--checkpoint-every", 5, *options, steps=40)).code == 0
    task = options[:2] if "--task" in options else OWN
    found = branch(opsig, path, start=20, steps=20, task=task)
    assert found.code == 0, found.err
    assert "equals the run bit for bit, from step 20 to 40" in found.err
    assert [r["control"] for r in found.records] == ["unchanged", None]
    assert found.records[0]["replay_difference"] == 0
    whole, part = arrays(path), arrays(tmp_path / "branch.h5")
    for name in set(part) - {"sample"}:
        group = name.split("/")[0]
        if f"{group}/step" not in part:
            continue
        steps, known = part[f"{group}/step"], whole[f"{group}/step"].tolist()
        shared = [place for place, step in enumerate(steps.tolist()) if step in known]
        assert len(shared) >= 3, name
        if name == "scalars/update_norm":
            shared = shared[:-1]  # no step follows a branch's last row
        np.testing.assert_array_equal(
            part[name][shared], whole[name][[known.index(step) for step in steps[shared]]], err_msg=name
        )


def test_an_unchanged_replay_that_differs_is_said(opsig, run):
    with opsig_cli.open_trajectory(run, "r+") as file:
        row = file.row("losses/loss", 35)
        file.rewrite("losses", 35, loss=row + np.float32(0.25) * (np.arange(60) == 7))
    found = branch(opsig, run, "--drop", "label:red", "--draws", 0)
    assert found.records[0]["replay_difference"] == pytest.approx(0.25, rel=1e-3)
    assert "differ by up to 0.25 nats from step 30 to 42, first at step 35" in found.err


def test_a_branch_of_a_branch_keeps_what_was_left_out(opsig, run):
    assert branch(opsig, run, "--drop", "label:red", "--draws", 0).code == 0
    found = branch(opsig, run.parent / "branch.h5", "--drop", "label:blue", start=33, steps=6, out="second.h5")
    assert found.code == 0, found.err
    assert found.records[0]["replay_difference"] == 0
    assert found.records[1]["samples_changed"] == 20
    with h5py.File(run.parent / "second.h5") as file:
        assert np.flatnonzero(file["samples/weight"][()]).tolist() == list(range(1, 60, 3))


# -- samples left out, against descent by hand


def by_hand(run, start, steps, weights, rate, batch=None, momentum=0.0, clip=np.inf):
    """Losses (T, S) of tests/tasks/tiny.py:Quadratic trained by hand in float64 from a checkpoint."""
    task = own_task("Quadratic")
    x, y = task.x.double().numpy(), task.y.double().numpy()
    with opsig_cli.open_trajectory(run) as file:
        theta = file.row("checkpoints/params", start).astype(np.float64)
        held = file.has("checkpoints/optimizer/momentum_buffer")
        buffer = file.row("checkpoints/optimizer/momentum_buffer", start).astype(np.float64) if held else 0.0
    found = []
    for step in range(start, start + steps + 1):
        error = x @ theta[:5] + theta[5] - y
        found.append(error**2 / 2)
        chosen = np.arange(60) if batch is None else minibatch(60, batch, 0, step)
        pull = weights[chosen] * error[chosen]
        gradient = np.append(x[chosen].T @ pull, pull.sum()) / len(chosen)
        gradient *= min(1.0, clip / np.linalg.norm(gradient))
        buffer = momentum * buffer + gradient
        theta = theta - rate * buffer
    return np.array(found)


@pytest.mark.parametrize(
    ("trained", "more", "hand"),
    [
        ((), ("--drop", "label:red"), {}),
        ((), ("--drop", "3,17", "--weight", "label:blue=0.5"), {}),
        ((), ("--learning-rate", "0.03"), {"rate": 0.03}),
        ((), ("--clip-norm", "0.01"), {"clip": 0.01}),
        (("--optimizer", "sgd", "--batch-size", "16"), ("--drop", "label:red"), {"batch": 16}),
        (("--optimizer", "momentum"), ("--drop", "label:red", "--momentum", "0.5"), {"momentum": 0.5}),
    ],
)
def test_a_branch_is_the_descent_that_it_says(opsig, tmp_path, trained, more, hand):
    path = tmp_path / "run.h5"
    options = ("--task", QUADRATIC, "--learning-rate", 0.01, "--checkpoint-every", 5, *trained)
    assert opsig(*train_tiny(path, *options, steps=20)).code == 0
    assert branch(opsig, path, *more, "--draws", 0, "--track-every", 1, start=10, task=("--task", QUADRATIC)).code == 0
    weights = np.ones(60)
    if "label:red" in more:
        weights[::3] = 0
    if "3,17" in more:
        weights[[3, 17]] = 0
        weights[2::3] *= 0.5
    with h5py.File(tmp_path / "branch.h5") as file:
        losses = file["losses/loss"][()]
        kept = file["samples/weight"][()] if "samples/weight" in file else np.ones(60)
    np.testing.assert_array_equal(kept, weights)
    expected = by_hand(path, 10, 12, weights, **({"rate": 0.01} | hand))
    np.testing.assert_allclose(losses, expected, rtol=2e-4, atol=1e-5)
    assert not np.allclose(losses, by_hand(path, 10, 12, np.ones(60), 0.01, hand.get("batch")), rtol=1e-3)


def test_records_are_what_the_losses_say(opsig, run):
    found = branch(opsig, run, "--drop", "label:red", "--draws", 0)
    (record,) = own(found.records)
    with h5py.File(run) as file, h5py.File(run.parent / "branch.h5") as other:
        futures = {"": other["losses/loss"][()].astype(float), "unchanged_": file["losses/loss"][30:43].astype(float)}
        right = (other["losses/prediction"][-1] == np.arange(60) % 3).mean()
    red = np.arange(60) % 3 == 0
    for prefix, losses in futures.items():
        for name, chosen in (("largest_rise", red | True), ("rise_of_untouched", ~red)):
            rises = np.diff(losses[:, chosen].mean(1))
            assert record[prefix + name] == pytest.approx(rises.max())
            assert record[f"{prefix}{name}_step"] == 31 + rises.argmax()
        assert record[f"{prefix}final_loss"] == pytest.approx(losses[-1].mean())
        assert record[f"{prefix}loss_of_untouched"] == pytest.approx(losses[-1, ~red].mean())
        swing = np.abs(losses[2:, red] - 2 * losses[1:-1, red] + losses[:-2, red]).mean() / 2
        assert record[f"{prefix}swing_of_changed"] == pytest.approx(swing)
    assert record["accuracy"] == pytest.approx(right)
    assert (record["samples_changed"], record["from_step"], record["change"]) == (20, 30, "drop label:red")
    assert record["parent"] == str(run)
    assert record["trajectory"] == str(run.parent / "branch.h5")


def test_a_group_piped_from_cluster_is_left_out(opsig, run):
    clustered = opsig("cluster", run, "--by", "loss", "--top", 30)
    mined = [r for r in clustered.records if r["kind"] == "member" and r["mined"]]
    group = mined[0]["group"]
    members = sorted({r["sample"] for r in mined if r["group"] == group})
    stranger = min(set(range(60)) - {r["sample"] for r in mined})
    joined = json.dumps(mined[0] | {"sample": stranger, "mined": False})
    piped = opsig(
        "branch", "-", "--from", 30, "--steps", 3, "--drop", f"group:{group}", "-o", run.parent / "b.h5", *OWN,
        "--draws", 0, stdin=clustered.out + joined,
    )  # fmt: skip
    assert piped.code == 0, piped.err
    assert "opsig cluster" not in piped.err
    with h5py.File(run.parent / "b.h5") as file:
        assert np.flatnonzero(file["samples/weight"][()] == 0).tolist() == members
    lines = [line for line in clustered.out.splitlines() if json.loads(line).get("group") == group]
    some = opsig(
        "branch", "-", "--from", 30, "--steps", 3, "--drop", "-", "-o", run.parent / "c.h5", *OWN, "--draws", 0,
        stdin="\n".join(line for line in lines if json.loads(line)["kind"] == "member" and json.loads(line)["mined"]),
    )  # fmt: skip
    assert own(some.records)[0]["final_loss"] == own(piped.records)[0]["final_loss"]


def test_the_example_in_the_help_runs_as_it_stands(opsig, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert opsig(*shlex.split("train --task digits --learning-rate 0.2 --steps 50 --track -o run.h5")).code == 0
    example = re.search(r"Example: opsig (.*branch\.h5)", " ".join(opsig("branch", "--help").out.split()))
    assert example
    found = opsig(*shlex.split(example[1]))
    assert found.code == 0, found.err
    assert "groups are those of: opsig cluster run.h5" in found.err


# -- controls


def test_controls_are_as_many_others_and_of_the_same_labels():
    labels = np.array(["a", "b", "c"])[np.arange(90) % 3]
    weights = np.ones(90)
    weights[[0, 3, 6, 1]] = 0, 0.5, 0, 0
    controls, lacks = drawn(weights, labels, 4)
    assert not lacks
    assert [(c.kind, c.draw) for c in controls] == [(k, d) for k in ("random", "same labels") for d in range(1, 5)]
    for control in controls:
        assert not set(control.changed) & {0, 1, 3, 6}
        assert sorted(control.weights_S[control.changed]) == [0, 0, 0, 0.5]
        if control.kind == "same labels":
            assert sorted(labels[control.changed]) == ["a", "a", "a", "b"]
    assert len({control.weights_S.tobytes() for control in controls}) == 8
    again, _ = drawn(weights, labels, 4)
    assert all((a.weights_S == b.weights_S).all() for a, b in zip(controls, again, strict=True))


def test_a_control_that_cannot_be_drawn_is_said(opsig, run):
    found = branch(opsig, run, "--drop", "label:red", "--drop", "label:green", steps=3)
    assert "no control of as many random samples: 20 are left" in found.err
    assert "too few others have the label green" in found.err
    assert [r["control"] for r in found.records] == ["unchanged", None]


def test_each_future_is_trained_once(opsig, run, monkeypatch):
    from opsig_torch.session import TorchSession

    trained = []
    train = TorchSession.train

    def counted(self, training, start):
        trained.append(None if training.weights is None else training.weights.tobytes())
        return train(self, training, start)

    monkeypatch.setattr(TorchSession, "train", counted)
    found = branch(opsig, run, "--drop", "label:red", "--drop", "4,5", "--each", "--draws", 2, steps=3)
    assert found.code == 0, found.err
    assert len(trained) == len(set(trained)) == 1 + (1 + 2) + (1 + 4)
    assert {r["trajectory"] for r in own(found.records)} == {
        str(run.parent / "branch-drop-label-red.h5"), str(run.parent / "branch-drop-4-5.h5"),
    }  # fmt: skip
    assert [r["control"] for r in found.records[1:4]] == [None, "random", "random"]


def test_branches_from_several_checkpoints_are_files_of_their_own(opsig, run):
    found = branch(opsig, run, "--from", 45, "--drop", "3", "--draws", 0, steps=3)
    names = [r["trajectory"].rsplit("/")[-1] for r in own(found.records)]
    assert names == ["branch-from-30.h5", "branch-from-45.h5"]
    assert [r["from_step"] for r in found.records if r["control"] == "unchanged"] == [30, 45]


# -- settings


def test_smoothed_labels_are_trained_on_and_losses_stay_the_tasks(opsig, tmp_path):
    smooth = ("--task", f"{TASKS}:Smooth")
    path = tmp_path / "run.h5"
    assert opsig(*train_tiny(path, "--checkpoint-every", 5, steps=10, task="Smooth")).code == 0
    assert branch(opsig, path, "--label-smoothing", "0.2", start=5, steps=1, task=smooth).code == 0
    with opsig_cli.open_trajectory(path) as run, opsig_cli.open_trajectory(tmp_path / "branch.h5") as other:
        np.testing.assert_array_equal(other.row("losses/loss", 5), run.row("losses/loss", 5))
        theta, after = (torch.from_numpy(other.row("checkpoints/params", step)).double() for step in (5, 6))
    task = own_task("Smooth")
    x, y = task.x.double(), task.y
    theta.requires_grad_()
    w1, b1, w2, b2, w3, b3 = theta.split([80, 16, 256, 16, 48, 3])
    hidden = torch.relu((x @ w1.view(16, 5).T + b1) @ w2.view(16, 16).T + b2)
    log_p = torch.log_softmax(hidden @ w3.view(3, 16).T + b3, 1)
    target = torch.full((60, 3), 0.2 / 3, dtype=torch.float64)
    target[torch.arange(60), y] += 0.8
    (gradient,) = torch.autograd.grad(-(target * log_p).sum(1).mean(), theta)
    np.testing.assert_allclose(after, (theta - 0.5 * gradient).detach(), atol=1e-6)


def test_a_new_optimizer_begins_anew_and_can_be_resumed_to_the_same_bits(opsig, run):
    options = ("--optimizer", "adam", "--learning-rate", "0.01")
    assert branch(opsig, run, *options, steps=20).code == 0
    assert branch(opsig, run, *options, steps=10, out="half.h5").code == 0
    assert opsig("train", "-o", run.parent / "half.h5", "--resume", "--steps", 50, *OWN).code == 0
    with h5py.File(run.parent / "branch.h5") as whole, h5py.File(run.parent / "half.h5") as half:
        np.testing.assert_array_equal(half["losses/loss"][()], whole["losses/loss"][()])
        for name in ("params", "optimizer/exp_avg_sq"):
            np.testing.assert_array_equal(half["checkpoints"][name][-1], whole["checkpoints"][name][-1])
    first = arrays(run.parent / "branch.h5")
    moved = np.abs(first["checkpoints/params"][1] - first["checkpoints/params"][0])
    assert moved.max() == pytest.approx(0.02, rel=0.1)  # two first steps of Adam, of the learning rate each


def test_a_resumed_branch_keeps_its_weights(opsig, run):
    drop = ("--drop", "label:red", "--draws", 0)
    assert branch(opsig, run, *drop, steps=20).code == 0
    assert branch(opsig, run, *drop, steps=10, out="half.h5").code == 0
    assert opsig("train", "-o", run.parent / "half.h5", "--resume", "--steps", 50, *OWN).code == 0
    with h5py.File(run.parent / "branch.h5") as whole, h5py.File(run.parent / "half.h5") as half:
        np.testing.assert_array_equal(half["losses/loss"][()], whole["losses/loss"][()])


def test_a_branch_that_diverges_is_a_result(opsig, run):
    found = branch(opsig, run, "--learning-rate", 1e12, "--draws", 0)
    assert found.code == 0, found.err
    (record,) = own(found.records)
    assert 30 < record["stopped_at"] <= 42
    assert f"stops being finite at step {record['stopped_at']}" in found.err
    assert record["unchanged_final_loss"] == pytest.approx(found.records[0]["final_loss"])


def test_the_edge_gives_learning_rates_on_both_sides_of_the_sharpness(opsig, run):
    found = branch(opsig, run, "--into-edge", "--out-of-edge", "--sharpness", steps=4)
    assert found.code == 0, found.err
    value = opsig("sharpness", run, "--steps", "30", *OWN).records[0]["eigenvalue"]
    rates = {r["change"]: r["learning_rate"] for r in own(found.records)}
    assert 2 / rates["into the edge"] == pytest.approx(0.8 * value, rel=1e-3)
    assert 2 / rates["out of the edge"] == pytest.approx(2 * value, rel=1e-3)
    assert all(r["sharpness"] > 0 for r in own(found.records))
    groups = [r for r in found.records if r["kind"] == "group"]
    assert {r["change"] for r in groups} == set(rates)
    with h5py.File(run.parent / "branch-into-the-edge.h5") as file, h5py.File(run) as whole:
        clustered = opsig("cluster", run, *OWN).records
        for r in (r for r in groups if r["change"] == "into the edge"):
            members = [m["sample"] for m in clustered
                       if m["kind"] == "member" and m["mined"] and m["group"] == r["group"]]  # fmt: skip
            members = sorted(set(members))
            assert r["final_loss"] == pytest.approx(file["losses/loss"][-1, members].mean(), rel=1e-5)
            assert r["gain"] == pytest.approx(whole["losses/loss"][34, members].mean() - r["final_loss"], rel=1e-4)


def test_the_door_returns_what_the_command_prints_and_draws(opsig, run, tmp_path):
    printed = branch(opsig, run, "--drop", "label:red", "--draws", 1, "--figure", tmp_path / "b.png", steps=4).records
    found = opsig_cli.branch(
        run, from_step=30, steps=4, drop=["label:red"], draws=1, output=tmp_path / "branch.h5", replace=True,
        task=OWN[1],
    )  # fmt: skip
    assert json.loads(json.dumps(list(found).copy(), default=float).replace("NaN", "null")) == printed
    assert (tmp_path / "b.png").stat().st_size > 10_000


# -- what cannot be done


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--from", "31"), 1, ("no checkpoints at step 31", "30, 33")),
        (("--drop", "label:red", "--drop", "label:green", "--drop", "label:blue"), 2, ("no sample is left",)),
        (("--drop", "label:rde"), 1, ("no sample with the label 'rde'", "red")),
        (("--drop", "pair:99"), 1, ("has no pair 99", "Pairs:")),
        (("--drop", "group:x"), 2, ("is not a group",)),
        (("--drop", "60"), 1, ("no sample 60",)),
        (("--drop", "nobody"), 2, ("'nobody' names no samples", "label:TEXT")),
        (("--drop", "-"), 2, ("records on stdin",)),
        (("--weight", "3"), 2, ("is not NAME=W",)),
        (("--weight", "3=-1"), 2, ("is not NAME=W",)),
        (("--label-smoothing", "0.1"), 2, ("smoothed_losses",)),
        (("--label-smoothing", "1"), 2, ("below 1",)),
        (("--momentum", "0.5"), 2, ("gd has none",)),
        (("--seed", "4"), 2, ("full batch",)),
        (("--optimizer", "newton"), 2, ("no optimizer is called 'newton'",)),
        (("--batch-size", "16"), 2, ("gd is full batch",)),
        (("--optimizer", "sgd", "--batch-size", "61"), 2, ("more than the 60 samples",)),
        (("--into-edge", "--learning-rate", "1"), 2, ("Leave --learning-rate out",)),
        (("--assume", "colour=red"), 2, ("not KEY=VALUE",)),
        (("--task", f"{TASKS}:Tiny:shared=9"), 1, ("are not those of the run",)),
        (("--task", f"{TASKS}:Tiny:samples=50"), 1, ("60 samples", "50")),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(opsig, run, more, code, words):
    found = branch(opsig, run, *more, "--quiet", steps=3)
    found.fails(code, *words)
    assert not list(run.parent.glob("branch*"))


def test_a_branch_is_not_written_onto_its_run_or_another_file(opsig, run, tmp_path):
    before = run.read_bytes()
    branch(opsig, run, "--drop", "3", "--replace", out="run.h5").fails(2, "is the run itself")
    (tmp_path / "branch.h5").write_text("mine")
    branch(opsig, run, "--drop", "3").fails(1, "exists", "--replace")
    branch(opsig, run, "--drop", "3", out="none/branch.h5").fails(1, "there is no folder")
    assert run.read_bytes() == before
    assert (tmp_path / "branch.h5").read_text() == "mine"


def test_what_an_imported_run_does_not_tell_is_asked_for(opsig, tmp_path):
    torch.manual_seed(0)
    task = own_task("Tiny")
    model, x, y = task.model(), task.x, task.y
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(11):
        if step % 5 == 0:
            torch.save(model.state_dict(), tmp_path / f"model-{step}.pt")
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).double(), y).backward()
        optimizer.step()
    run = tmp_path / "run.h5"
    assert opsig("import", *(tmp_path / f"model-{s}.pt" for s in (0, 5, 10)), *OWN, "--track", "-o", run).code == 0
    branch(opsig, run, "--drop", "3", "--quiet", start=5, steps=5).fails(2, "--assume")
    known = ("--assume", "optimizer=gd", "--assume", "learning-rate=0.1")
    found = branch(opsig, run, "--drop", "3", *known, start=5, steps=5)
    assert found.code == 0, found.err
    assert found.records[0]["replay_difference"] < 1e-4
    wrong = ("--assume", "optimizer=gd", "--assume", "learning-rate=0.2")
    found = branch(opsig, run, "--drop", "3", *wrong, "--replace", start=5, steps=5)
    assert found.records[0]["replay_difference"] > 1e-3
    assert "the unchanged replay is not the run" in found.err


def test_a_branch_without_its_fork_is_not_begun_from_the_seed(opsig, run):
    assert branch(opsig, run, "--drop", "1,2,3", "--draws", 0).code == 0
    path = run.parent / "branch.h5"
    with open_trajectory(path, "r+") as file:
        file.rewind(29)
    opsig("train", "--resume", "-o", path, *OWN, "--quiet").fails(1, "no checkpoint to go on from", "opsig branch")
    assert arrays(path)["scalars/step"].size == 0


def test_a_branch_whose_loss_only_falls_is_said_never_to_rise():
    falls = {
        "change": "drop 3", "samples_changed": 1, "stopped_at": None, "rise_of_untouched": -0.004,
        "rise_of_untouched_step": 9, "unchanged_rise_of_untouched": 0.2, "unchanged_rise_of_untouched_step": 7,
    }  # fmt: skip
    controls = [{"control": "random", "rise_of_untouched": rise} for rise in (-0.01, -0.02)]
    assert effects.sentence(falls, controls) == (
        "with drop 3 (1 sample), the others' loss never rises; unchanged it rises by +0.2 (step 7); "
        "with as many random samples instead it never rises"
    )
