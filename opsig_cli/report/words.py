"""What the page says in words: the answer, what each number of the evidence means, and what cannot be told."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opsig_cli.analysis.likeness import ALIKE
from opsig_cli.analysis.significance import ROUNDS
from opsig_cli.analysis.verdicts import OWN, SILENCES
from opsig_cli.figures.canvas import typeset
from opsig_cli.studies import numbers
from opsig_cli.studies.clustering.records import established
from opsig_cli.studies.numbers import with_unit

Record = Mapping[str, Any]
Evidence = tuple[str, str, str]
"""A number's name, the number, and what it means."""


def number(value: float | None, digits: int = 2) -> str:
    """A number as print has it, with a true minus; "not known" for none.

    >>> number(-0.314), number(None), number(float("nan"))
    ('\N{MINUS SIGN}0.31', 'not known', 'not known')
    """
    if value is None or math.isnan(value):
        return "not known"
    return signed(f"{value:.{digits}f}")


def nats(value: float | None, sign: bool = False) -> str:
    """A loss or its change, to three figures.

    >>> nats(0.061234, sign=True), nats(1063.2), nats(2.9e13), nats(float("inf"))
    ('+0.0612', '1,063', '2.9e+13', 'not finite')
    """
    if value is None or not math.isfinite(value):
        return "not known" if value is None else "not finite"
    plus = "+" if sign else ""
    return signed(f"{value:{plus},.0f}" if 1000 <= abs(value) < 1e6 else f"{value:{plus}.3g}")


def percent(value: float | None) -> str:
    """A share.

    >>> percent(0.534), percent(-0.2), percent(0.001), percent(None)
    ('53%', '\N{MINUS SIGN}20%', '< 0.5%', 'not known')
    """
    return "not known" if value is None or not math.isfinite(value) else typeset(numbers.percent(value))


def signed(text: str) -> str:
    """A number that is written already, with a true minus, and none before zero.

    >>> signed("-0.00"), signed("-0.01")
    ('0.00', '\N{MINUS SIGN}0.01')
    """
    if text.startswith("-") and not any(digit in text for digit in "123456789"):
        return text[1:]
    return "\N{MINUS SIGN}" + text[1:] if text.startswith("-") else text


def with_error(value: float, error: float | None) -> str:
    """A number with its error, where it has one."""
    return typeset(numbers.plus_minus(value, error))


def p_value(value: float) -> str:
    """A p-value; the least that the rounds can give is said to be that or less.

    >>> p_value(0.0001)[0], p_value(0.25), p_value(1.0)
    ('≤', '0.25', '1')
    """
    return typeset(numbers.p_value(value))


def answer(pairs: Sequence[Record], groups: Sequence[Record], samples: int) -> str:
    """The page's first sentence: how many pairs there are, and how many of them are established."""
    held, count = established(pairs), len(pairs)
    findings = len({pair["family"] or -pair["pair"] for pair in held})
    if held:
        text = "One pair of groups pulls" if len(held) == 1 else f"{len(held)} pairs of groups pull"
        text += " against each other: established"
        if findings < len(held):
            text += f", {'one finding' if findings == 1 else f'{findings} findings'} in all"
        if count > len(held):
            text += (
                f". {count - len(held)} more {'was' if count - len(held) == 1 else 'were'} found and not established"
            )
        return text + "."
    if count:
        found, one = ("was found", "it") if count == 1 else ("were found", "one")
        return f"No established pair: {count} {found}, and no test confirms {one}."
    text = f"No opposing pair was found among {samples:,} samples"
    if groups:
        together = "one group moves" if len(groups) == 1 else f"{len(groups)} groups move"
        return f"{text}: {together} together, and nothing pulls against {'it' if len(groups) == 1 else 'them'}."
    return f"{text}, and no group that moves together."


def rise_sentence(
    step: int, before: float, after: float, movement: float | None, pairs: int, elsewhere: int | None,
    unit: str = "nats",
) -> str:  # fmt: skip
    """Where the whole loss rose most in the window, and how much of the movement there the established pairs make up;
    `elsewhere`: the step outside of the window where it rose more; `unit`: of the losses."""
    if not after > before:
        text = (
            f"The loss of all samples together never rose; at step {step} it fell least, by "
            f"{with_unit(nats(before - after), unit)}"
        )
    else:
        how = f"from {nats(before)} to {with_unit(nats(after), unit)}"
        if nats(before) == nats(after):
            how = f"by {nats(after - before)} to {with_unit(nats(after), unit)}"
        text = f"The loss of all samples together rose most at step {step}, {how}"
    if movement is not None and pairs:
        whose = "this pair" if pairs == 1 else f"these {pairs} pairs"
        text += f"; members of {whose} carry {percent(movement)} of all movement, up and down, at that step"
    if elsewhere is None:
        return text + "."
    return (
        f"In the window of the evidence, {text[0].lower()}{text[1:]}. Outside of it, it rose more at step {elsewhere}."
    )


def change_at(steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray, step: int) -> str:
    """The largest rise of a loss over steps, in a few words; the smallest fall where it never rises.

    >>> change_at([3, 4, 5], [2.0, 1.0, 1.5], 5), change_at([3, 4], [2.0, 1.0], 4)
    ('largest rise, step 5', 'smallest fall, step 4')
    """
    row = list(steps).index(step)
    return f"{'largest rise' if values[row] > values[row - 1] else 'smallest fall'}, step {step}"


def pair_evidence(pair: Record, unit: str = "nats") -> list[Evidence]:
    """The evidence for a pair, each number with what it means; `unit`: of the losses."""
    step, losses = pair["rise_step"], pair["by"] == "loss"
    exact = (
        "" if losses else " Over checkpoints that had no part in finding the groups, ± its standard error over these."
    )
    measure, of = ("correlation", "loss changes") if losses else ("cosine", "gradients")
    phases = p_value(pair["p_value_losses"])
    rows = [
        (
            "Correlation across" if losses else "Cosine across",
            with_error(pair["opposition"], pair["opposition_error"]),
            f"Mean {measure} of the {of} of one group with those of the other: \N{MINUS SIGN}1 is exactly opposed, "
            f"0 unrelated.{exact}",
        ),
        ("Cohesion", number(pair["cohesion"]), f"The same within the groups: 1 where the {of} of all members agree."),
        (
            "Swings correlate",
            number(pair["loss_correlation"]),
            "Of the two groups' mean losses over the window, without drift (second differences): \N{MINUS SIGN}1 where "
            f"one rises as the other falls. p {phases if phases[0] == '≤' else '= ' + phases} against series of the "
            "same spectrum, phases random.",
        ),
        (
            "p-value",
            p_value(pair["p_value"]),
            f"Share of {ROUNDS} rounds in which the same search finds as strong a pair in "
            + ("series with random phases." if losses else "looks from one Gaussian, under the same labels."),
        ),
        (
            "Stability",
            number(pair["stability"]),
            "How well the pair comes back when four fifths of the samples are grouped anew (Jaccard index, 0 to 1).",
        ),
        (
            f"Stability over {'halves' if losses else 'checkpoints'}",
            percent(pair["stability_checkpoints"]),
            f"Share of the members that one {'half of the window' if losses else 'checkpoint'} puts in the same group.",
        ),
        (
            "Share of movement",
            percent(pair["movement"]),
            f"Of all samples' movement at step {step}, the largest rise: the sizes of their loss changes, up or down.",
        ),
    ]
    if pair["apart_step"] is not None:
        rows[-1:-1] = [(
            "Share of movement, swinging",
            percent(pair["apart_movement"]),
            f"The same at step {pair['apart_step']}, where its two sides move apart most: by this, pairs are numbered.",
        )]  # fmt: skip
    if pair["silenced"]:
        places = ", ".join(str(one["step"]) for one in pair["silenced"])
        rows.insert(0, (
            "Silence removes",
            f"{percent(pair['silencing'])} of the swing",
            f"Training repeated from step {places} with both sides at weight zero; with as many others of the same "
            f"labels instead it is {percent(pair['silencing_control'])}. What remains is {number(pair['swing_ratio'])} "
            f"of what remains then; below {SILENCES:g} at each step, the swing is the pair's own.",
        ))  # fmt: skip
    if pair["curvature_ratio"] is not None:
        plural = "s" if len(pair["aside"]) > 1 else ""
        rows.insert(0, (
            "Curvature left without it",
            number(pair["curvature_ratio"]),
            "Silence does not decide: it hardly swings, or others swing it. Of the curvature along its sides' "
            "gradients this is left without its samples, over what is left without as many others of the same labels"
            + (f", with pair{plural} {', '.join(map(str, pair['aside']))} set aside" if pair["aside"] else "")
            + f": below {OWN:.2f}, it is their own.",
        ))  # fmt: skip
    if not math.isnan(pair["alike"]):
        rows.insert(1, (
            "Alike to the network",
            number(pair["alike"]),
            "Mean cosine of the two groups' centred features, the input of the last layer, across "
            f"({number(pair['shared'])}) over within: from {ALIKE:g} on they look the same. Groups that oppose by "
            "their labels alone do not.",
        ))  # fmt: skip
    return rows + vector_evidence(pair, unit)


def vector_evidence(pair: Record, unit: str) -> list[Evidence]:
    """The leading eigenvector that a pair lies on, where slopes were measured."""
    if pair["eigenvectors"] is None:
        return []
    if not pair["eigenvectors"]:
        return [("Eigenvector", "none", "The groups stand at the two ends of no leading eigenvector measured.")]
    first = pair["eigenvectors"][0]
    slopes = " and ".join(nats(slope, sign=True) for slope in first["slopes"])
    shares = " and ".join(percent(share) for share in first["shares"])
    meaning = (
        f"Of the Hessian's leading eigenvectors at step {pair['sharpness_step']} the one at whose two ends the groups "
        f"stand: their mean slopes along it are {with_unit(slopes, unit)}, and they make {shares} of its eigenvalue."
    )
    ratio = first["ratio"]
    if ratio is not None and math.isfinite(ratio):
        swings = "above which a swing along it grows" if ratio >= 1 else "below which a swing along it dies out"
        meaning += f" That is {number(ratio)} times the stability threshold, {swings}."
    return [("Eigenvector", f"number {first['rank']}", meaning)]


def curvature_sentence(
    steps: Sequence[int], values: Sequence[float], threshold: Sequence[float], rise: int,
    floor: bool = False,
) -> str | None:  # fmt: skip
    """Where the top eigenvalue is against the threshold, in words; None where the file holds no threshold.

    `floor`: it was measured at the floor of the valley, not where the iterates stand.
    """
    known = [
        (step, value, limit)
        for step, value, limit in zip(steps, values, threshold, strict=True)
        if math.isfinite(value) and math.isfinite(limit) and limit > 0
    ]
    if not known:
        return None
    crossed = [step for step, value, limit in known if value >= limit]
    step, value, limit = max(known, key=lambda row: row[1] / row[2])
    most = f"{value / limit:.2f} times the stability threshold ({value:.3g} against {limit:.3g}, at step {step})"
    near, there, limit = min(known, key=lambda row: abs(row[0] - rise))
    where = "at the floor of the valley, between the iterates, at" if floor else "at"
    if len(known) == 1:
        text = f"Measured {where} one step, the sharpness is {most}."
        return text + (" Above the threshold, oscillation along the top eigenvector grows." if crossed else "")
    text = f"Measured {where} {len(known)} steps, the sharpness reaches {most}"
    text += f", and is first above it at step {crossed[0]}. " if crossed else ", and never exceeds it. "
    text += f"At step {near}, the nearest to step {rise}, it is {there / limit:.2f} times."
    return text + (" Above the threshold, oscillation along the top eigenvector grows." if crossed else "")


def limits(
    pairs: Sequence[Record], held: int, by: str, has: Mapping[str, bool], notes: Sequence[str], state: str | None
) -> list[str]:
    """What the report could not tell, and why."""
    found = [note[0].upper() + note[1:].rstrip(".") + "." for note in notes]
    if by == "loss" and not has["checkpoints"]:
        found.append(
            "With checkpoints, gradients can be compared, which tells samples with different features apart. "
            "Train with opsig train, or give Recorder.record a state."
        )
    found += [
        f"Pair {pair['pair']} is {pair['verdict']}: {pair['reason']}."
        for pair in pairs
        if pair["verdict"] in ("likely", "unclear")
    ]
    if not has["prediction"]:
        found.append("The file holds no predictions, so that what the network took each sample for is not shown.")
    if not has["picture"]:
        found.append("The file holds neither pictures nor texts of the samples; they go by index and label.")
    if not has["label"]:
        found.append("The file holds no labels, so that groups are named by their size alone.")
    if state not in (None, "complete"):
        found.append(f"The file says that the run is {state}, not complete: later steps may be missing.")
    if held:
        found.append(
            "An established pair says that two groups pull against each other. It does not say that training without "
            "them would be stable: other groups may take their place."
        )
    return found


def commands(
    run: str, by: str, task: str | None, trained: str | None, pair: int | None, checkpoints: bool
) -> list[tuple[str, str]]:
    """How to get what the page says on the command line: what for, and the command."""
    name = shlex.quote(run)
    own = f" --task {shlex.quote(task)}" if task else ""
    grouped = f"opsig cluster {name}{own}" + (" --by loss" if by == "loss" else "")
    found = [("The run", trained)] if trained else []
    found += [
        ("The samples that move most", f"opsig mine {name} --top 40"),
        ("Groups and pairs, with their evidence", grouped),
    ]
    if pair is not None:
        members = f"{grouped} | jq -c 'select(.kind==\"member\" and .pair=={pair})'"
        found.append((f"Both sides of pair {pair}, sample by sample", members))
    if checkpoints:
        found += [
            ("The samples at both ends of the leading eigenvectors", f"opsig sharpness {name}{own} --name"),
            ("The sharpness against its threshold", f"opsig sharpness {name}{own}"),
        ]
    return found
