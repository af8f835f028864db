import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from tasks import tiny

from opsig_cli.analysis import cutting, evidence, grouping, likeness, pairing, significance, stability
from opsig_cli.analysis.group_means import between_groups, group_means
from opsig_cli.analysis.likeness import ALIKE, alike_between
from opsig_cli.analysis.verdicts import Evidence, Silenced, judge
from opsig_cli.studies.clustering import silencing


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


def test_evidence_of_exact_groups_is_exact():
    similarity = np.array([[1, 0.6, 0.2], [0.6, 1, 0.4], [0.2, 0.4, 1]])
    assert evidence.within(similarity, np.array([0, 1, 2])) == pytest.approx(0.4)
    rise = evidence.Rise(np.array([2.0, -1.0, 1.0]), whole=4.0, movement=8.0)
    members = np.array([0, 1])
    assert (rise.share(members), rise.share_of_movement(members), rise.mean(members)) == (0.25, 0.375, 0.5)
    assert np.isnan(evidence.Rise(np.array([-1.0]), whole=-1.0, movement=1.0).share(np.array([0])))
    losses = np.array([[1, 1, 1, 1], [2, 2, 0, 0], [1.5, 1.5, 1, 1]], np.float32)
    means = evidence.mean_losses(losses, [np.array([0, 1]), np.array([2, 3])])
    np.testing.assert_array_equal(means, [[1, 1], [2, 0], [1.5, 1]])


def test_an_interval_over_checkpoints_is_students():
    from scipy import stats

    values = np.array([-0.41, -0.2, -0.33, -0.5])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)  # both ends at 5%
    assert evidence.interval(values) == pytest.approx((expected.low, expected.high))
    assert np.isnan(evidence.interval(values[:1])).all()


def test_movement_that_turns_back_is_told_from_drift_and_noise():
    generator = np.random.default_rng(0)
    drift = np.linspace(2, 1, 400)[:, None] * np.ones(5)
    assert evidence.period_two(drift) == pytest.approx(-1)
    assert evidence.period_two(generator.standard_normal((4000, 5))) == pytest.approx(0.5, abs=0.03)
    swing = np.outer(np.resize([1.0, -1.0], 400), generator.standard_normal(5))
    assert evidence.period_two(drift + swing) > 0.99


def planted_similarity(generator, sizes=(12, 10, 8, 8), noise=0.1):
    """Two pairs: groups 0 and 1 oppose, and 2 and 3."""
    sides = np.repeat(np.arange(len(sizes)), sizes)
    centre = np.eye(2)[sides // 2] * np.where(sides % 2, -1, 1)[:, None]
    rows = np.concatenate([centre, noise * generator.standard_normal((len(sides), 20))], 1)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T, sides


def test_planted_pairs_are_stable():
    similarity, _ = planted_similarity(np.random.default_rng(0))
    found = grouping.group_by_similarity(similarity)
    assert found.pairs() == [(0, 1), (2, 3)]
    stable = stability.resampled(similarity, found)
    assert min(stable.pair.values()) > 0.9
    assert stable.group.min() > 0.9


def looks_and_gradients(generator, sides, count=160, dimensions=12, labels=4):
    """Looks of `count` samples from one Gaussian under random labels, the first ones with a feature of their own, one a
    pair of `sides`; gradients as of a last layer: products of looks and errors."""
    rows = generator.standard_normal((count, dimensions + len(sides)))
    rows[:, dimensions:] = 0
    label = generator.integers(0, labels, count)
    first = 0
    for feature, (a, b) in enumerate(sides):
        rows[first : first + a + b, dimensions + feature] = 12
        label[first : first + a], label[first + a : first + a + b] = 0, 1
        first += a + b
    rows -= rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    errors = np.eye(labels)[label] - 1 / labels
    errors /= np.linalg.norm(errors, axis=1, keepdims=True)
    likeness = rows @ rows.T
    return likeness * (errors @ errors.T), likeness, label


def strongest(similarity, looks, label):
    """The smallest p-value of the pairs that look alike."""
    found = grouping.group_by_similarity(similarity, likeness_MM=looks)
    alike = alike_between(looks, found.group_M)
    null = significance.gaussian_null(similarity, looks, label, rounds=39)
    p_values = [1.0]
    for a, b in found.pairs():
        sizes = len(found.members(a)), len(found.members(b))
        across = similarity[np.ix_(found.members(a), found.members(b))].mean()
        if alike[a, b] >= ALIKE:
            p_values.append(significance.p_value(significance.pair_strength(across, *sizes), null.pair))
    return min(p_values)


def test_a_feature_under_two_labels_is_stronger_than_looks_from_one_gaussian():
    planted = looks_and_gradients(np.random.default_rng(0), [(14, 12), (11, 11)], labels=2)
    assert strongest(*planted) == pytest.approx(1 / 40)


def test_a_random_rotation_is_orthogonal_and_turns_every_way_alike():
    """Of Q A Q' with a uniform Q, E m_11 = tr A / n, E m_11^2 = (2 tr A^2 + (tr A)^2) / (n (n + 2)), and E m_12^2 =
    (n tr A^2 - (tr A)^2) / ((n - 1) n (n + 2))."""
    generator = np.random.default_rng(0)
    large = significance.rotation(150, generator).astype(np.float64)
    np.testing.assert_allclose(large.T @ large, np.eye(150), atol=1e-5)
    spectrum, n = np.array([1.0, 2.0, -4.0, 0.5]), 4
    turns = np.stack([significance.rotation(n, generator) for _ in range(20_000)]).astype(np.float64)
    turned = np.einsum("rij,j,rkj->rik", turns, spectrum, turns)
    trace, square = spectrum.sum(), (spectrum**2).sum()
    for i in range(n):
        assert turned[:, i, i].mean() == pytest.approx(trace / n, abs=0.04)
        assert (turned[:, i, i] ** 2).mean() == pytest.approx((2 * square + trace**2) / (n * (n + 2)), rel=0.04)
        across = (n * square - trace**2) / ((n - 1) * n * (n + 2))
        assert (turned[:, i, (i + 1) % n] ** 2).mean() == pytest.approx(across, rel=0.04)


def test_the_strongest_pair_of_a_round_is_that_of_all_cuts_matched_one_by_one():
    """Held against a search that matches the groups of every cut, and takes the strongest of all pairs."""
    generator = np.random.default_rng(1)
    for _ in range(200):
        rows = generator.standard_normal((90, 4))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        sign = np.where(generator.random(90) < 0.5, 1.0, -1.0)
        looks, noise = rows @ rows.T, 0.1 * generator.standard_normal((90, 90))
        similarity = np.clip(np.outer(sign, sign) * looks + noise + noise.T, -1, 1)
        cut, typical, expected = 0.6 * similarity + 0.4 * looks, likeness.typical_likeness(looks), 0.0
        for chosen in cutting.cut_tree(cut, 3):
            sizes = np.bincount(chosen[chosen >= 0])
            between = between_groups(similarity, chosen)
            alike = likeness.alike_groups(between_groups(looks, chosen), sizes, typical) >= ALIKE
            for a, b in pairing.pairs_of(pairing.match(between, alike, -0.05)):
                expected = max(expected, significance.pair_strength(between[a, b], sizes[a], sizes[b]))

        def draw(_, drawn=(cut, similarity, similarity, looks)):
            return drawn

        assert significance._null(draw, range(1), 3, 0, -0.05)[1][0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("labels", [2, 3, 10])
def test_looks_from_one_gaussian_are_seldom_stronger_than_their_null(labels):
    p_values = [
        strongest(*looks_and_gradients(np.random.default_rng(seed), [], count=120, labels=labels)) for seed in range(12)
    ]
    assert sum(p <= 0.05 for p in p_values) <= 2


def test_white_noise_series_give_no_pair_stronger_than_chance():
    """Groups of the first half of the series are tested on the second, as `cluster --by loss` does."""
    beyond = 0
    for seed in range(30):
        series = np.random.default_rng(seed).standard_normal((60, 24))
        first, second = (np.nan_to_num(grouping.change_correlation(half)) for half in (series[:31], series[30:]))
        found = grouping.group_by_similarity(first, smallest=2)
        if not found.pairs():
            continue
        by_chance = significance.phase_null(series, 99, 2)
        for a, b in found.pairs():
            across = second[np.ix_(found.members(a), found.members(b))].mean()
            strength = significance.pair_strength(across, len(found.members(a)), len(found.members(b)))
            beyond += significance.p_value(strength, by_chance.pair) <= 0.01
    assert beyond <= 1


def test_series_that_only_alternate_are_no_evidence_against_shuffled_phases():
    generator = np.random.default_rng(0)
    sides = np.where(np.arange(24) < 12, 1.0, -1.0)
    losses = np.outer(np.resize([1.0, -1.0], 65), sides * generator.uniform(0.5, 1.5, 24))
    second = np.nan_to_num(grouping.change_correlation(losses))
    found = grouping.group_by_similarity(second, smallest=2)
    assert found.pairs() == [(0, 1)]
    null = significance.phase_null(losses, 99, 2)
    assert significance.p_value(significance.pair_strength(-1.0, 12, 12), null.pair) > 0.05


def test_a_pair_that_resampling_breaks_is_unstable():
    similarity, _ = planted_similarity(np.random.default_rng(0), sizes=(6, 6), noise=0.5)
    found = grouping.group_by_similarity(similarity, smallest=2)
    assert found.pairs()
    for back in stability.resampled(similarity, found, smallest=2).pair.values():
        assert back < 0.9


def test_members_that_single_checkpoints_put_elsewhere_are_counted():
    similarity, _ = planted_similarity(np.random.default_rng(0))
    found = grouping.group_by_similarity(similarity)
    means = group_means(similarity, found.group_M)
    swapped = means.copy()
    member = found.members(0)[0]
    swapped[member] = means[found.members(1)[0]]
    kept = stability.kept_at_checkpoints(np.stack([means, swapped]), found)
    assert kept[1:].tolist() == [1, 1, 1]
    assert kept[0] == pytest.approx(1 - 0.5 / len(found.members(0)))


def test_a_feature_can_have_two_partners():
    between = np.array([[0.9, -0.8, -0.7, 0], [-0.8, 0.9, 0.2, 0], [-0.7, 0.2, 0.9, -0.1], [0, 0, -0.1, 0.9]])
    groups = np.repeat(np.arange(4), [9, 8, 7, 6])
    similarity = between[np.ix_(groups, groups)]
    matched = grouping.group_by_similarity(similarity)
    found = grouping.pair_anew(similarity, matched, np.ones((4, 4), bool))
    assert found.partner_G.tolist() == [1, 0, 0, -1]
    assert found.pairs() == [(0, 1), (0, 2)]
    assert found.own_pairs() == {0: 0, 1: 0, 2: 1}


def test_preferred_pairs_come_before_stronger_ones():
    between = np.array([[0.9, -0.5, -0.6, 0], [-0.5, 0.9, 0, -0.7], [-0.6, 0, 0.9, 0], [0, -0.7, 0, 0.9]])
    groups = np.repeat(np.arange(4), [9, 8, 7, 6])
    similarity = between[np.ix_(groups, groups)]
    matched = grouping.group_by_similarity(similarity)
    assert matched.pairs() == [(0, 2), (1, 3)]
    preferred = np.zeros((4, 4), bool)
    preferred[0, 1] = preferred[1, 0] = True
    found = grouping.pair_anew(similarity, matched, preferred)
    assert found.partner_G.tolist() == [1, 0, 0, 1]
    assert found.own_pairs() == {0: 0, 1: 0, 2: 1, 3: 2}


def test_the_silhouette_is_scikit_learns():
    from sklearn.metrics import silhouette_score

    generator = np.random.default_rng(0)
    similarity, groups = planted_similarity(generator, noise=0.4)
    groups[generator.random(len(groups)) < 0.2] = -1
    inside = groups >= 0
    distance = np.clip(1 - similarity[np.ix_(inside, inside)], 0, 2)
    np.fill_diagonal(distance, 0)
    expected = silhouette_score(distance, groups[inside], metric="precomputed")
    assert cutting.silhouette(similarity, groups) == pytest.approx(expected)


def test_series_that_share_more_than_their_period_are_significant():
    generator = np.random.default_rng(3)
    shared = generator.standard_normal(200)
    a, b = (shared + 0.5 * generator.standard_normal(200) for _ in range(2))
    assert significance.series_p_value(a, -b) <= 0.01
    assert significance.series_p_value(a, b) > 0.9
    p_values = [significance.series_p_value(*generator.standard_normal((2, 101)), seed=i) for i in range(200)]
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
    partner = pairing.oppose(between, np.arange(7))
    assert all(partner[partner[g]] == g for g in range(7) if partner[g] >= 0)
    assert all(between[a, b] <= pairing.OPPOSES for a, b in pairing.pairs_of(partner))
    best = min(
        sum(min(between[a, b], 0) * (between[a, b] <= pairing.OPPOSES) for a, b in zip(p[:6:2], p[1:6:2], strict=True))
        for p in itertools.permutations(range(7))
    )
    assert sum(between[a, b] for a, b in pairing.pairs_of(partner)) <= 0.9 * best


def test_parts_of_a_side_are_one_again_where_they_look_alike():
    """A side in two loose parts, 0 and 1, against a third group that looks the same; tight parts stay two."""
    tight = np.array([[0.95, 0.5, -0.6], [0.5, 0.95, -0.6], [-0.6, -0.6, 0.95]])
    loose = np.array([[0.8, 0.5, -0.6], [0.5, 0.8, -0.6], [-0.6, -0.6, 0.95]])
    apart = np.array([[0.8, 0.3, -0.6], [0.3, 0.8, -0.6], [-0.6, -0.6, 0.95]])  # alike, but hardly moving together
    groups = np.repeat(np.arange(3), [9, 8, 7])
    square = np.ix_(groups, groups)

    def sides(between, alike):
        likeness = np.full((3, 3), 0.95)
        likeness[0, 1] = likeness[1, 0] = alike
        return grouping.group_by_similarity(between[square], likeness_MM=likeness[square]).group_M.tolist()

    assert grouping.group_by_similarity(tight[square]).group_M.tolist() == groups.tolist()
    assert sides(loose, 0.8) == [0] * 17 + [1] * 7
    assert sides(tight, 0.8) == sides(loose, 0.2) == sides(apart, 0.8) == groups.tolist()


def test_what_moves_together_by_its_label_alone_is_told_apart_by_its_looks():
    """Two groups of one class whose gradients align at 0.7: one group by gradients, two by looks."""
    between = np.array([[0.9, 0.7, -0.7], [0.7, 0.9, -0.1], [-0.7, -0.1, 0.9]])
    groups = np.repeat(np.arange(3), [9, 8, 7])
    square = np.ix_(groups, groups)
    likeness = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert grouping.group_by_similarity(between[square]).group_M.tolist() == [0] * 17 + [1] * 7
    found = grouping.group_by_similarity(between[square], likeness_MM=likeness[square])
    assert found.group_M.tolist() == groups.tolist()


def test_a_group_left_over_takes_a_preferred_partner_before_a_stronger_one():
    between = np.array([[0.9, -0.8, -0.3, -0.6], [-0.8, 0.9, 0, 0], [-0.3, 0, 0.9, 0.1], [-0.6, 0, 0.1, 0.9]])
    groups = np.repeat(np.arange(4), [9, 8, 7, 6])
    similarity = between[np.ix_(groups, groups)]
    preferred = np.zeros((4, 4), bool)
    preferred[0, 1] = preferred[1, 0] = preferred[0, 2] = preferred[2, 0] = True
    found = grouping.pair_anew(similarity, grouping.group_by_similarity(similarity), preferred)
    assert found.partner_G.tolist() == [1, 0, 0, 0]
    between[2, 3] = between[3, 2] = -0.5
    found = grouping.pair_anew(between[np.ix_(groups, groups)], found, preferred)
    assert found.partner_G.tolist() == [1, 0, 0, 0]  # 3 opposes 0 more than 2, and 2 rather takes the preferred 0


def test_no_more_join_a_group_than_were_mined_and_those_that_align_most_do():
    found = grouping.Grouping(np.array([0, 0, 1]), np.array([1, 0]), np.array([0.8, 0.9, 0.7]))
    means = np.array([[0.6, -0.6], [0.9, -0.9], [0.7, -0.7], [-0.8, 0.8], [-0.9, 0.9]])
    group, _ = grouping.join(means, found, np.full((5, 2), 0.9))
    assert group.tolist() == [-1, 0, 0, -1, 1]


def test_likeness_across_is_held_against_likeness_within():
    """Loose sides of one feature are as alike across as within; tight clusters with other looks are not."""
    groups = np.repeat([0, 1, 2], 5)
    likeness = np.array([[0.3, 0.28, 0.1], [0.28, 0.3, 0.1], [0.1, 0.1, 0.5]])[np.ix_(groups, groups)]
    np.fill_diagonal(likeness, 1)
    alike = alike_between(likeness, groups)
    assert alike[0, 1] == pytest.approx(0.28 / 0.3)
    assert alike[0, 2] == pytest.approx(0.1 / np.sqrt(0.3 * 0.5))
    whole_classes = np.random.default_rng(0).standard_normal((40, 40)) * 0.2  # hardly alike in themselves, by chance
    assert abs(alike_between(whole_classes + whole_classes.T, np.repeat([0, 1], 20))[0, 1]) < 0.2


def test_the_dying_swing_of_silent_samples_is_told_from_the_slowly_dying_one_of_controls():
    """At the edge a silent pair's swing is gone in two steps, and the controls' is halved in three."""
    swing = np.resize([1.0, -1.0], silencing.LENGTH + 1)[:, None]
    step = np.arange(silencing.LENGTH + 1)[:, None]
    found = silencing.compared(40, [np.arange(2), np.arange(2, 4)], *(swing * [1, 1, -1, -1] * rate**step
                               for rate in (1.0, 0.1, 0.8)))  # fmt: skip
    assert 1 - found.controls / found.plain == pytest.approx(0.45, abs=0.1)
    assert found.ratio < 0.15


def test_pairs_are_not_silenced_from_checkpoints_without_the_optimizers_state(opsig, tmp_path):
    """bfloat16 checkpoints leave the momentum out: a replay would begin with none, and not go on as the run did."""
    run = tmp_path / "run.h5"
    train = ("train", "--task", "planted:samples=300,side=12,pairs=2", "--optimizer", "momentum", "--learning-rate",
             "0.05", "--steps", "60", "--track", "--checkpoint-every", "5", "-o", run)  # fmt: skip
    assert opsig(*train, "--checkpoint-dtype", "bfloat16").code == 0
    result = opsig("cluster", run)
    pairs = [record for record in result.records if record["kind"] == "pair"]
    assert pairs
    assert not any(pair["silenced"] for pair in pairs)
    tested = [pair["reason"] for pair in pairs if "held-out checkpoints the sides pull apart" in pair["reason"]]
    assert tested
    assert all("lack the optimizer's state" in reason for reason in tested)
    assert result.records[-1]["replays"] == 0


def test_one_side_that_swings_by_itself_does_not_make_a_pair():
    """Silence ends the swing of samples 0 to 2 and not that of 3 and 4, whose swing is a tenth as large."""
    swing = np.resize([1.0, -1.0], 17)[:, None]
    plain, silent = swing * [1, 1, 1, 0.1, 0.1], swing * [0, 0, 0, 0.1, 0.1]
    found = silencing.compared(40, [np.arange(3), np.arange(3, 5)], plain, silent, plain)
    assert found.silent / found.controls < 0.1
    assert found.ratio == pytest.approx(1)


def test_a_pair_at_rest_in_a_run_that_swings_is_said_to_be_so_where_a_sample_has_no_loss():
    plain = np.resize([1.0, -1.0], (silencing.LENGTH + 1, 1)) * np.array([0.0, 0.0, 1.0, 1.0, np.nan])
    assert silencing._why_not({40: plain}, [np.array([0]), np.array([1])]).startswith("its losses do not swing")


def test_losses_that_a_file_lacks_are_not_read_where_checkpoints_of_consecutive_steps_stand_for_them():
    """As around a spike of a run that holds sightings alone."""
    file = SimpleNamespace(has=lambda name: False, steps=lambda group: np.arange(0))
    view = SimpleNamespace(_run=file, has=lambda name: True, steps=lambda group: np.arange(40, 50))
    assert silencing.recorded(view, 40) is None  # pyright: ignore


def apart(*ratios):
    return [Silenced(40 * place, 1.0, ratio * 0.9, 0.9, ratio) for place, ratio in enumerate(ratios, 1)]


@pytest.mark.parametrize(
    ("known", "verdict"),
    [
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.1, 0.2, 0.2)), "established"),
        (Evidence(-0.4, -0.3, 1.0, 0.7, apart(0.1, 0.2, 0.2)), "established"),  # what swings is decided by intervention
        (Evidence(-0.4, -0.3, 1.0, 0.7, apart(0.1, 0.6, 0.2, 0.2)), "established"),
        (Evidence(-0.4, -0.3, 1.0, 0.3, apart(0.1, 0.2)), "likely"),  # at two checkpoints it may be by chance
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.1, 0.7, 0.2)), "likely"),  # seen at two, and not at the third
        (Evidence(-0.4, -0.3, 0.01, 0.5, apart(0.1, 0.2, 0.3)), "likely"),  # labels oppose without a shared look
        (Evidence(-0.4, -0.3, 0.01, 0.7, apart(0.1, 0.2, 0.3)), "established"),
        (Evidence(-0.4, -0.3, 0.01, 0.5, apart(0.1, 0.2, 0.3), labelled=False), "established"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, curved=(0.1, 0.2, 0.6, 0.2)), "established"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, curved=(0.1, 0.2)), "established"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, curved=(0.1, 0.35, 0.4, 0.2)), "likely"),  # the curvature is mostly others'
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.8, 0.7), curved=(0.1, 0.2, 0.1)), "established"),  # swung by others
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.8, 0.7), curved=(0.1, 0.6, 0.1)), "likely"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, curved=(0.1, 0.6)), "likely"),
        (Evidence(-0.4, -0.3, 0.2, 0.9, curved=(0.1, 0.2, 0.1)), "unclear"),
        (Evidence(-0.4, -0.3, 0.2, 0.9, apart(0.1, 0.7, 0.2)), "likely"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.1, 0.7)), "unclear"),
        (Evidence(-0.4, -0.3, 0.5, 0.7, apart(0.8, 0.7)), "refuted"),
        (Evidence(-0.4, -0.3, 0.5, 0.9, apart(0.8, 0.7)), "unclear"),  # they oppose, and others swing them
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.8, 0.7)), "likely"),
        (Evidence(-0.4, 0.01, 0.01, 0.9, apart(0.1, 0.2)), "unclear"),
        (Evidence(-0.1, -0.05, 0.01, 0.7, apart(0.1, 0.2)), "refuted"),
        (Evidence(-0.1, -0.05, 0.01, 0.9, apart(0.1, 0.2, 0.1)), "established"),  # looks alike: under several labels
        (Evidence(-0.04, -0.02, 0.01, 0.9, apart(0.1, 0.2)), "refuted"),
        (Evidence(-0.4, float("nan"), 0.01, 0.9, apart(0.1, 0.2)), "unclear"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.1, float("nan"))), "unclear"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.1)), "likely"),  # seen once: whose curvature it is decides
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.1), curved=(0.1, 0.1, 0.3, 0.2)), "established"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.1), curved=(0.1, 0.4, 0.4, 0.2)), "likely"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.3, 0.4, 1.4, 0.4)), "likely"),  # not in the mean
        (Evidence(-0.4, -0.3, 0.2, 0.9, apart(0.1)), "likely"),
        (Evidence(-0.4, -0.3, 0.01, 0.9, apart(0.6)), "unclear"),
        (Evidence(-0.4, -0.3, 0.01, 0.9), "likely"),  # neither silence nor curvature could be measured
        (Evidence(-0.4, -0.3, 0.01, 0.7), "unclear"),
        (Evidence(-0.4, -0.3, 0.01, float("nan")), "likely"),
        (Evidence(-0.4, -0.3, float("nan"), 0.9), "unclear"),
        (Evidence(-0.4, -0.3, 0.01, float("nan"), apart(0.1, 0.2, 0.3)), "likely"),
        (Evidence(-0.4, -0.3, 0.2, 0.9), "unclear"),
    ],
)
def test_the_verdict_on_a_pair(known, verdict):
    assert judge(known)[0] == verdict


def test_more_samples_than_memory_has_room_for_are_refused_before_anything_is_measured(opsig, tiny_run, monkeypatch):
    monkeypatch.setattr("opsig_cli.studies.clustering.asked.MOST_GROUPED", 20)
    found = opsig("cluster", tiny_run, "--task", f"{tiny.__file__}:Tiny", "--top", 12)
    assert found.code == 1
    assert "24 samples cannot be compared with each other" in found.err
    assert "Give at most 10" in found.err
    found = opsig("cluster", tiny_run, "--task", f"{tiny.__file__}:Tiny", "--top", 50)  # of 60, and all with others
    assert "60 samples cannot be compared with each other" in found.err
    assert "Give at most 10" in found.err


def phase_shuffled(series_TM, generator):
    """Every column with the power of all its frequencies and random phases, (T, M) (Theiler et al. 1992)."""
    spectrum = np.fft.rfft(series_TM, axis=0)
    phases = significance._phases(spectrum.shape, len(series_TM), generator)
    return np.fft.irfft(spectrum * phases, len(series_TM), axis=0)


@pytest.mark.parametrize("steps", [40, 41])
def test_products_of_shuffled_series_by_their_spectra_are_those_of_the_series(steps):
    """The p-value of a series held against surrogates that are made, with the same phases."""
    generator = np.random.default_rng(3)
    a, b = generator.standard_normal((2, steps)) + 0.3 * np.resize([1.0, -1.0], steps)
    draws = np.random.default_rng(0)
    a_, b_ = a - a.mean(), b - b.mean()
    products = [b_ @ phase_shuffled(a_[:, None], draws)[:, 0] for _ in range(99)]
    exact = (1 + np.sum(products <= a_ @ b_)) / 100
    assert significance.series_p_value(a, b) == pytest.approx(exact)
    surrogate = phase_shuffled(a_[:, None], draws)[:, 0]
    np.testing.assert_allclose(np.abs(np.fft.rfft(surrogate)), np.abs(np.fft.rfft(a_)), atol=1e-5)


def test_who_cannot_join_is_not_asked_and_who_joins_is_the_same(opsig, tmp_path, monkeypatch):
    """Against gradients of everybody at every checkpoint."""
    from opsig_cli.studies.clustering import joining

    run = tmp_path / "run.h5"
    opsig("train", "--task", "digits", "--learning-rate", 0.3, "--steps", 40, "--track", "-o", run)

    def members():
        found = opsig("cluster", run, "--test", "none", "--top", 40, "--replace")
        assert found.code == 0
        return sorted((r["sample"], r["group"]) for r in found.records if r["kind"] == "member")

    asked = []
    inner = joining.gathering.group_cosines

    def counting(run, session, steps, position, sets):
        asked.append(len(steps) * len(position))
        return inner(run, session, steps, position, sets)

    monkeypatch.setattr(joining.gathering, "group_cosines", counting)
    few = members()
    spent = sum(asked)
    asked.clear()
    monkeypatch.setattr(joining, "RESEMBLES", -2)
    monkeypatch.setattr(grouping, "may_belong", lambda means_NG, found: np.ones(len(means_NG), bool))
    assert members() == few
    assert any(group >= 0 for _, group in few)
    assert spent < 0.8 * sum(asked)
