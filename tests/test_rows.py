"""Grouping many samples by rows: the same as with the similarity of every two, which is never formed."""

import shutil

import numpy as np
import pytest
from conftest import TASKS
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score

from opsig_cli.analysis import agglomerating, cutting, gram, grouping, pairing
from opsig_cli.analysis.gram import Gram
from opsig_cli.analysis.group_means import between_groups, group_means
from opsig_cli.analysis.likeness import typical_likeness


def crowd(seed, count=300, size=12, pairs=4, side=20):
    """Rows of length one: sides of pairs along both ends of axes, and as many others."""
    rows = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    for number in range(2 * pairs):
        rows[number * side : (number + 1) * side, number // 2] += 5 * (-1) ** number
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def parts(groups):
    return {tuple(np.flatnonzero(groups == group)) for group in np.unique(groups)}


@pytest.mark.parametrize("few", [5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_at_every_height_are_those_of_scipys_average_linkage(seed, few, monkeypatch):
    monkeypatch.setattr(agglomerating, "FEW", few)
    monkeypatch.setattr(agglomerating, "BLOCK", 37)
    monkeypatch.setattr(agglomerating, "SLACK", 0.0)
    monkeypatch.setattr(agglomerating, "MOST_SLACK", 0.0)
    rows = crowd(seed)
    distances = squareform(1 - rows.astype(np.float64) @ rows.T, checks=False)
    tree = linkage(distances, "average")
    for cut, found in zip(cutting.CUTS, cutting.cut_tree(Gram(2 * rows, 0.25), 1), strict=True):
        assert parts(found) == parts(fcluster(tree, cut, "distance"))


def test_equal_samples_merge_at_once(monkeypatch):
    monkeypatch.setattr(agglomerating, "FEW", 10)
    rows = np.repeat(np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0], 700, axis=0)
    rounds = []
    merge = agglomerating._Clusters.merge
    monkeypatch.setattr(agglomerating._Clusters, "merge", lambda *given: rounds.append(1) or merge(*given))
    pairs, similarity = agglomerating.average_linkage(Gram(rows.astype(np.float32)), 0.25)
    assert len(rounds) < 5
    assert len(np.unique(pairs // 700, axis=0)) == 3
    assert similarity.min() > 0.999


def test_what_rows_say_of_groups_is_what_the_matrix_says():
    rows, generator = crowd(0), np.random.default_rng(1)
    groups = generator.integers(-1, 9, len(rows))
    by_rows, whole = Gram(rows * 3, 1 / 9), rows.astype(np.float64) @ rows.T
    chosen = np.ix_([3, 200], [0, 1, 7])
    np.testing.assert_allclose(by_rows[10:14], whole[10:14], atol=1e-6)
    np.testing.assert_allclose(by_rows[chosen], whole[chosen], atol=1e-6)
    np.testing.assert_allclose(by_rows.diagonal(), np.ones(len(rows)), atol=1e-6)
    for asked in (group_means, between_groups):
        np.testing.assert_allclose(asked(by_rows, groups), asked(whole, groups), atol=1e-6)
    partner_G = np.array([1, 0, -1, 4, 3, -1, 7, 6, -1])
    aligned = [pairing.alignments(similarity, groups, partner_G) for similarity in (by_rows, whole)]
    np.testing.assert_allclose(*aligned, atol=1e-6)
    assert cutting.silhouette(by_rows, groups) == pytest.approx(cutting.silhouette(whole, groups), abs=1e-6)
    for wide in (rows, np.pad(rows, ((0, 0), (0, 400)))):
        assert typical_likeness(Gram(wide)) == pytest.approx(typical_likeness(whole), rel=1e-6)


def test_rows_of_loss_changes_have_their_correlations():
    losses = np.random.default_rng(0).standard_normal((30, 700)).astype(np.float32)
    losses[:, 5] = 1.0
    expected = grouping.known(grouping.change_correlation(losses))
    np.testing.assert_allclose(grouping.change_rows(losses)[:], expected, atol=1e-6)


@pytest.mark.parametrize("likeness", [False, True])
def test_groups_and_pairs_by_rows_are_those_of_the_matrix(likeness, monkeypatch):
    monkeypatch.setattr(agglomerating, "FEW", 40)
    rows = crowd(3, size=24)
    looks = np.abs(rows) / np.linalg.norm(rows, axis=1, keepdims=True)
    whole = grouping.group_by_similarity(rows @ rows.T, likeness_MM=looks @ looks.T if likeness else None)
    found = grouping.group_by_similarity(Gram(rows), likeness_MM=Gram(looks) if likeness else None)
    assert adjusted_rand_score(whole.group_M, found.group_M) == 1
    assert {frozenset((found.members(a)[0] // 20, found.members(b)[0] // 20)) for a, b in found.pairs()[:4]} == {
        frozenset((2 * pair, 2 * pair + 1)) for pair in range(4)
    }


def group_of(records):
    members = {record["sample"]: record["group"] for record in records if record["kind"] == "member"}
    return np.array([members.get(sample, -1) for sample in range(120)])


@pytest.mark.parametrize("by", ["loss", "both"])
def test_more_samples_than_a_matrix_has_room_for_are_grouped_by_rows(by, tiny_run, opsig, monkeypatch, tmp_path):
    run = shutil.copy(tiny_run, tmp_path / "run.h5")
    asked = ["cluster", run, "--by", by, "--task", f"{TASKS}:Tiny", "--test", "held-out"]
    whole = opsig(*asked)
    monkeypatch.setattr(gram, "MOST_FORMED", 20)
    found = opsig(*asked, "--replace")
    assert "more than 20, are grouped by rows" in found.err
    assert ("256 numbers a checkpoint" in found.err) == (by == "both")
    assert adjusted_rand_score(group_of(whole.records), group_of(found.records)) > 0.95
    again = opsig(*asked, "--figure", tmp_path / "again.png")
    assert "kept in the file" in again.err
    assert again.records == found.records
    if by == "loss":
        assert opsig("report", run, "--by", by, "--task", f"{TASKS}:Tiny", "-o", tmp_path / "page.html").code == 0
