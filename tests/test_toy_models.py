"""The linear model and the valley, against values derived independently and, through the command line, to 1e-6."""

import itertools
import json
import shutil

import h5py
import numpy as np
import pytest
from conftest import start_opsig

from opsig_cli.analysis.linear_descent import PROBABILITY, draw, sampled_descent
from opsig_cli.analysis.linear_model import Problem, gradient_flow

FLOW = [  # d1, d2, alpha, B, lambda(0), t1, lambda_min, time of it, time at 5/8 alpha B, bound on t1
    (10, 20, 25, 5, 62.1880071, 0.0602627508, 17.9390564, 0.104184, 0.39181715, 0.0916),
    (10, 20, 100, 5, 247.672151, 0.0350149836, 43.5331106, 0.0524588, 0.404780539, 0.0916),
    (10, 20, 1000, 5, 2474.96351, 0.00750901519, 344.261809, 0.0098036, 0.410159092, 0.0916),
    (20, 100, 1000, 10, 2744.40576, 0.0109998924, 187.181699, 0.0150632, 0.278773077, 0.0805),
    (50, 100, 400, 8, 990.102114, 0.0144959497, 143.68824, 0.0196010, 0.302683204, 0.0866),
]


def simulate(opsig, *options):
    """The record of the run, and those of the states asked for with --at, by their time."""
    outcome = opsig("simulate", *options)
    assert outcome.code == 0, outcome.err
    run, *states = outcome.records
    assert run["kind"] == "run"
    assert all(state["kind"] == "state" for state in states)
    return run, {state.get("step", state.get("time")): state for state in states}


def linear(opsig, *options):
    return simulate(opsig, "linear", *options)[0]


def as_printed(value, text):
    """Whether a value agrees with a printed number: to 1e-6, or to the half of its last digit where it has fewer."""
    decimals = len(text.partition(".")[2])
    assert value == pytest.approx(float(text), rel=1e-6, abs=0.5000001 * 10**-decimals), text


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
    assert found["sharpness_final"] == pytest.approx(max(alpha, 2) * size, rel=1e-12)
    needed = {5: 128.8, 10: 3600, 8: 144}[size]  # ((1 + k) ln(k) B / ln(B/2))^2, on paper
    for theorem in ("theorem_3_1", "theorem_3_2"):
        conclusions = {k: v for k, v in found[theorem].items() if not k.startswith("assumption")}
        assert len(conclusions) >= 2
        assert all(conclusions.values()), conclusions
        assert found[theorem]["assumption_beta_norm"]
        assert found[theorem]["assumption_alpha"] == (alpha >= needed)


def test_the_flow_at_a_given_time(opsig):
    _, states = simulate(opsig, "linear", "--at", 2 / 5)
    expected = {"epsilon": 1.721552473, "delta": 0.3278367616, "ln_o": -103.0560792, "c": 1.752489617}
    expected |= {"loss": 52.13118154, "sharpness": 307.1219859}
    for name, value in expected.items():
        assert states[0.4][name] == pytest.approx(value, rel=1e-9), name


def test_the_flow_ends_at_its_limit(opsig):
    run, states = simulate(opsig, "linear", "--alpha", 1.5, "--at", 2)
    assert run["sharpness_final"] == pytest.approx(2 * 5, rel=1e-12)
    assert states[2]["sharpness"] == pytest.approx(10, rel=1e-3)


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


STEPS = {0.002: 4000, 0.0042: 4000, 0.0048: 2000, 0.006: 2000, 0.008: 2000}
DESCENT = [  # eta, lambda_min, its step, step crossing 2/eta, peak |cq|, its step, final lambda, its share of 2/eta
    (0.002, "40.6", 26, None, None, None, "498.486", ".498"),
    (0.0042, "36.9", 12, 165, ".158", 1570, "471.79", ".991"),
    (0.0048, "35.7", 11, 113, ".6408", 411, "410.155", ".984"),
    (0.006, "32.8", 9, 76, "1.436", 188, "318.126", ".954"),
    (0.008, "25.3", 5, 51, "2.33", 106, "248.74", ".995"),
]


@pytest.mark.parametrize("row", DESCENT)
def test_population_descent_has_the_reference_values(opsig, row):
    eta, lowest, when, crossing, peak, peak_step, final, share = row
    found = linear(opsig, "--dynamics", "gd", "--learning-rate", eta, "--steps", STEPS[eta])
    as_printed(found["sharpness_min"], lowest)
    assert found["time_of_min"] == when
    assert found["crossing_step"] == crossing
    assert (found["peak_feature"] is None) == (peak is None)
    if peak is not None:
        as_printed(found["peak_feature"], peak)
        assert found["peak_step"] == peak_step
    as_printed(found["sharpness_final"], final)
    as_printed(found["sharpness_final"] * eta / 2, share)


def test_population_descent_step_by_step(opsig):
    at = [option for step in (10, *range(390, 412), 1000) for option in ("--at", step)]
    _, states = simulate(opsig, "linear", "--dynamics", "gd", *at)
    expected = {
        10: {"epsilon": 0.3301501295, "q": 0.0788648194, "c": 0.5776075034},
        411: {"epsilon": 2.250709033, "q": 0.3140646488, "c": 2.040488266},
        1000: {"epsilon": 2.468856188, "c": 2.025229345},
    }
    for step, values in expected.items():
        for name, value in values.items():
            assert states[step][name] == pytest.approx(value, rel=1e-8), (step, name)
    feature = [states[step]["c"] * states[step]["q"] for step in range(390, 412)]
    assert all(a * b < 0 for a, b in itertools.pairwise(feature))


def test_a_rate_that_takes_the_feature_away_at_once_leaves_it_at_zero(opsig):
    run, states = simulate(opsig, "linear", "--dynamics", "gd", "--learning-rate", 0.01, "--steps", 20, "--at", 1)
    assert states[1]["q"] == 0  # 1 - eta alpha c^2
    assert run["diverged_at"] is None


def test_a_diverging_run_is_a_result(opsig):
    found = linear(opsig, "--dynamics", "gd", "--learning-rate", 0.014, "--steps", 500)
    assert found["diverged_at"] is not None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampled_descent_behaves_as_the_theory(seed):
    problem = Problem(10, 20, 100, 5)
    drawn = draw(problem, 1000, PROBABILITY, seed)
    found, side = sampled_descent(problem, 0.0048, 600, drawn), drawn.side
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
    drawn = draw(problem, 200, PROBABILITY, 3)
    one, two = (sampled_descent(problem, rate, 1, drawn, "cross-entropy") for rate in (1e-7, 2e-7))
    first, second = one.loss[1] - one.loss[0], two.loss[1] - two.loss[0]
    assert second == pytest.approx(2 * first, rel=1e-3)
    assert first < 0


VALLEY = [  # step, u, v, L_plane, L_other, L, lambda
    (0, "1", ".1", ".5", "4.5", "1.8189", "9.2589"),
    (10, ".6797951317", ".3420724794", "6.66", "15.97", "1.5731725", "6.97"),
    (39, None, "1.772765274", ".5", ".5", ".035301454", "25.14"),
    (100, "-.4388285204", "1.691567876", "125.55", "95.86", "2.2606999", "28.35"),
    (103, ".0473674", "1.438310375", ".066", "2.79", ".18316", "16.63"),
]


def test_the_valley_has_the_reference_values(opsig):
    run, states = simulate(opsig, "valley", *(option for row in VALLEY for option in ("--at", row[0])))
    assert (run["crossing_step"], run["peak_step"], run["threshold"]) == (39, 100, 25)
    for step, *values in VALLEY:
        for name, text in zip(("u", "v", "loss_plane", "loss_other", "loss", "sharpness"), values, strict=True):
            if text is not None:
                as_printed(states[step][name], text)
    assert states[39]["u"] == pytest.approx(1.93e-10, rel=3e-3)


def test_the_valley_grows_by_the_theory_once_it_is_sharp(opsig):
    """In the flat floor u changes by the factor 1 - eta lambda at each step."""
    _, states = simulate(opsig, "valley", "--at", 60, "--at", 61)
    growth = states[61]["u"] / states[60]["u"]
    assert growth == pytest.approx(1 - 0.08 * states[60]["sharpness"], rel=1e-9)
    assert growth < -1


def test_a_valley_too_steep_to_descend_ends_where_it_diverges(opsig):
    run, _ = simulate(opsig, "valley", "--learning-rate", 1)
    assert run["diverged_at"] == run["steps"] + 1


RUNS = {
    "valley": ("valley",),
    "flow": ("linear",),
    "gd": ("linear", "--dynamics", "gd", "--steps", 430),
    "sampled": ("linear", "--dynamics", "sampled", "--steps", 300),
    "cross-entropy": (
        "linear", "--dynamics", "sampled", "--loss", "cross-entropy", "--learning-rate", 0.1, "--steps", 100,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One file of every simulation."""
    folder = tmp_path_factory.mktemp("simulations")
    for name, options in RUNS.items():
        process = start_opsig("simulate", *options, "-o", folder / f"{name}.h5", "--figure", folder / f"{name}.png")
        _, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_sharpness_measured_on_a_simulation_is_the_simulated_one(opsig, runs, tmp_path, name):
    run = shutil.copy(runs / f"{name}.h5", tmp_path)
    with h5py.File(run) as file:
        simulated = dict(zip(file["sharpness/step"][()], file["sharpness/eigenvalue"][:, 0], strict=True))
        vectors = dict(zip(file["sharpness/step"][()], file["sharpness/eigenvector"][()], strict=True))
    measured = opsig("sharpness", run, "--at", "iterate", "--replace", "--steps", "0:1000:20", "--tolerance", "1e-4")
    assert measured.code == 0, measured.err
    for record in measured.records:
        assert record["eigenvalue"] == pytest.approx(simulated[record["step"]], rel=1e-5), record["step"]
    with h5py.File(run) as file:
        for step, vector in zip(file["sharpness/step"][()], file["sharpness/eigenvector"][()], strict=True):
            assert abs(vector @ vectors[step]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_losses_measured_on_a_simulation_are_the_simulated_ones(opsig, runs, tmp_path, name):
    run = shutil.copy(runs / f"{name}.h5", tmp_path)
    with h5py.File(run, "r+") as file:
        simulated = file["losses/loss"][()]
        del file["losses"]
    assert opsig("track", run).code == 0
    with h5py.File(run) as file:
        np.testing.assert_allclose(file["losses/loss"][()], simulated, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file["losses/loss"][()].mean(1), file["scalars/train_loss"][()], rtol=1e-5)


@pytest.mark.parametrize(("name", "by"), [("sampled", "loss"), ("sampled", "gradient"), ("gd", "gradient")])
def test_the_two_sides_of_a_simulation_are_found(opsig, runs, name, by):
    found = opsig("cluster", runs / f"{name}.h5", "--by", by, "--truth")
    assert found.code == 0, found.err
    pair = next(r for r in found.records if r["kind"] == "pair" and "outlier +" in str(r["labels"]))
    assert pair["sizes"] == [25, 25]
    assert pair["loss_correlation"] < -0.8
    agreement = next(r for r in found.records if r["kind"] == "agreement")
    assert agreement["adjusted_rand_index"] == 1
    assert pair["verdict"] == ("unclear" if by == "loss" else "likely")  # nothing tells what looks alike here


def test_the_two_sides_of_the_valley_are_found_by_gradient(opsig, runs):
    found = opsig("cluster", runs / "valley.h5", "--by", "gradient", "--window", "80:120", "--truth").records
    pair = next(r for r in found if r["kind"] == "pair")
    assert {frozenset(mix) for mix in map(dict.keys, pair["labels"])} == {frozenset({"plane"}), frozenset({"other"})}


def test_simulations_are_runs_like_any_other(opsig, runs):
    for name in RUNS:
        assert opsig("verify", runs / f"{name}.h5").code == 0
        assert opsig("info", runs / f"{name}.h5").records[0]["samples"] == 1000
        assert (runs / f"{name}.png").stat().st_size > 5000
    mined = opsig("mine", runs / "sampled.h5", "--top", 50).records
    assert {r["label"] for r in mined} == {"outlier +", "outlier -"}
    projected = opsig("probe", runs / "gd.h5", "--projection")
    assert projected.code == 0, projected.err


def test_training_the_linear_model_follows_the_simulation(opsig, runs, tmp_path):
    with h5py.File(runs / "sampled.h5") as file:
        task = json.loads(file.attrs["settings_json"])["task"]
        simulated = file["checkpoints/params"][100]
    options = ("--learning-rate", 0.0048, "--steps", 100, "-o", tmp_path / "run.h5")
    assert opsig("train", "--task", task, *options).code == 0
    with h5py.File(tmp_path / "run.h5") as file:
        np.testing.assert_allclose(file["checkpoints/params"][-1], simulated, rtol=1e-4, atol=1e-5)


def test_mistakes_about_simulations(opsig):
    opsig("simulate", "linear", "--d1", 20, "--d2", 10).fails(2, "d1 must be at least 1 and below d2")
    opsig("simulate", "linear", "--dynamics", "magic").fails(2, "no dynamics are called 'magic'", "flow, gd, sampled")
    opsig("simulate", "linear", "--dynamics", "sampled", "--loss", "hinge").fails(2, "square or cross-entropy")
    opsig("simulate", "linear", "--loss", "cross-entropy").fails(2, "--dynamics sampled")
    opsig("simulate", "linear", "--at", 9).fails(2, "--at", "9 is not a time from 0 to 2")
    opsig("simulate", "valley", "--at", "nan").fails(2, "--at", "nan is not a step from 0 to 120")
    opsig("simulate", "linear", "--alpha", "inf").fails(2, "positive and finite")
    diverged = opsig("simulate", "linear", "--dynamics", "sampled", "--learning-rate", 1e200)
    assert (diverged.code, "found: descent diverges at step" in diverged.err) == (0, True)
    opsig("simulate", "valley", "--at", 9.5).fails(2, "--at", "9.5 is not a step from 0 to 120")
    opsig("train", "--task", "linear-model:d1=9,d2=3", "-o", "x.h5").fails(2, "below d2")
    opsig("train", "--task", "linear-model:loss=cross-entropy", "-o", "x.h5").fails(2, "needs samples")
