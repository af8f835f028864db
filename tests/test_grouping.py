import itertools

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from opsig_cli.analysis import grouping


def cosines_of_pairs(sizes, dimensions=400, noise=0.6, strays=20, seed=0):
    """Cosines of vectors on K axes, sizes[k][0] of them along +axis k and sizes[k][1] along -axis k, and strays."""
    generator = np.random.default_rng(seed)
    truth, rows = [], []
    for axis, pair in enumerate(sizes):
        for side, count in enumerate(pair):
            truth += [2 * axis + side] * count
            for _ in range(count):
                row = noise * generator.standard_normal(dimensions) / np.sqrt(dimensions)
                row[axis] += (-1) ** side
                rows.append(row)
    truth += [-1] * strays
    rows += list(generator.standard_normal((strays, dimensions)) / np.sqrt(dimensions))
    vectors = np.array(rows)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = generator.permutation(len(truth))
    return (vectors @ vectors.T)[np.ix_(order, order)], np.array(truth)[order]


@pytest.mark.parametrize("seed", range(3))
def test_planted_pairs_are_recovered_with_their_partners_and_strays_are_left_out(seed):
    similarity, truth = cosines_of_pairs([(30, 20), (12, 25), (6, 9)], seed=seed)
    found = grouping.group_by_similarity(similarity)
    assert adjusted_rand_score(truth, found.group_M) > 0.95
    sides = {frozenset(truth[found.members(g)][0] // 2 for g in pair) for pair in found.pairs()}
    assert sides == {frozenset({0}), frozenset({1}), frozenset({2})}
    assert (found.alignment_M[found.group_M >= 0] >= grouping.BELONGS).all()
    sizes = [len(found.members(g)) for g in range(6)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_group_that_nothing_opposes_has_no_partner():
    similarity, truth = cosines_of_pairs([(20, 20), (20, 0)])
    found = grouping.group_by_similarity(similarity)
    assert len(found.pairs()) == 1
    alone = [g for g in range(3) if found.partner_G[g] < 0]
    assert [set(truth[found.members(g)]) for g in alone] == [{2}]


def test_vectors_in_random_directions_make_no_group():
    similarity, _ = cosines_of_pairs([], strays=80)
    assert (grouping.group_by_similarity(similarity).group_M == -1).all()


def test_an_undefined_similarity_puts_nobody_in_a_group():
    assert (grouping.group_by_similarity(np.full((9, 9), np.nan)).group_M == -1).all()


def test_change_correlation_is_pearsons():
    losses = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32).cumsum(0)
    expected = np.corrcoef(np.diff(losses.astype(np.float64), axis=0).T)
    np.testing.assert_allclose(grouping.change_correlation(losses), expected, atol=1e-12)
    still = np.zeros((5, 2), np.float32)
    assert np.isnan(grouping.change_correlation(still)).all()


def test_evidence_of_two_exact_groups_is_exact():
    sides = np.array([1, 1, -1, -1])
    similarity = np.stack([np.outer(sides, sides) * c for c in (0.5, 0.7)])
    losses = np.array([[1, 1, 1, 1], [2, 2, 0, 0], [1.5, 1.5, 1, 1]], np.float32)
    across = similarity[:, :2, 2:].mean((1, 2))
    found = grouping.evidence(similarity.mean(0), across, losses, 1, 8.0, np.array([0, 1]), np.array([2, 3]))
    assert found.cohesion == pytest.approx(0.6)
    assert found.opposition == pytest.approx(-0.6)
    assert found.opposition_error == pytest.approx(0.1)
    assert found.loss_correlation == pytest.approx(-1)
    assert found.share == 0  # two samples rise by one nat and two fall by one


def planted_similarity(generator, sizes=(12, 10, 8, 8), noise=0.1):
    """Two pairs: groups 0 and 1 oppose, and 2 and 3."""
    sides = np.repeat(np.arange(len(sizes)), sizes)
    centre = np.eye(2)[sides // 2] * np.where(sides % 2, -1, 1)[:, None]
    rows = np.concatenate([centre, noise * generator.standard_normal((len(sides), 20))], 1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T, sides


def test_planted_pairs_are_significant_and_stable():
    similarity, _ = planted_similarity(np.random.default_rng(0))
    found = grouping.group_by_similarity(similarity)
    assert found.pairs() == [(0, 1), (2, 3)]
    null = grouping.null_strengths(similarity)
    stable = grouping.pair_stability(similarity, found)
    for a, b in found.pairs():
        across = similarity[np.ix_(found.members(a), found.members(b))].mean()
        strength = grouping.strength(across, len(found.members(a)), len(found.members(b)))
        assert grouping.p_value(strength, null) < 0.01
        assert stable[a, b] > 0.9


def test_white_noise_series_give_no_significant_pair():
    """Groups of the first half of the series are tested on the second, as `cluster --by loss` does."""
    significant = 0
    for seed in range(100):
        series = np.random.default_rng(seed).standard_normal((60, 24))
        first, second = (np.nan_to_num(grouping.change_correlation(half)) for half in (series[:31], series[30:]))
        found = grouping.group_by_similarity(first, smallest=2)
        null = grouping.null_strengths(second, rounds=99, smallest=2)
        for a, b in found.pairs():
            across = second[np.ix_(found.members(a), found.members(b))].mean()
            strength = grouping.strength(across, len(found.members(a)), len(found.members(b)))
            significant += grouping.p_value(strength, null) <= 0.01
    assert significant <= 1


def test_a_pair_that_resampling_breaks_is_unstable():
    similarity, _ = planted_similarity(np.random.default_rng(1), sizes=(6, 6), noise=0.9)
    found = grouping.group_by_similarity(similarity, smallest=2)
    for stability in grouping.pair_stability(similarity, found, smallest=2).values():
        assert stability < 0.9


def test_the_silhouette_is_scikit_learns():
    from sklearn.metrics import silhouette_score

    generator = np.random.default_rng(0)
    similarity, groups = planted_similarity(generator, noise=0.4)
    groups[generator.random(len(groups)) < 0.2] = -1
    inside = groups >= 0
    distance = np.clip(1 - similarity[np.ix_(inside, inside)], 0, 2)
    np.fill_diagonal(distance, 0)
    expected = silhouette_score(distance, groups[inside], metric="precomputed")
    assert grouping.silhouette(similarity, groups) == pytest.approx(expected)


def test_series_that_share_more_than_their_period_are_significant():
    generator = np.random.default_rng(3)
    shared = generator.standard_normal(200)
    a, b = (shared + 0.5 * generator.standard_normal(200) for _ in range(2))
    assert grouping.series_p_value(a, -b) <= 0.01
    assert grouping.series_p_value(a, b) > 0.9
    p_values = [grouping.series_p_value(*generator.standard_normal((2, 101)), seed=i) for i in range(200)]
    assert 0.4 < np.mean(p_values) < 0.6
    assert 1 <= np.sum(np.array(p_values) <= 0.05) <= 22


def test_the_strongest_opposition_does_not_leave_others_without_a_partner():
    """Four groups on one feature: 1 against 3 is strongest, and would leave 0 and 2, which do not oppose."""
    between = np.array(
        [[0.9, -0.3, -0.1, -0.3], [-0.3, 0.9, 0.1, -0.6], [-0.1, 0.1, 0.9, -0.55], [-0.3, -0.6, -0.55, 0.9]]
    )
    groups = np.repeat(np.arange(4), 6)
    found = grouping.group_by_similarity(between[np.ix_(groups, groups)])
    assert {frozenset(groups[found.members(g)[0]] for g in pair) for pair in found.pairs()} == {
        frozenset({0, 1}),
        frozenset({2, 3}),
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_exchange_of_partners_would_lower_the_sum(seed):
    generator = np.random.default_rng(seed)
    between = generator.uniform(-1, 0.3, (7, 7))
    between = (between + between.T) / 2
    partner = grouping._oppose(between, np.arange(7))
    assert all(partner[partner[g]] == g for g in range(7) if partner[g] >= 0)
    assert all(between[a, b] <= grouping.OPPOSES for a, b in grouping._pairs(partner))
    best = min(
        sum(min(between[a, b], 0) * (between[a, b] <= grouping.OPPOSES) for a, b in zip(p[:6:2], p[1:6:2], strict=True))
        for p in itertools.permutations(range(7))
    )
    assert sum(between[a, b] for a, b in grouping._pairs(partner)) <= 0.9 * best
