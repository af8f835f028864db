"""The linear model and the valley, against values derived independently and, through the command line, to 1e-6."""

import numpy as np
import pytest

from opsig_cli.analysis.linear_model import Problem, gradient_flow, population_descent, sampled_descent
from opsig_cli.analysis.valley import Valley, descend

FLOW = [  # d1, d2, alpha, B, lambda(0), t1, lambda_min, time of it, time at 5/8 alpha B, bound on t1
    (10, 20, 25, 5, 62.1880071, 0.0602627508, 17.9390564, 0.104184, 0.39181715, 0.0916),
    (10, 20, 100, 5, 247.672151, 0.0350149836, 43.5331106, 0.0524588, 0.404780539, 0.0916),
    (10, 20, 1000, 5, 2474.96351, 0.00750901519, 344.261809, 0.0098036, 0.410159092, 0.0916),
    (20, 100, 1000, 10, 2744.40576, 0.0109998924, 187.181699, 0.0150632, 0.278773077, 0.0805),
    (50, 100, 400, 8, 990.102114, 0.0144959497, 143.68824, 0.0196010, 0.302683204, 0.0866),
]


def linear(opsig, *options):
    outcome = opsig("simulate", "linear", *options)
    assert outcome.code == 0, outcome.err
    return outcome.records[0]


@pytest.mark.parametrize("row", FLOW)
def test_gradient_flow_has_the_reference_values(opsig, row):
    d1, d2, alpha, size, initial, t1, lowest, time, bound_time, bound = row
    found = linear(opsig, "--d1", d1, "--d2", d2, "--alpha", alpha, "--beta-norm", size)
    assert found["sharpness_initial"] == pytest.approx(initial, rel=1e-6)
    assert found["t1"] == pytest.approx(t1, rel=1e-6)
    assert found["sharpness_min"] == pytest.approx(lowest, rel=1e-6)
    assert found["time_of_min"] == pytest.approx(time, rel=1e-3)
    assert found["time_of_bound"] == pytest.approx(bound_time, rel=1e-6)
    assert found["t1_bound"] == pytest.approx(bound, abs=5e-5)
    assert found["sharpness_final"] == max(alpha, 2) * size
    assert found["theorem_3_1"]["t1_within_bound"]
    assert found["theorem_3_2"]["sharpness_rises_to_5_8_alpha_b"]


def test_the_flow_at_a_given_time():
    flow = gradient_flow(Problem(10, 20, 100, 5))
    expected = [1.721552473, 0.3278367616, -103.0560792, 1.752489617]
    np.testing.assert_allclose(flow.state(2 / 5), expected, rtol=1e-7)
    assert flow.loss(2 / 5) == pytest.approx(52.13118154, rel=1e-8)
    assert flow.sharpness(2 / 5) == pytest.approx(307.1219859, rel=1e-7)


def test_the_flow_keeps_its_invariant():
    flow = gradient_flow(Problem(10, 20, 100, 5))
    for time in (0.01, 0.1, 1.0):
        epsilon, delta, ln_o, c = flow.state(time)
        assert c**2 - epsilon**2 - delta**2 - np.exp(ln_o) == pytest.approx(0, abs=1e-9)


def test_a_theorem_that_does_not_hold_is_said_not_to_hold(opsig):
    found = linear(opsig, "--d1", 10, "--d2", 20, "--alpha", 1, "--beta-norm", 5)
    assert found["sharpness_initial"] == pytest.approx(6.03, abs=0.01)
    assert not found["theorem_3_1"]["initial_sharpness_between_alpha_and_3_alpha"]
    assert not found["theorem_3_1"]["assumption_alpha"]


DESCENT = [  # eta, lambda_min, its step, step crossing 2/eta, peak |cq|, its step, final lambda
    (0.002, 40.6, 26, None, None, None, 498.486),
    (0.0042, 36.9, 12, 165, 0.158, 1570, 471.79),
    (0.0048, 35.70, 11, 113, 0.6408, 411, 410.155),
    (0.006, 32.8, 9, 76, 1.436, 188, 318.126),
    (0.008, 25.3, 5, 51, 2.33, 106, 248.74),
]


@pytest.mark.parametrize("row", DESCENT)
def test_population_descent_has_the_reference_values(opsig, row):
    eta, lowest, when, crossing, peak, peak_step, final = row
    steps = 4000 if eta < 0.0048 else 2000
    found = linear(opsig, "--dynamics", "gd", "--learning-rate", eta, "--steps", steps)
    assert found["sharpness_min"] == pytest.approx(lowest, rel=2e-3)
    assert found["time_of_min"] == when
    assert found["crossing_step"] == crossing
    if peak is not None:
        assert found["peak_feature"] == pytest.approx(peak, rel=2e-3)
        assert found["peak_step"] == peak_step
    assert found["sharpness_final"] == pytest.approx(final, rel=1e-4)


def test_population_descent_step_by_step():
    found = population_descent(Problem(10, 20, 100, 5), 0.0048, 1000)
    q = found.q_sign * np.exp(found.q_log)
    np.testing.assert_allclose(
        [found.epsilon[10], q[10], found.c[10]], [0.3301501295, 0.0788648194, 0.5776075034], rtol=1e-8
    )
    np.testing.assert_allclose(
        [found.epsilon[411], abs(q[411]), found.c[411]], [2.250709033, 0.3140646488, 2.040488266], rtol=1e-6
    )
    np.testing.assert_allclose([found.epsilon[1000], found.c[1000]], [2.468856188, 2.025229345], rtol=1e-6)
    assert (found.feature[390:411] * found.feature[391:412] < 0).all()


def test_a_diverging_run_is_a_result(opsig):
    found = linear(opsig, "--dynamics", "gd", "--learning-rate", 0.014, "--steps", 500)
    assert found["diverged_at"] is not None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampled_descent_behaves_as_the_theory(seed):
    found, side = sampled_descent(Problem(10, 20, 100, 5), 0.0048, 600, seed=seed)
    assert found.sharpness[0] == pytest.approx(248, rel=0.1)
    lowest = int(found.sharpness.argmin())
    assert 8 <= lowest <= 15
    assert 33 <= found.sharpness[lowest] <= 40
    crossing = lowest + int(np.flatnonzero(found.sharpness[lowest:] >= 2 / 0.0048)[0])
    assert 80 <= crossing <= 140
    plus, minus = (np.diff(found.losses_TN[crossing:, side == s].mean(1)) for s in (1, -1))
    burst = np.flatnonzero(np.abs(plus) > 0.01 * np.abs(plus).max())
    assert np.corrcoef(plus[burst], minus[burst])[0, 1] <= -0.8
    assert (np.sign(plus[burst][1:]) != np.sign(plus[burst][:-1])).mean() >= 0.95
    assert 0.85 < found.sharpness[-1] * 0.0048 / 2 < 1.05


def test_sampled_losses_and_sharpness_follow_finite_differences():
    problem = Problem(3, 5, 10, 2)
    one, _ = sampled_descent(problem, 1e-7, 1, samples=200, loss="cross-entropy", seed=3)
    two, _ = sampled_descent(problem, 2e-7, 1, samples=200, loss="cross-entropy", seed=3)
    first, second = one.loss[1] - one.loss[0], two.loss[1] - two.loss[0]
    assert second == pytest.approx(2 * first, rel=1e-3)
    assert first < 0


VALLEY = [  # step, u, v, L, lambda
    (0, 1, 0.1, 1.8189, 9.2589),
    (10, 0.6797951317, 0.3420724794, 1.5731725, 6.97),
    (39, 1.93e-10, 1.772765274, 0.035301454, 25.14),
    (100, -0.4388285204, 1.691567876, 2.2606999, 28.35),
    (103, 0.0473674, 1.438310375, 0.18316, 16.63),
]


@pytest.mark.parametrize("row", VALLEY)
def test_the_valley_has_the_reference_values(row):
    step, u, v, loss, sharpness = row
    valley = Valley()
    found = descend(valley, 0.08, 120)[step]
    np.testing.assert_allclose(found, (u, v), rtol=3e-3 if step == 39 else 2e-6)
    assert valley.loss(*found) == pytest.approx(loss, rel=1e-4)
    assert valley.sharpness(*found) == pytest.approx(sharpness, rel=1e-3)


def test_simulations_are_runs_like_any_other(opsig, tmp_path):
    valley = opsig("simulate", "valley", "-o", tmp_path / "valley.h5", "--figure", tmp_path / "v.png")
    assert valley.records[0]["crossing_step"] == 39
    assert opsig("mine", tmp_path / "valley.h5", "--top", 2).code == 0
    options = ("--dynamics", "sampled", "--learning-rate", 0.0048, "--steps", 400)
    linear(opsig, *options, "-o", tmp_path / "linear.h5", "--figure", tmp_path / "l.png")
    mined = opsig("mine", tmp_path / "linear.h5", "--top", 50).records
    assert {r["label"] for r in mined} == {"outlier +", "outlier -"}
    grouped = opsig("cluster", tmp_path / "linear.h5", "--by", "loss", "--top", 50).records
    assert any(r["kind"] == "pair" and r["loss_correlation"] < -0.8 for r in grouped)
    assert opsig("info", tmp_path / "linear.h5").records[0]["samples"] == 1000
    assert opsig("verify", tmp_path / "linear.h5").code == 0
    assert (tmp_path / "v.png").stat().st_size > 5000
    assert (tmp_path / "l.png").stat().st_size > 5000


def test_mistakes_about_simulations(opsig):
    opsig("simulate", "linear", "--d1", 20, "--d2", 10).fails(2, "d1 must be at least 1 and below d2")
    opsig("simulate", "linear", "--dynamics", "magic").fails(2, "no dynamics are called 'magic'", "flow, gd, sampled")
    opsig("simulate", "linear", "--dynamics", "sampled", "--loss", "hinge").fails(2, "square or cross-entropy")
