import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsig_cli.analysis import mining
from opsig_cli.analysis.period_two import TILE


def planted(steps=200, samples=50, alternating=(3, 7), seed=0):
    """Slowly falling losses with noise of 1e-3, and samples that alternate by 0.5 from step 100 on, 7 against 3."""
    generator = np.random.default_rng(seed)
    losses = np.linspace(2, 1, steps)[:, None] + 1e-3 * generator.standard_normal((steps, samples))
    swing = 0.5 * (-1.0) ** np.arange(steps) * (np.arange(steps) >= 100)
    for sign, sample in zip((1, -1), alternating, strict=True):
        losses[:, sample] += sign * swing
    return losses.astype(np.float32)


def test_samples_that_alternate_are_found_first_with_the_losses_around_their_change():
    losses = planted()
    moved = mining.oscillation([losses])
    assert set(mining.top(moved.score, 2)) == {3, 7}
    for sample in (3, 7):
        place = moved.place[sample]
        assert moved.before[sample] == losses[place - 1, sample]
        assert moved.after[sample] == losses[place, sample]
        assert abs(moved.after[sample] - moved.before[sample]) == pytest.approx(1.0, abs=0.02)


def test_alternation_is_seen_where_it_begins_and_nowhere_in_smooth_losses():
    assert 100 <= mining.oscillation([planted()]).first_alternation <= 100 + mining.WIDTH
    smooth = np.exp(-np.arange(200)[:, None] / np.linspace(20, 90, 30)).astype(np.float32)
    assert mining.oscillation([smooth]).first_alternation is None
    drifting = smooth + 1e-5 * (-1.0) ** np.arange(200)[:, None].astype(np.float32)
    assert mining.oscillation([drifting]).first_alternation is None
    noise = np.random.default_rng(0).standard_normal((2000, 40)).astype(np.float32)
    assert mining.oscillation([noise]).first_alternation is None


def test_losses_that_only_fall_do_not_alternate_however_unevenly():
    generator = np.random.default_rng(0)
    uneven = np.where(np.arange(200) % 2, 0.02, 0.0)[:, None] * generator.random(30)  # every other step falls
    growing = uneven * np.exp(np.arange(200) / 20)[:, None]
    cliff = np.zeros((200, 30))
    cliff[150] = 5  # one fall, and next to none after it
    for falls in (uneven, growing, growing[::-1], cliff, cliff + 1e-6 * uneven):
        losses = (10 - np.cumsum(falls, 0)).astype(np.float32)
        assert np.nanmax(mining.oscillation([losses]).alternation_T) <= 0.5**0.5 + 1e-4
        assert mining.oscillation([losses]).first_alternation is None


def test_the_last_two_steps_of_a_run_are_no_alternation():
    losses = planted()[:120]
    first = mining.oscillation([losses]).first_alternation
    for end in range(first + 1, first + mining.LASTS):
        assert mining.oscillation([losses[: end + 1]]).first_alternation is None
    assert mining.oscillation([losses[: first + mining.LASTS + 1]]).first_alternation == first


@pytest.mark.parametrize("samples", [6, TILE + 9])
def test_the_score_is_the_mean_of_second_differences_over_sixteen_steps_relative_to_all_samples(samples):
    losses = planted(steps=120, samples=samples, alternating=(1, samples - 2)).astype(np.float64)
    sign = (-1.0) ** np.arange(120)
    e = sign[1:-1, None] * (losses[2:] - 2 * losses[1:-1] + losses[:-2]) / 4
    changes = np.diff(losses, axis=0) ** 2
    changes = (changes[1:] + changes[:-1]) / 2
    means = np.array([e[t : t + 16].mean(0) for t in range(len(e) - 15)])
    scaled = np.abs(means) / np.sqrt((means**2).mean(1, keepdims=True))
    alternates = np.sqrt((means**2).sum(1)) > mining.ALTERNATES * np.sqrt(
        np.array([(changes[t : t + 16] / 4).sum(1).mean() for t in range(len(e) - 15)])
    )
    moved = mining.oscillation([losses.astype(np.float32)])
    assert moved.score == pytest.approx(scaled[alternates].max(0), rel=1e-4)


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(1, 119), max_size=6, unique=True))
def test_blocks_of_any_height_give_the_same_answer(cuts):
    losses = planted(steps=120, samples=9)
    blocks = np.split(losses, sorted(cuts))
    for scan in (mining.oscillation, mining.largest_changes, mining.variation, mining.surprise):
        whole, pieces = scan([losses]), scan(blocks)
        for name in ("score", "place", "before", "after", "mean_T", "alternation_T"):
            rounding = 1e-6 if name == "score" else 0
            np.testing.assert_allclose(getattr(whole, name), getattr(pieces, name), rtol=rounding)


def test_the_largest_change_is_found_by_size_whatever_its_sign():
    losses = np.zeros((5, 3), np.float32)
    losses[2:, 0] = -2
    losses[4, 1] = 1
    moved = mining.largest_changes([losses])
    assert moved.score.tolist() == [2, 1, 0]
    assert moved.place.tolist()[:2] == [2, 4]


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="1 rows are too few: at least 2"):
        mining.largest_changes([np.zeros((1, 3), np.float32)])
    with pytest.raises(ValueError, match="17 rows are too few: at least 18"):
        mining.oscillation([np.zeros((17, 3), np.float32)])


def test_variation_sums_all_changes():
    losses = planted(steps=120, samples=9).astype(np.float64)
    moved = mining.variation([losses.astype(np.float32)])
    np.testing.assert_allclose(moved.score, np.abs(np.diff(losses, axis=0)).sum(0), rtol=1e-5)


def test_surprise_finds_what_a_sample_did_not_do_before():
    losses = 1e-3 * np.random.default_rng(0).standard_normal((200, 20)).astype(np.float32)
    losses[:, 3] += 0.4 * (-1.0) ** np.arange(200)  # always moves, and more than any other
    losses[150:, 11] += 0.3
    moved = mining.surprise([losses])
    assert mining.top(moved.score, 1).tolist() == [11]
    assert moved.place[11] == 150
    changes = np.abs(np.diff(losses.astype(np.float64), axis=0))
    history = changes[149 - mining.WIDTH : 149].mean(0)
    assert moved.score[11] == pytest.approx(changes[149, 11] / (history[11] + history.mean()), rel=1e-4)
    assert mining.top(mining.largest_changes([losses]).score, 1).tolist() != [11]


@pytest.mark.parametrize("scan", [mining.oscillation, mining.largest_changes, mining.variation, mining.surprise])
def test_only_rises_or_only_falls_count_where_asked(scan):
    losses = planted()
    losses[150:, 11] += 3  # rises once, never falls by much
    losses[160:, 12] -= 3
    scores = {direction: scan([losses], direction) for direction in ("up", "down", "both")}
    for direction, sign in (("up", 1), ("down", -1)):
        found = scores[direction]
        chosen = mining.top(found.score, 2)
        assert (sign * (found.after - found.before)[chosen] > 0).all()
        assert (found.score <= scores["both"].score * (1 + 1e-6)).all()
    if scan is not mining.oscillation:
        assert scores["up"].score[11] > 2 * scores["down"].score[11]
        assert scores["down"].score[12] > 2 * scores["up"].score[12]
    if scan is mining.variation:
        np.testing.assert_allclose(scores["up"].score + scores["down"].score, scores["both"].score, rtol=1e-5)


def test_the_largest_scores_come_first_and_equal_ones_in_order():
    generator = np.random.default_rng(0)
    for count in (1, 2, 7, 40):
        score = generator.integers(0, 5, count).astype(np.float32)
        score[generator.random(count) < 0.2] = np.nan
        for wanted in (0, 1, 3, count):
            assert mining.top(score, wanted).tolist() == np.argsort(-score, kind="stable")[:wanted].tolist()
