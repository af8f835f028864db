"""What a change did: records of a branch and of its controls, each beside the unchanged future."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.settings import Settings
from opsig_cli.studies.branching.controls import RANDOM, SAME_LABELS
from opsig_cli.studies.branching.futures import Future

MEASURES = (
    "largest_rise", "largest_rise_step", "rise_of_untouched", "rise_of_untouched_step", "loss_of_untouched",
    "swing_of_changed", "final_loss", "accuracy", "sharpness",
)  # fmt: skip
"""What is given of every future, and under "unchanged_" of the unchanged one over the same samples."""


@dataclass(frozen=True)
class Places:
    """Where the tallied sets lie: all samples, those that the branch changed, those that nobody touched."""

    all: int
    changed: int
    untouched: int


@dataclass(frozen=True)
class Line:
    """The samples that a branch did not touch, in one future: what it is, steps (T,) and mean losses (T,)."""

    of: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Panel:
    """A branch to be drawn: its title, its own line, the unchanged one, and the controls'."""

    title: str
    branch: Line
    unchanged: Line
    controls: list[Line]


def panel(
    title: str, places: Sequence[Places], unchanged: Future, futures: Sequence[Future], names: Sequence[str]
) -> Panel:
    """What to draw of a branch: `futures` are its own and its controls', with the places and names of each."""

    def line(name: str, future: Future, place: Places) -> Line:
        return Line(name, future.course.steps_T, future.course.means_TK[:, place.untouched])

    own, *others = [line(*parts) for parts in zip(names, futures, places, strict=True)]
    return Panel(title, own, line("unchanged", unchanged, places[0]), others)


def measures(future: Future, places: Places) -> dict[str, Any]:
    """MEASURES of one future. Losses in nats, means over samples."""
    course = future.course
    rise, rise_step = course.rise(places.all)
    others, others_step = course.rise(places.untouched)
    values = (
        rise, rise_step, others, others_step, course.final(places.untouched), float(course.swings_K[places.changed]),
        course.final(places.all), future.accuracy, future.sharpness,
    )  # fmt: skip
    return dict(zip(MEASURES, values, strict=True))


def beside(future: Future, unchanged: Future, places: Places) -> dict[str, Any]:
    """MEASURES of one future and of the unchanged one, and where the future stopped being finite."""
    theirs = {f"unchanged_{name}": value for name, value in measures(unchanged, places).items()}
    return measures(future, places) | theirs | {"stopped_at": future.stopped_at}


def sentence(record: Mapping[str, Any], controls: Sequence[Mapping[str, Any]]) -> str:
    """What a branch shows, in one sentence, against the unchanged future and the controls."""
    count = record["samples_changed"]
    whose = "the others'" if count else "the"
    if record["change"] == "nothing":
        rise = _rise(record["rise_of_untouched"], record["rise_of_untouched_step"], " at most")
        return f"with nothing changed, as the run was trained, the loss {rise}"
    text = f"with {record['change']}" + (f" ({count:,} sample{'s' * (count > 1)})" if count else "")
    if record["stopped_at"] is not None:
        return f"{text} the loss stops being finite at step {record['stopped_at']}"
    text += f", {whose} loss {_rise(record['rise_of_untouched'], record['rise_of_untouched_step'], ' at most')}"
    text += "; unchanged it " + _rise(record["unchanged_rise_of_untouched"], record["unchanged_rise_of_untouched_step"])
    for kind, name in ((RANDOM, "as many random samples"), (SAME_LABELS, "random ones of the same labels")):
        rises = [control["rise_of_untouched"] for control in controls if control["control"] == kind]
        if rises:
            text += f"; with {name} instead it " + _rises(rises)
    return text


def group_records(
    common: Mapping[str, Any], groups: Mapping[int, int], future: Future, unchanged: Future, rates: tuple[float, float]
) -> list[dict[str, Any]]:
    """Each group's loss in a branch and in the unchanged future, at the same step and at the same time.

    `groups`: where each is tallied. `gain`: how much lower the branch's loss is (a lag is below 0), `gain_in_time` the
    same where both have gone equally far in steps times learning rate, `rates` being theirs.
    """
    steps = [course.steps_T - course.steps_T[0] for course in (future.course, unchanged.course)]
    times = [rate * step for rate, step in zip(rates, steps, strict=True)]
    until = min(time[-1] for time in times)
    found = []
    for group, place in groups.items():
        curves = [course.means_TK[:, place] for course in (future.course, unchanged.course)]
        reached = [float(np.interp(until, time, curve)) for time, curve in zip(times, curves, strict=True)]
        found.append({
            "kind": "group", **common, "group": group, "final_loss": float(curves[0][-1]),
            "unchanged_final_loss": float(curves[1][-1]), "gain": float(curves[1][-1] - curves[0][-1]),
            "gain_in_time": reached[1] - reached[0],
        })  # fmt: skip
    return found


def trained_with(settings: Settings) -> dict[str, Any]:
    """The settings that a branch can change, as it ran."""
    return {"optimizer": settings.optimizer, "learning_rate": settings.learning_rate, "batch_size": settings.batch_size}


def table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Branches and controls, shortened to what a person reads in a row; a branch that changes nothing is the unchanged
    one."""
    same = any(r["kind"] == "branch" and r["control"] is None and r["change"] == "nothing" for r in records)
    return [
        {
            "from": r["from_step"],
            "change": r["change"] if r["control"] is None else _control(r),
            "samples": r["samples_changed"],
            "largest rise": _cell(r["largest_rise"]),
            "others' rise": _cell(r["rise_of_untouched"]),
            "at step": r["rise_of_untouched_step"],
            "unchanged": _cell(r["unchanged_rise_of_untouched"]),
            "swing of changed": _cell(r["swing_of_changed"], sign=False),
            "unchanged swing": _cell(r["unchanged_swing_of_changed"], sign=False),
            "last loss": _cell(r["final_loss"], sign=False),
        }
        for r in records
        if r["kind"] == "branch" and not (same and r["control"] == "unchanged")
    ]


def narrow_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of `table` with fewer columns, for narrower terminals: what the others' loss did, beside the unchanged."""
    short = ("change", "samples", "others' rise", "unchanged")
    longer = ("change", "samples", "others' rise", "at step", "unchanged", "last loss")
    longer = (*(("from",) if len({row["from"] for row in rows}) > 1 else ()), *longer)
    return [[{name: row[name] for name in names} for row in rows] for names in (longer, short)]


def group_table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups' gains and lags, shortened to what a person reads in a row."""
    return [
        {
            "change": r["change"], "group": f"G{r['group']}", "last loss": _cell(r["final_loss"], sign=False),
            "unchanged": _cell(r["unchanged_final_loss"], sign=False), "gain": _cell(r["gain"]),
            "in time": _cell(r["gain_in_time"]),
        }
        for r in records
        if r["kind"] == "group"
    ]  # fmt: skip


def _control(record: Mapping[str, Any]) -> str:
    return record["control"] if record["draw"] is None else f"{record['control']}, draw {record['draw']}"


def _cell(value: float | None, sign: bool = True) -> str | None:
    if value is None or not np.isfinite(value):
        return None
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def _nats(value: float) -> str:
    return f"{value:+.3g}"


def _rise(value: float, step: int | None, most: str = "") -> str:
    if value <= 0:
        return "never rises"
    return f"rises by {_nats(value)}{most}" + ("" if step is None else f" (step {step})")


def _rises(values: Sequence[float]) -> str:
    """The largest rises of several futures in words.

    >>> _rises([0.1, 0.2]), _rises([-0.1, 0.2]), _rises([-0.1, 0.0])
    ('rises by +0.1 to +0.2', 'rises by +0.2 at most, or never', 'never rises')
    """
    if max(values) <= 0:
        return "never rises"
    return f"rises by {_span(values)}" if min(values) > 0 else f"rises by {_nats(max(values))} at most, or never"


def _span(values: Sequence[float]) -> str:
    low, high = _nats(min(values)), _nats(max(values))
    return low if low == high else f"{low} to {high}"
