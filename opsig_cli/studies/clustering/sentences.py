"""Groups and pairs in words."""

from __future__ import annotations

import numpy as np

from opsig_cli.analysis.likeness import ALIKE
from opsig_cli.analysis.mining import ALTERNATES
from opsig_cli.studies.clustering.clusters import Clusters, GroupWeight, PairWeight
from opsig_cli.studies.numbers import percent, plus_minus, short, with_unit


def describe(mix: dict[str, int] | None, size: int) -> str:
    """A group's members in words: the label that nine in ten share, or the two most common.

    >>> describe({"Coat": 12, "Shirt": 9, "Bag": 2, "Dress": 1}, 24)
    '12 x Coat, 9 x Shirt, 3 more'
    """
    if not mix:
        return f"{size} samples"
    if size > 2 and max(mix.values()) == 1:  # labels of their own, as the inputs of a regression have
        return f"{size} samples, as {short(next(iter(mix)))}"
    common = list(mix.items())[:2] if next(iter(mix.values())) < 0.9 * size else list(mix.items())[:1]
    rest = size - sum(count for _, count in common)
    words = [f"{count} x {short(label)}" for label, count in common]
    return ", ".join(words + ([f"{rest} more"] if rest else []))


def pair_sentence(
    names: tuple[str, str], weight: PairWeight, apart_step: int | None, measure: str = "cosine", where: str = "",
    other_label: bool | None = None, unit: str = "",
) -> str:  # fmt: skip
    """A pair in words: what it is and, where it is not established, why not; a sentence asserts no more than was seen.

    `apart_step`: a step at which the two sides' losses move apart; `where`: what the contexts of text share;
    `other_label`: whether the sides have different labels, None without labels; `unit`: of the losses.
    """
    cosine = plus_minus(weight.opposition, weight.opposition_error)
    if weight.verdict == "established":
        text = f"{names[0]} and {names[1]} pull against each other{where}: {measure} {cosine}"
    else:
        held = "" if measure != "cosine" else " on held-out checkpoints"
        text = f"{weight.verdict.capitalize()}: {names[0]} and {names[1]} have {measure} {cosine} across{held}{where}"
    if weight.alike >= ALIKE:
        text += ", same look" + ("" if other_label is None else f", {'other' if other_label else 'same'} label")
    if weight.verdict != "established":
        text += f"; {weight.reason}"
    if weight.silenced:
        removed, controls = removed_by_silence(weight)
        text += f". Silencing both sides {_removes(removed)} their swing"
        text += f"; silencing as many others of the same labels {_removes(controls)} it" * (other_label is not None)
        text += f"; silencing as many others {_removes(controls)} it" * (other_label is None)
    if weight.curved and weight.verdict == "established":
        text += (
            f". Without both sides {np.median(weight.curved):.0%} is left of the curvature along their gradients that"
        )
        text += " is left without as many others"
    if weight.verdict in ("established", "likely") and weight.apart is not None:
        _, up, down = weight.apart
        text += f". At step {apart_step} their losses changed by {up:+.2g} and {with_unit(f'{down:+.2g}', unit)}"
        text += f", {percent(weight.apart_movement)} of all movement"
    elif weight.verdict in ("established", "likely"):
        text += ". Their losses never move apart in these steps: they do not swing yet"
    return text


def removed_by_silence(weight: PairWeight) -> tuple[float, float]:
    """The part of a pair's swing that silencing both sides removes, and that silencing as many others does, means over
    the checkpoints replayed; NaN where none was."""
    if not weight.silenced:
        return float("nan"), float("nan")
    rows = [(1 - one.silent / one.plain, 1 - one.controls / one.plain) for one in weight.silenced if one.plain > 0]
    removed, controls = np.mean(rows or [(np.nan, np.nan)], axis=0).tolist()
    return removed, controls


def _removes(part: float) -> str:
    """Words for a part of a swing that goes, or comes on top.

    >>> _removes(0.951), _removes(-0.2)
    ('removes 95% of', 'adds 20% to')
    """
    return f"removes {part:.0%} of" if part >= -0.005 else f"adds {-part:.0%} to"


def group_sentence(
    name: str, against: str | None, weight: GroupWeight, rise_step: int, measure: str = "cosine", unit: str = ""
) -> str:
    """A group in one sentence; `unit`: of the losses."""
    text = f"{name} moves together: {measure} {plus_minus(weight.cohesion, weight.cohesion_error)}"
    text += f", against {against}" if against else ", and no group pulls against it"
    change = with_unit(f"{weight.change:+.2g}", unit)
    return f"{text}; at step {rise_step} their loss changed by {change}, {percent(weight.movement)} of all movement"


def caveat(clusters: Clusters) -> str | None:
    """What the grouping cannot tell, in a sentence; None where gradients were compared."""
    if clusters.by != "loss":
        return None
    text = "losses alone do not show which samples share a feature: "
    if clusters.period_two > ALTERNATES:
        return text + (
            f"{clusters.period_two:.0%} of the movement here is period two, at which any two samples correlate at +1 "
            "or -1, so that pairs with different features are merged. Gradients tell them apart (--by gradient)"
        )
    return text + "samples can move together by chance or because they are equally hard. Gradients tell (--by gradient)"
