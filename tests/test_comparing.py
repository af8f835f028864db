"""Runs that share their beginning: probed, projected on the first one's eigenvector, and laid over each other."""

import h5py
import numpy as np
import pytest
from conftest import TASKS, start_opsig, train_tiny

from opsig_cli.studies.probing import reversals, swings

OWN = ("--task", f"{TASKS}:Tiny")
LIKE = {
    "sgd": ("--optimizer", "sgd", "--batch-size", 300),
    "momentum": ("--optimizer", "momentum", "--batch-size", 300, "--learning-rate", 0.05),
    "adam": ("--optimizer", "adam", "--batch-size", 300, "--learning-rate", 0.003),
    "split": ("--optimizer", "splitsgd", "--batch-size", 300),
    "sign": ("--optimizer", "signsgd", "--learning-rate", 0.001),
    "flow": ("--learning-rate", 0.05, "--steps", 300, "--checkpoint-window", "290:300", "--checkpoint-every", 50),
}
STEPS = 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Full-batch descent at the edge of stability, with its sharpness, and runs from the same beginning."""
    folder = tmp_path_factory.mktemp("runs")

    def call(*arguments):
        process = start_opsig(*arguments)
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err

    base = ("--task", "digits", "--model", "mlp:width=32", "--learning-rate", 0.5, "--steps", STEPS)
    call("train", *base, "--checkpoint-every", 1, "--track", "-o", folder / "gd.h5")
    call("sharpness", folder / "gd.h5", "--at", "iterate", "--steps", "0:40")
    for name, options in LIKE.items():
        call("train", "--like", folder / "gd.h5", *options, "-o", folder / f"{name}.h5")
    return folder


def test_reversals_count_successive_steps_only():
    steps = np.array([0, 1, 2, 3, 4, 9, 10])
    zigzag = np.array([0, 1, 0, 1, 0, 1, 0.0])
    assert reversals(steps, zigzag, 0) == (1.0, 3)
    assert reversals(steps, np.arange(7.0), 0) == (0.0, 3)
    assert reversals(steps, zigzag, 2) == (1.0, 1)
    assert reversals(np.arange(0, 14, 2), zigzag, 0) == (None, 0)


def test_a_swing_goes_up_and_down_again():
    up, down = [0.5, 0.5], [0.3, 0.7]
    assert swings(np.array([[up], [down], [up]])).tolist() == [True]
    assert swings(np.array([[up], [down], [[0.1, 0.9]]])).tolist() == [False]
    assert swings(np.array([[up], [[0.52, 0.48]], [up]])).tolist() == [False]


def test_descent_and_sgd_reverse_and_momentum_and_adam_do_not(opsig, runs, tmp_path):
    others = [word for name in ("sgd", "momentum", "adam") for word in ("--against", runs / f"{name}.h5")]
    found = opsig("probe", runs / "gd.h5", "--projection", *others, "--figure", tmp_path / "p.png")
    assert found.code == 0, found.err
    share = {r["optimizer"]: r["reversals"] for r in found.records if r["kind"] == "summary"}
    assert share["gd"] >= 2 / 3
    assert share["sgd"] >= 2 / 3
    assert share["momentum"] <= 0.4
    assert share["adam"] <= 0.4
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_projections_are_inner_products_with_the_eigenvector(opsig, runs):
    records = opsig("probe", runs / "gd.h5", "--projection", "--against", runs / "sgd.h5").records
    start = records[0]["crossing_step"]
    with h5py.File(runs / "gd.h5") as file, h5py.File(runs / "sgd.h5") as other:
        eigenvalues, thresholds = file["sharpness/eigenvalue"][:, 0], file["sharpness/threshold"][()]
        assert start == np.flatnonzero(eigenvalues > thresholds)[0] > 0
        direction, origin = file["sharpness/eigenvector"][start], file["checkpoints/params"][start]
        expected = (other["checkpoints/params"][()].astype(float) - origin) @ direction
    found = [r["projection"] for r in records if r["kind"] == "iterate" and "sgd" in r["trajectory"]]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    turned = np.diff(expected[start:])
    (summary,) = (r for r in records if r["kind"] == "summary" and "sgd" in r["trajectory"])
    assert summary["reversals"] == pytest.approx((turned[1:] * turned[:-1] < 0).mean())


def test_adams_effective_step_is_how_far_it_went(opsig, runs):
    records = opsig("probe", runs / "gd.h5", "--projection", "--against", runs / "adam.h5").records
    rows = [r for r in records if r["kind"] == "iterate" and "adam" in r["trajectory"]]
    moved = np.abs(np.diff([r["projection"] for r in rows]))
    assert "effective_step" not in rows[0]
    np.testing.assert_allclose([r["effective_step"] for r in rows[1:]], moved, rtol=1e-2, atol=2e-7)
    with h5py.File(runs / "adam.h5") as file, h5py.File(runs / "gd.h5") as first:
        second = file["checkpoints/optimizer/exp_avg_sq"][20] / (1 - 0.999**20)
        direction = first["sharpness/eigenvector"][rows[0]["crossing_step"]]
    expected = abs((0.003 / (np.sqrt(second) + 1e-8)) @ direction)
    assert rows[20]["step_size_along"] == pytest.approx(expected, rel=1e-4)


def test_reversals_without_successive_checkpoints_are_not_guessed(opsig, runs):
    found = opsig("probe", runs / "gd.h5", "--projection", "--against", runs / "flow.h5", "--steps", "0:250")
    summary = [r for r in found.records if r["kind"] == "summary"][-1]
    assert (summary["reversals"], summary["counted"]) == (None, 0)
    assert "--checkpoint-window" in found.err


def test_a_probe_says_when_it_oscillates(opsig, runs, tmp_path):
    options = ("--input", "color:white", "--input", "sample:5", "--figure", tmp_path / "p.png")
    records = opsig("probe", runs / "gd.h5", *options).records
    white = [r for r in records if r["input"] == "color:white"]
    assert [r["oscillating"] for r in white[:2]] == [None, None]
    probabilities = np.array([r["probabilities"] for r in white])
    expected = [
        bool(((b - a) * (c - b) < 0)[np.minimum(abs(b - a), abs(c - b)) > 0.05].any())
        for a, b, c in zip(probabilities, probabilities[1:], probabilities[2:], strict=False)
    ]
    assert [r["oscillating"] for r in white[2:]] == expected
    assert any(expected)
    assert not all(expected)
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_probes_of_two_runs_share_their_time(opsig, runs, tmp_path):
    options = ("--input", "color:white", "--against", runs / "flow.h5", "--figure", tmp_path / "p.png")
    records = opsig("probe", runs / "gd.h5", *options).records
    at = {(r["trajectory"], r["step"]): r for r in records}
    slow, fast = at[str(runs / "flow.h5"), 50], at[str(runs / "gd.h5"), 5]
    assert slow["time"] == fast["time"] == 2.5
    assert slow["feature_norm"] == pytest.approx(fast["feature_norm"], rel=0.05)  # both near the gradient flow
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_every_step_of_a_window_has_a_checkpoint(opsig, runs, tmp_path):
    with h5py.File(runs / "flow.h5") as file:
        assert file["checkpoints/step"][()].tolist() == [0, 50, 100, 150, 200, 250, *range(290, 301)]
    run = tmp_path / "run.h5"
    opsig(*train_tiny(run, "--checkpoint-every", 30, "--checkpoint-window", "58:", steps=60))
    again = opsig("train", "-o", run, *OWN, "--resume", "--steps", 62)
    assert again.code == 0, again.err
    with h5py.File(run) as file:
        assert sorted(file["checkpoints/step"]) == [0, 30, 58, 59, 60, 61, 62]
    opsig(*train_tiny(tmp_path / "x.h5", "--checkpoint-window", "9")).fails(2, "--checkpoint-window", "A:B")


def test_signsgd_moves_every_parameter_by_the_same_length(runs):
    with h5py.File(runs / "sign.h5") as file:
        moves = np.diff(file["checkpoints/params"][()], axis=0)
        signed = file["scalars/signed_fraction"][()]
    sizes = np.abs(moves)
    assert (np.isclose(sizes, 0.001, rtol=1e-3) | (sizes == 0)).all()
    np.testing.assert_allclose(signed[:-1], (sizes > 0).mean(1), atol=1e-6)


def test_runs_are_compared_by_what_they_hold(opsig, runs, tmp_path):
    paths = [runs / f"{name}.h5" for name in ("gd", "sgd", "split", "flow")]
    found = opsig("compare", *paths, "--figure", tmp_path / "c.png", "--test", "digits")
    assert found.code == 0, found.err
    gd, sgd, split, flow = found.records
    with h5py.File(paths[0]) as file:
        losses, predictions = file["losses/loss"][()], file["losses/prediction"][()]
        label = file["samples/label"].asstr()[()].astype(int)
        sharpness = file["sharpness/eigenvalue"][:, 0] / file["sharpness/threshold"][()]
    assert gd["loss"] == pytest.approx(losses[-1].mean(dtype=float), rel=1e-6)
    assert gd["accuracy"] == pytest.approx((predictions[-1] == label).mean())
    rising = (np.diff(losses, axis=0) > 0).mean(1)
    assert gd["rising"] == pytest.approx(np.median(rising[STEPS // 2 :]))
    assert gd["sharpness"] == pytest.approx(np.median(sharpness[20:]))
    assert gd["test_accuracy"] == pytest.approx(gd["accuracy"])
    with h5py.File(paths[2]) as file:
        assert split["signed_fraction"] == pytest.approx(np.median(file["scalars/signed_fraction"][STEPS // 2 : STEPS]))
    assert (split["sign_learning_rate"], gd["sign_learning_rate"]) == (0.001, None)
    assert (sgd["optimizer"], sgd["batch_size"], flow["learning_rate"]) == ("sgd", 300, 0.05)
    assert flow["steps"] == 300
    assert (tmp_path / "c.png").stat().st_size > 10_000
    opsig("compare", runs / "gd.h5", runs / "none.h5").fails(1, "none.h5")
    opsig("compare", runs / "gd.h5", "--test", "chebyshev").fails(2, "--test chebyshev")


def test_a_run_like_one_of_your_own_task_needs_it_named_again(opsig, tiny_run, tmp_path):
    opsig("train", "--like", tiny_run, "-o", tmp_path / "x.h5").fails(1, "a task of your own", "--task")
    assert not (tmp_path / "x.h5").exists()


def test_a_part_of_the_images_can_be_held_out(opsig, tmp_path):
    from opsig_zoo import FashionMnist

    whole, part = FashionMnist(size=14), FashionMnist(size=14, start=4000, samples=10)
    np.testing.assert_array_equal(part.pixels, whole.pixels[4000:4010])
    np.testing.assert_array_equal(part.labels, whole.labels[4000:4010])
    opsig("train", "--task", "fashion-mnist:start=5000", "-o", tmp_path / "x.h5").fails(2, "between 0 and 4999")
