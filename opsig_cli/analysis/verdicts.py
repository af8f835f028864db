"""What the tests of a pair come to, in a word, with the reason.

The thresholds are the same for every task, model and number of classes; docs/grouping.md argues for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opsig_cli.analysis.likeness import ALIKE
from opsig_cli.analysis.pairing import opposing

VERDICTS = ("established", "likely", "unclear", "refuted")
"""In the order in which pairs are shown."""
LEVEL = 0.05
"""Chance of a pair in a run where there is none, to which the p-value and the interval over checkpoints are held."""
SILENCES = 0.5
"""A pair makes its own swing where, with both sides silent, less than this part remains of what remains when others
with the same labels are silent: more than half of it is then the pair's."""
REPLAYS = 3
"""Held-out checkpoints at which this must be seen, each with controls of its own, with at most one at which it is not,
for silence alone to decide: at one or two it often is by chance. The same is asked of the curvature of a pair that
silence does not decide."""
OWN = 1 / 3
"""The curvature that a pair feels is its own where less than this part of it remains without the pair: planted pairs
are at 0.00 to 0.1, under momentum up to 0.31; pairs by chance, whose gradients align with many others' in part, at 0.4
to 1, and neighbouring clusters of two labels from 0.34 on."""

RELATED = 0.6
"""Least likeness of sides for silence to establish a pair where samples have labels: sides that share no look, and
oppose by their labels alone, are at 0.2 to 0.6. Without labels being stronger than chance stands in for it."""


@dataclass(frozen=True)
class Silenced:
    """A pair's swing at one held-out checkpoint, in nats: with all training, with both sides silent, and with as many
    others of the same labels silent. `ratio` is R: what remains with both sides silent over what remains with the
    controls silent, of the side of which more remains; one side that swings by itself does not make a pair."""

    step: int
    plain: float
    silent: float
    controls: float
    ratio: float


@dataclass(frozen=True)
class Evidence:
    """What is known of a pair. `opposition` over held-out checkpoints, and the upper end `high` of its interval;
    `p_value` of its strength, or of its family's strongest pair; `alike`: likeness across over that within, NaN
    where there are no features; `silenced` where it swings and training was repeated, else `untested` says why it
    was not; then `curved` has R of the curvature along its sides' gradients at each held-out checkpoint, where that
    was measured. `labelled`: samples have labels, by which sides may oppose that share nothing else. `at_ends`: it
    was found at the ends of leading eigenvectors, along which everything swings: silence alone then says nothing
    new of it."""

    opposition: float
    high: float
    p_value: float
    alike: float
    silenced: Sequence[Silenced] = ()
    untested: str = ""
    labelled: bool = True
    curved: Sequence[float] = ()
    at_ends: bool = False


def remains(silenced: Sequence[Silenced]) -> float:
    """R over all checkpoints: their mean, by how much a pair swings at each.

    >>> remains([Silenced(40, 0.02, 0.02, 0.01, 2.0), Silenced(60, 0.98, 0.2, 0.8, 0.25)])
    0.285
    """
    return sum(one.plain * one.ratio for one in silenced) / sum(one.plain for one in silenced)


def speaks(found: Evidence) -> bool:
    """Whether all speaks for a pair that silence and curvature do not decide: it pulls apart, looks alike, and is
    stronger than chance."""
    apart = found.opposition <= opposing(found.alike, found.labelled) and found.high < 0
    return bool(apart and found.p_value <= LEVEL and found.alike >= ALIKE)


def asks_for_curvature(found: Evidence, others_swing: bool) -> bool:
    """Whether all speaks for a pair that silence does not decide, and whose curvature it is then may: it swings at few
    checkpoints or none, or swings on, and there is an established pair that may swing it."""
    swings_on = any(one.ratio >= SILENCES for one in found.silenced)
    return speaks(found) and judge(found)[0] != "established" and (others_swing or not swings_on)


def judge(found: Evidence) -> tuple[str, str]:
    """A verdict and its reason, which completes a sentence.

    >>> apart = [Silenced(step, 1.0, 0.05, 0.9, 0.06) for step in (40, 80, 120)]
    >>> judge(Evidence(-0.4, -0.3, 0.01, 0.9, apart))[0], judge(Evidence(-0.1, -0.05, 0.01, 0.7, apart))[0]
    ('established', 'refuted')
    """
    if math.isnan(found.high):
        return "unclear", "too few checkpoints are left to test it on that had no part in finding it"
    if found.opposition > opposing(found.alike, found.labelled):
        return "refuted", "at checkpoints that had no part in finding it, the sides hardly pull apart"
    if found.high >= 0:
        return "unclear", "at checkpoints that had no part in finding it, the sides do not pull apart for certain"
    ratios = [one.ratio for one in found.silenced]
    if not all(map(math.isfinite, ratios)):
        return "unclear", "its losses or those of its controls do not move when training is repeated"
    if math.isnan(found.p_value):
        return "unclear", "its chance is not known"
    chance = "" if found.p_value <= LEVEL else f"chance is not excluded (p = {found.p_value:.2g})"
    looks = "" if found.alike >= ALIKE else f"their likeness across is only {found.alike:.2f} of that within"
    if math.isnan(found.alike):
        looks = "it is not known whether the sides look alike"
    lacks = ", and ".join(filter(None, (chance, looks)))
    pull = "pull apart and look alike" if chance else "pull apart, look alike, and are stronger than chance"
    goes = sum(ratio < SILENCES for ratio in ratios)
    stays = len(ratios) - goes
    if own_curvature(found.curved) and stays and not lacks:
        others = f"others swing the sides when they are silent, {_at(stays, len(ratios))}"
        return "established", f"{others}; but they {pull}, and {_whose(found.curved)}"
    if goes >= REPLAYS and stays <= 1 and remains(found.silenced) < SILENCES:
        why = "the swing of both sides goes when they are silent" + f", {_at(goes, len(ratios))}" * stays
        if found.at_ends and (chance or (looks and found.labelled)):
            why += ", as at any two ends of an eigenvector"
            return ("unclear" if chance else "likely"), f"{why}, but {lacks}"
        related = found.alike >= RELATED or not (found.labelled or chance)
        return ("established", why) if related else ("likely", f"{why}, but {lacks}")
    if not goes and stays >= 2:
        if looks:
            return "refuted", "the sides swing on when they are silent: others swing them"
        whose = f", and {_whose(found.curved)}" if found.curved else ""
        why = f"the sides {pull}, but swing on when they are silent: others swing them{whose}"
        return ("unclear" if chance else "likely"), why
    if stays and stays >= goes:
        if not goes:
            return "unclear", "the sides swing at one checkpoint of those tested, and others swing them there"
        return "unclear", f"silent sides lose their swing {_at(goes, len(ratios))} and keep it elsewhere"
    mean = ", but not in the mean of all" if goes >= REPLAYS and stays <= 1 else ""
    swings = f"the swing of both sides goes when they are silent, {_at(goes, len(ratios))} where they swing{mean}; "
    why = (swings if ratios else f"{found.untested}; " if found.untested else "") + "on held-out checkpoints the sides "
    if lacks:
        likely = ratios or (math.isnan(found.alike) and not chance)
        return ("likely" if likely else "unclear"), f"{why}pull apart, but {lacks}"
    if own_curvature(found.curved):
        return "established", f"{why}{pull}, and {_whose(found.curved)}"
    whose = "" if stays and not found.curved else f", but {_whose(found.curved)}"
    return "likely", f"{why}{pull}{whose}"


def own_curvature(ratios: Sequence[float]) -> bool:
    """Whether the curvature along the sides' gradients is a pair's own at all checkpoints, or at REPLAYS of them with
    at most one at which it is not."""
    goes = sum(ratio < OWN for ratio in ratios)
    return bool(ratios) and (goes == len(ratios) or (goes >= REPLAYS and len(ratios) - goes <= 1))


def settled(ratios: Sequence[float], left: int) -> bool:
    """Whether so many more checkpoints cannot change `own_curvature`.

    >>> settled([0.1, 0.2, 0.1], 1), settled([0.1, 0.4], 2), settled([0.6, 0.4], 2)
    (True, False, True)
    """
    return own_curvature([*ratios, *[0.0] * left]) == own_curvature([*ratios, *[math.inf] * left])


def _whose(ratios: Sequence[float]) -> str:
    """Words for it."""
    if not ratios:
        return "it is not known whether the curvature that they feel is their own"
    goes = sum(ratio < OWN for ratio in ratios)
    if own_curvature(ratios):
        return f"the curvature that they feel is their own, {_at(goes, len(ratios))} measured"
    return (
        f"of the curvature that they feel a third or more is others', {_at(len(ratios) - goes, len(ratios))} measured"
    )


def _at(some: int, checkpoints: int) -> str:
    """Words for some of the checkpoints.

    >>> _at(1, 1), _at(2, 2), _at(3, 3), _at(2, 3)
    ('at the one checkpoint', 'at both checkpoints', 'at all 3 checkpoints', 'at 2 of 3 checkpoints')
    """
    if some < checkpoints:
        return f"at {some} of {checkpoints} checkpoints"
    return {1: "at the one checkpoint", 2: "at both checkpoints"}.get(some, f"at all {some} checkpoints")
