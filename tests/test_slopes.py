"""Slopes along eigenvectors against autograd and dense Hessians; who stands at the ends; grouping by them."""

import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import TASKS
from opsig_torch import TorchBackend
from tasks import tiny
from test_backend_contract import autograd_gradients
from test_curvature import dense

from opsig_cli import open_trajectory
from opsig_cli.analysis import slopes
from opsig_cli.analysis.verdicts import Evidence, Silenced, judge
from opsig_cli.studies import tracking
from opsig_cli.studies.clustering.tables import pair_table
from opsig_cli.studies.slopes import kept, slopes_at

ANSWERS = ("found:", "next:")
OWN = ("--task", f"{TASKS}:Tiny")


# -- measured


@pytest.mark.parametrize("task", [tiny.Tiny, tiny.Conv, tiny.Attend])
def test_slopes_and_curvatures_are_those_of_autograd_sample_by_sample(task):
    session = TorchBackend().open(task(), "cpu", 7, double=True)
    state = session.initial(0)
    directions = np.random.default_rng(0).standard_normal((3, len(state.params)))
    found_SK, curvature_SK = session.slopes_along(state, directions)
    samples = [0, 3, session.samples - 1]
    expected = autograd_gradients(session, state, samples) @ directions.T
    np.testing.assert_allclose(found_SK[samples], expected, atol=1e-10)
    one = torch.zeros(session.samples, dtype=torch.float64)
    one[3] = 1
    hessian = dense(session, state, one)[0].numpy()
    np.testing.assert_allclose(curvature_SK[3], np.einsum("kp,pq,kq->k", directions, hessian, directions))


@pytest.mark.parametrize("optimizer", [(), ("--optimizer", "adam")])
def test_curvatures_average_to_the_eigenvalue_and_slopes_to_that_of_the_whole_loss(opsig, tmp_path, optimizer):
    path, rate = tmp_path / "run.h5", 0.02 if optimizer else 0.5
    trained = opsig(
        "train", *OWN, "--steps", 20, "--checkpoint-every", 10, "--learning-rate", rate, *optimizer, "-o", path
    )
    assert trained.code == 0, trained.err
    with open_trajectory(path) as run:
        session = tracking.open_session(run, OWN[1], "cpu", "torch", lambda text: None)[0]
        found = slopes_at(run, session, 10, 3, 1e-4, "floor")
    np.testing.assert_allclose(found.curvature_SK.mean(0), found.values, rtol=1e-3)
    assert np.all(np.abs(found.slope_SK.mean(0)) < np.sqrt((found.slope_SK**2).mean(0)))


# -- named


def test_the_ends_of_an_eigenvector_are_the_fewest_with_half_of_its_squared_slopes():
    slope = np.array([5.0, 4.0, 0.1, 0.0, -0.2, -1.0, -1.0, -1.0])
    first, second = slopes.ends(slope, slope**2)
    assert (first.members.tolist(), first.slope) == ([0], 5.0)
    assert (second.members.tolist(), second.slope) == ([5, 6], -1.0)
    assert first.share == pytest.approx(25 / (slope**2).sum())
    turned = slopes.ends(-slope, slope**2)
    assert [end.members.tolist() for end in turned] == [[0], [5, 6]]
    empty = slopes.ends(np.array([1.0, 2.0]), np.ones(2))
    assert [len(end.members) for end in empty] == [1, 0]


def test_eigenvectors_are_named_kept_and_drawn(opsig, tiny_run, tmp_path):
    """Two of the three labels that share the inputs of eight samples stand at the two ends of one of them."""
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    asked = ("sharpness", run, *OWN, "--name", "-k", 3, "--steps", "30:60")
    found = opsig(*asked, "--figure", tmp_path / "ends.png")
    assert found.code == 0, found.err
    assert (tmp_path / "ends.png").stat().st_size > 10_000
    assert {record["kind"] for record in found.records} == {"eigenvector"}
    shared = [set(samples) <= set(range(8)) for record in found.records for samples in record["samples"]]
    assert np.mean(shared) > 0.3
    for record in found.records:
        a, b = record["slopes"]
        assert a * b < 0
        assert record["ratio"] == pytest.approx(record["eigenvalue"] / record["threshold"])
        assert 0 < sum(record["shares"]) < 1.05
    again = opsig(*asked)
    assert again.out == found.out
    with open_trajectory(run) as file:
        held = kept(file, found.records[0]["step"], 3, "floor")
        assert held is not None
        assert kept(file, found.records[0]["step"], 4, "floor") is None
    np.testing.assert_allclose(held.curvature_SK.mean(0), held.values, rtol=1e-3)
    opsig(*asked, "--at", "iterate").fails(1, "holds slopes at the floor of step", "--at floor, or --replace")
    opsig("sharpness", run, *OWN, "--name", "-k", 5).fails(1, "holds slopes along 3 eigenvectors, not 5", "-k 3")
    last = opsig("sharpness", run, *OWN, "--name", "-k", 1, "--format", "table")
    assert not [line for line in last.err.splitlines() if "eigenvector" in line and not line.startswith(ANSWERS)]
    assert "against" in last.out
    assert opsig("verify", run).code == 0


def test_samples_are_mined_by_the_slopes_that_the_file_holds(opsig, tiny_run, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    opsig("mine", run, "--score", "slope").fails(
        1, "holds no slopes along eigenvectors", "Run: opsig sharpness", "--name"
    )
    assert opsig("sharpness", run, *OWN, "--name", "-k", 3, "--steps", "30:60").code == 0
    found = opsig("mine", run, "--score", "slope", "--top", 60)
    assert found.code == 0, found.err
    assert {record["score_name"] for record in found.records} == {"slope"}
    with h5py.File(run) as file:
        slope_CKS = file["slopes/slope"][()].astype(np.float64)
    expected = np.sqrt((slope_CKS**2 / np.sqrt((slope_CKS**2).mean(2, keepdims=True))).sum(1)).mean(0)
    scores = np.zeros(60)
    for record in found.records:
        scores[record["sample"]] = record["score"]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert [record["score"] for record in found.records] == sorted(scores, reverse=True)
    opsig("mine", run, "--score", "slope", "--window", "0:20").fails(1, "from step 0 to 20")


def test_name_excludes_what_it_is_not_of(opsig, tiny_run):
    opsig("sharpness", tiny_run, *OWN, "--name", "--metrics", "trace").fails(
        2, "Leave --metrics, --slice and --plain out"
    )


def test_a_minibatch_run_is_named_at_its_iterates_and_this_is_said(opsig, tmp_path):
    path = tmp_path / "run.h5"
    options = ("--optimizer", "sgd", "--batch-size", 20, "--steps", 10, "--learning-rate", 0.1)
    assert opsig("train", *OWN, *options, "-o", path).code == 0
    found = opsig("sharpness", path, *OWN, "--name", "-k", 1)
    assert "measured at the iterates" in found.err
    assert found.records[0]["at"] == "iterate"


def test_the_report_shows_the_ends_where_they_are_measured(opsig, tiny_run, tmp_path):
    run, page = shutil.copy(tiny_run, tmp_path / "run.h5"), tmp_path / "page.html"
    assert opsig("report", run, *OWN, "-o", page).code == 0
    assert 'id="vectors"' not in page.read_text()
    assert opsig("sharpness", run, *OWN, "--name", "-k", 2).code == 0
    assert opsig("report", run, *OWN, "-o", page).code == 0
    text = page.read_text()
    assert text.count('id="vector-') == 2
    assert "\N{MULTIPLICATION SIGN} the stability threshold" in text


# -- grouped


def planted_slopes(vectors=8, noise=1.0, seed=0):
    """Two sides on each of three vectors, and noise along all others, at two checkpoints: (C, S, K), side (S,)."""
    generator = np.random.default_rng(seed)
    found = noise * generator.standard_t(3, (2, 240, vectors))
    side = np.repeat(np.arange(6), 40)
    for number in range(240):
        found[:, number, side[number] // 2] += 20 * (-1) ** side[number]
    return found, side


def test_as_many_vectors_count_as_show_structure():
    found, _ = planted_slopes(noise=0.5)
    found[:, :, 3:] *= 20  # vectors of the bulk, as large as the others
    structure = slopes.structure(slopes.scaled(found), 4)
    assert 3 <= slopes.choose_count(structure) <= 4
    assert structure[2] > 1.2 * structure[-1]
    nothing = np.random.default_rng(0).standard_normal((2, 240, 6))
    assert slopes.structure(slopes.scaled(nothing), 4).max() < 0.1


def test_similarities_are_cosines_averaged_over_checkpoints():
    found, _ = planted_slopes()
    scaled = slopes.scaled(found)
    rows = slopes.coordinates(scaled, 3)
    expected = np.zeros((240, 240))
    for at in scaled[:, :, :3]:
        unit = at / np.linalg.norm(at, axis=1, keepdims=True)
        expected += unit @ unit.T / 2
    np.testing.assert_allclose(slopes.similarity(rows), expected, atol=1e-5)


def test_a_pair_lies_on_the_vector_whose_ends_it_stands_at():
    found, side = planted_slopes()
    pair = np.flatnonzero(side == 2), np.flatnonzero(side == 3)
    (lying,) = slopes.lies_on(found[0], found[0] ** 2, pair)
    assert lying.rank == 1
    assert lying.slopes[0] > 15
    assert lying.slopes[1] < -15
    assert sum(lying.shares) == pytest.approx(
        (found[0, np.concatenate(pair), 1] ** 2).sum() / (found[0, :, 1] ** 2).sum()
    )
    assert slopes.lies_on(found[0], found[0] ** 2, (pair[0], np.flatnonzero(side == 5))) == []


@pytest.fixture(scope="module")
def weak_run(tmp_path_factory):
    """Weak features that share one pair of labels: four sides of two labels."""
    import subprocess
    import sys

    path = tmp_path_factory.mktemp("weak") / "run.h5"
    task = "planted:pairs=2,same_classes=true,strength=4,samples=500,side=25,seed=1"
    command = ["train", "--task", task, "--learning-rate", "0.1", "--steps", "250", "--track", "-q", "-o", str(path)]
    subprocess.run([sys.executable, "-m", "opsig_cli.main", *command], check=True, stdout=subprocess.DEVNULL)
    return path


def test_features_that_share_their_labels_are_told_apart_by_slope(opsig, weak_run):
    found = opsig("cluster", weak_run, "--by", "slope", "--truth", "--top", 150)
    assert found.code == 0, found.err
    assert "note: slopes along" in found.err
    assert found.records[-1]["adjusted_rand_index_mined"] > 0.9
    pairs = [record for record in found.records if record["kind"] == "pair"]
    assert any(pair["eigenvectors"] for pair in pairs)
    for pair in pairs:
        for vector in pair["eigenvectors"]:
            assert np.prod(vector["slopes"]) < 0
        if pair["eigenvectors"]:
            assert pair["sharpness_share"] == pytest.approx(sum(pair["eigenvectors"][0]["shares"]))
            assert pair["sharpness_ratio"] == pytest.approx(pair["eigenvectors"][0]["eigenvalue"] / 20)
    assert all("on vector" in row for row in pair_table(found.records))


def test_slopes_are_not_sketched(opsig, tiny_run):
    opsig("cluster", tiny_run, *OWN, "--by", "slope", "--sketch", 512).fails(2, "--sketch is of gradients")


def test_pairs_by_gradient_carry_the_vectors_that_the_file_holds(opsig, weak_run, tmp_path):
    run = shutil.copy(weak_run, tmp_path / "run.h5")
    asked = ("cluster", run, "--by", "gradient", "--top", 150, "--no-join")
    before = [r for r in opsig(*asked).records if r["kind"] == "pair"]
    assert before
    assert all(pair["eigenvectors"] is None and pair["sharpness_share"] is None for pair in before)
    assert opsig("sharpness", run, "--name", "-k", 6, "--tolerance", "1e-2").code == 0
    after = [r for r in opsig(*asked).records if r["kind"] == "pair"]
    assert any(pair["eigenvectors"] for pair in after)
    assert {pair["sharpness_step"] for pair in after} == {250}


def test_silence_alone_establishes_no_pair_that_was_found_at_the_ends_of_eigenvectors():
    """What swings at the edge are the two ends of an eigenvector, whoever they are, on Gaussian inputs, too."""
    quiet = [Silenced(step, 1.0, 0.05, 0.9, 0.06) for step in (40, 80, 120)]
    evidence = [Evidence(-0.2, -0.1, p, alike, quiet) for p, alike in ((0.4, 0.9), (0.01, -0.2), (0.01, 0.9))]
    assert [judge(found)[0] for found in evidence] == ["established", "likely", "established"]
    at_ends = [judge(replace(found, at_ends=True))[0] for found in evidence]
    assert at_ends == ["unclear", "likely", "established"]
