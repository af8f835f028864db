"""The floor of the valley: closed forms, the run's own steps, and where there is none."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TASKS, train_tiny

from opsig_cli import open_trajectory
from opsig_cli.analysis.valley import Valley, descend
from opsig_cli.studies import floor, tracking
from opsig_cli.trajectory.states import read_state

FLOORS = TASKS.parent / "floors.py"
OWN = ("--task", f"{TASKS}:Tiny")


def session_of(run, task):
    return tracking.open_session(run, task, "cpu", "torch", lambda text: None)[0]


def test_the_floor_of_a_quadratic_is_where_calculus_puts_it(opsig, tmp_path):
    """Along an eigenvalue a a step multiplies the distance by 1 - eta a, and the floor by (1 - eta a / 2)^2."""
    rate, task = 0.45, f"{FLOORS}:Quadratic"
    path = tmp_path / "run.h5"
    trained = opsig(
        "train", "--task", task, "--learning-rate", rate, "--steps", 12, "--checkpoint-every", 4, "-o", path
    )
    assert trained.code == 0, trained.err
    with open_trajectory(path) as run:
        session = session_of(run, task)
        for step in (0, 4, 8):
            distance = read_state(run, step).params - [1, 2, -1]
            found = floor.floor_state(run, session, step)
            expected = (1 - rate * np.array([4, 1, 0.25]) / 2) ** 2 * distance
            np.testing.assert_allclose(found.params - [1, 2, -1], expected, atol=1e-6)
            assert found.step == step + 1


@pytest.mark.parametrize("optimizer", [(), ("--optimizer", "momentum"), ("--optimizer", "adam")])
def test_the_two_steps_are_those_that_the_run_took(opsig, tmp_path, optimizer):
    """The floor from the file's consecutive checkpoints is, to the bit, the one stepped to from a single checkpoint."""
    found = []
    for every in (1, 5):
        path = tmp_path / f"{every}.h5"
        rate = 0.05 if optimizer else 0.5
        options = ("--steps", 12, "--checkpoint-every", every, "--learning-rate", rate, *optimizer)
        trained = opsig("train", *OWN, *options, "-o", path)
        assert trained.code == 0, trained.err
        with open_trajectory(path) as run:
            found.append(floor.floor_state(run, session_of(run, OWN[1]), 5))
    assert found[0].params.tobytes() == found[1].params.tobytes()
    assert found[0].optimizer.keys() == found[1].optimizer.keys()
    for name, slot in found[0].optimizer.items():
        assert slot.tobytes() == found[1].optimizer[name].tobytes()


def test_the_toy_valley_is_less_sharp_at_its_floor_as_its_formula_has_it(opsig, tmp_path):
    path = tmp_path / "valley.h5"
    assert opsig("simulate", "valley", "-o", path).code == 0
    with open_trajectory(path) as run:
        step = int(run.steps("checkpoints")[-3])
    found = opsig("sharpness", path, "--at", "floor", "--steps", step, "--tolerance", 1e-4)
    assert found.code == 0, found.err
    (record,) = found.records
    points = descend(Valley(), 0.08, step + 2)[step:]
    expected = Valley().curvature(*(points * np.array([[0.25], [0.5], [0.25]])).sum(0))[0]
    assert record["at"] == "floor"
    assert record["eigenvalue"] == pytest.approx(expected, rel=1e-4)


def test_a_run_that_alternates_is_measured_at_its_floor_and_this_is_said(opsig, tiny_run, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    found = opsig("sharpness", run, *OWN, "--steps", "30:60")
    assert "at the floor of the valley" in found.err
    assert {record["at"] for record in found.records} == {"floor"}
    iterates = opsig("sharpness", run, *OWN, "--steps", "30:60", "--at", "iterate")
    assert "floor" not in iterates.err
    assert {record["at"] for record in iterates.records} == {"iterate"}
    low, high = (np.array([r["eigenvalue"] for r in outcome.records]) for outcome in (found, iterates))
    assert np.median(low) < np.median(high)
    table = opsig("sharpness", run, *OWN, "--steps", "30:60", "--format", "table").out
    assert "at the floor of the valley" in table.splitlines()[0]


def test_gaps_in_the_losses_do_not_hide_that_a_run_alternates(tiny_run, tmp_path):
    path = Path(shutil.copy(tiny_run, tmp_path / "run.h5"))
    with open_trajectory(path, "r+") as run:
        for step in run.steps("losses").tolist()[3::5]:
            losses = run.row("losses/loss", step).copy()
            losses[::7] = np.nan
            run.rewrite("losses", step, loss=losses)
    with open_trajectory(path) as run, open_trajectory(tiny_run) as whole:
        session = session_of(run, f"{TASKS}:Tiny")
        steps = run.steps("checkpoints").tolist()[:1]
        assert floor.alternates(whole, session, steps)
        assert floor.alternates(run, session, steps)


@pytest.mark.parametrize("tracked", [True, False])
def test_a_run_below_the_edge_is_measured_at_its_iterates(opsig, tmp_path, tracked):
    path = tmp_path / "slow.h5"
    options = ("--learning-rate", 0.01, *(["--track"] if tracked else []))
    assert opsig("train", *OWN, "--steps", 40, *options, "-o", path).code == 0
    assert {record["at"] for record in opsig("sharpness", path, *OWN).records} == {"iterate"}


def test_a_run_without_losses_is_told_by_its_steps(opsig, tmp_path):
    path = tmp_path / "bounces.h5"
    assert opsig("train", *OWN, "--steps", 60, "--learning-rate", 0.5, "-o", path).code == 0
    assert {record["at"] for record in opsig("sharpness", path, *OWN, "--steps", 60).records} == {"floor"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--optimizer", "sgd", "--batch-size", 20), "batches of 20"),
        (("--optimizer", "signsgd"), "does not bounce at an edge that the Hessian decides"),
        (("--optimizer", "momentum", "--checkpoint-dtype", "bfloat16"), "lack the optimizer's state"),
    ],
)
def test_a_run_without_a_floor_is_refused_in_a_line(opsig, tmp_path, options, words):
    path = tmp_path / "run.h5"
    common = ("--steps", 10, "--checkpoint-every", 5, "--learning-rate", 0.1)
    trained = opsig("train", *OWN, *common, *options, "-o", path)
    assert trained.code == 0, trained.err
    asked = ("sharpness", path, *OWN, "--steps", 5)
    opsig(*asked, "--at", "floor").fails(1, "has no floor at step 5", words, "--at iterate")
    assert opsig(*asked).records[0]["at"] == "iterate"


def test_mistakes(opsig, tiny_run):
    opsig("sharpness", tiny_run, *OWN, "--at", "bottom").fails(2, "--at is one of floor, iterate, not 'bottom'")
    opsig("sharpness", tiny_run, *OWN, "--at", "floor", "--metrics", "curvature").fails(2, "Leave --at floor out")


def test_the_report_and_compare_speak_of_the_floor(opsig, tmp_path):
    path: Path = tmp_path / "run.h5"
    assert opsig(*train_tiny(path)).code == 0
    for place in ("iterate", "floor"):
        found = opsig("sharpness", path, *OWN, "--at", place, "--steps", "30:60").records
    most = max(record["eigenvalue"] / record["threshold"] for record in found)
    assert opsig("report", path, *OWN, "-o", tmp_path / "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "at the floor of the valley, between the iterates" in page
    assert f"{most:.2f} times the stability threshold" in page
    half = [record["eigenvalue"] / record["threshold"] for record in found]
    assert opsig("compare", path).records[0]["sharpness"] == pytest.approx(np.median(half[len(half) // 2 :]))


def test_one_step_at_the_floor_does_not_hide_what_was_measured_along_the_run(opsig, tiny_run, tmp_path):
    path = shutil.copy(tiny_run, tmp_path)
    assert opsig("sharpness", path, *OWN, "--at", "iterate").code == 0
    along = opsig("compare", path).records[0]["sharpness"]
    assert opsig("sharpness", path, *OWN, "--at", "floor", "--steps", 30).code == 0
    assert opsig("compare", path).records[0]["sharpness"] == along
