"""The samples that moved most, from a trajectory: what `mine` prints and `cluster` starts from. S samples, M mined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsig_cli.analysis import mining
from opsig_cli.analysis.coverage import Coverage
from opsig_cli.analysis.evidence import of_net
from opsig_cli.analysis.mining import Movement
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies import missing, slopes
from opsig_cli.studies.filled import coverage_of, filled, measured_before, targets_of
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.texts import Texts

SCORES = {
    "change": mining.largest_changes,
    "oscillation": mining.oscillation,
    "variation": mining.variation,
    "surprise": mining.surprise,
    "slope": mining.largest_changes,  # where a sample is placed; what it is ranked by is in the file
}


LONG_BYTES = 256 << 20
"""Of losses, which take a second to look through."""
SPARSE = 0.1
"""Share of losses that were not measured above which no oscillation can be seen."""
DIRECTIONS = ("both", "up", "down")


@dataclass(frozen=True)
class Movers:
    """Mined samples, the largest score first. All arrays are (M,).

    `position`: column in the file; `row`: row of the losses after the change; `movement`: of all samples, over the
    rows from `first` on; `score_name`: what was ranked by; `note`: why, where a person should know; `known`: what was
    measured, where that is not all.
    """

    position: np.ndarray
    row: np.ndarray
    movement: Movement
    first: int
    score_name: str
    note: str | None = None
    known: Coverage | None = None


def find(
    run: Trajectory, count: int, score: str | None = None, step: int | None = None,
    window: tuple[int | None, int | None] = (None, None), direction: str = "both",
) -> Movers:  # fmt: skip
    """Mine `count` samples by one step's change, or over a window of steps by `score`.

    `direction` "up" or "down" counts only rises or only falls. Without a score it is the oscillation where the run
    alternates at period two, and the one-step change elsewhere; the note then says which, and from where on. What was
    not measured counts as not changed, and a window ends before the step at which the run diverges. Raises OpsigError
    for a step that was not recorded, or too few of them.
    """
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            movers = _find(run, count, score, step, window, direction)
    except OpsigError as error:
        raise missing.explained(error, run) from error
    if np.isfinite(movers.movement.mean_T).all():
        return movers
    steps, known = run.steps("losses"), coverage_of(run)
    words = missing.said(run, known, movers.first + len(movers.movement.mean_T))
    if known.diverged is not None and known.diverged < movers.first + len(movers.movement.mean_T):
        at = int(steps[known.diverged])
        if known.diverged <= movers.first or step is not None:
            reason = f"losses are not finite at step {at}, so nothing is known from there on"
            raise OpsigError(f"{run.path}: {'; '.join([*words, reason])}")
        words.append(f"from step {at} on losses are not finite: only the steps before it are looked at")
        window = (window[0], int(steps[known.diverged - 1]))
    try:
        movers = _find(filled(run, known), count, score, step, window, direction, known)
    except OpsigError as error:
        raise missing.explained(error, run) from error
    return replace(movers, note="; ".join([*words, *([movers.note] if movers.note else [])]), known=known)


def _find(
    run: Trajectory, count: int, score: str | None, step: int | None, window: tuple[int | None, int | None],
    direction: str, known: Coverage | None = None,
) -> Movers:  # fmt: skip
    """Mine all steps of the window."""
    if score not in (None, *SCORES):
        raise UsageError(f"no score is called '{score}'. Known: {', '.join(SCORES)}")
    if direction not in DIRECTIONS:
        raise UsageError(f"--direction is one of {', '.join(DIRECTIONS)}, not '{direction}'")
    run.require("losses/loss")
    steps = run.steps("losses")
    if step is not None:
        if score not in (None, "change"):
            raise UsageError(f"--step is about one change; {score} is measured over a window. Use --window A:B")
        last = _row_of(run, steps, step)
        if last == 0:
            raise OpsigError(f"{run.path}: step {step} is the first with losses, so nothing changed before it")
        return _movers(run, last - 1, last + 1, "change", count, direction, known)
    first, stop = window_rows(run, steps, window)
    if stop - first < 2:
        raise OpsigError(f"{run.path} has one step with losses in this window; at least two are needed")
    if score == "surprise" and stop - first < mining.WIDTH + 2:
        raise OpsigError(f"{run.path} has {stop - first} steps here, and surprise needs {mining.WIDTH + 2}")
    if score not in (None, "oscillation"):
        movers = _movers(run, first, stop, score, count, direction, known)
        return replace(movers, note=f"{_worst(steps[first:stop], movers)}. Ranked by {score}")
    reason = _why_not_oscillation(steps[first:stop], known)
    if reason is None:
        movers = _movers(run, first, stop, "oscillation", count, direction, known)
        begin = movers.movement.first_alternation
        if begin is not None:
            words = f"from step {steps[first + begin]} on the losses alternate at period two (the edge of stability)"
            return replace(movers, note=f"{words}; {_worst(steps[first:stop], movers)}. Ranked by oscillation")
        if score == "oscillation":
            return movers
        reason = "the losses do not alternate at period two, as they do at the edge of stability"
    elif score == "oscillation":
        raise OpsigError(f"{run.path}: oscillation cannot be scored: {reason}")
    movers = _movers(run, first, stop, "change", count, direction, known)
    return replace(movers, note=f"{reason}; {_worst(steps[first:stop], movers)}. Ranked by the one-step change")


def _worst(steps: np.ndarray, movers: Movers) -> str:
    if not movers.movement.score.any():
        return "no loss changes, so that the order says nothing"
    rises = np.diff(movers.movement.mean_T)
    row = int(rises.argmax())
    return f"the whole loss rose most at step {steps[row + 1]}" if rises[row] > 0 else "the whole loss never rose"


def window_rows(run: Trajectory, steps: np.ndarray, window: tuple[int | None, int | None]) -> tuple[int, int]:
    """Rows `first` to `stop` (exclusive) whose steps lie in the window, both its ends included."""
    low, high = window
    first = 0 if low is None else int(np.searchsorted(steps, low))
    stop = len(steps) if high is None else int(np.searchsorted(steps, high, side="right"))
    if first >= stop:
        known = f"{steps[0]} to {steps[-1]}" if len(steps) else "none"
        within = f"up to step {high}" if low is None else f"from step {low} on"
        within = within if None in window else f"between steps {low} and {high}"
        raise OpsigError(f"{run.path} has no losses {within}. Recorded: {known}")
    return first, stop


def mined_window(records: Sequence[dict[str, Any]]) -> tuple[int | None, int | None]:
    """The steps, both ends included, between which records of `mine` were looked for; (None, None) for one step's.

    >>> mined_window([{"window": [0, 40], "previous_step": 7, "step": 8}]), mined_window([{"sample": 3}])
    ((0, 40), (None, None))
    """
    for record in records:
        match record.get("window"):
            case [int(first), int(last)] if (first, last) != (record.get("previous_step"), record.get("step")):
                return first, last
    return None, None


def takes_long(run: Trajectory) -> bool:
    """Whether a run has so many losses that what was mined is kept in its file."""
    return run.has("losses/loss") and 4 * int(np.prod(run.shape("losses/loss"))) >= LONG_BYTES


def default_count(samples: int) -> int:
    """How many samples `cluster` mines: a fifth, at least 200, at most 2,000."""
    return min(samples, max(200, min(2000, samples // 5)))


def records(run: Trajectory, movers: Movers, share_step: int | None = None) -> list[dict[str, Any]]:
    """One record for each mined sample, in order.

    With `share_step` each also has the sample's part of the whole loss's change at that step.
    """
    steps = run.steps("losses")
    ids = run.samples
    labels, names = missing.labels_of(run), missing.names_of(run)
    previous = movers.row - 1 if movers.known is None else measured_before(run, movers.position, movers.row)
    before, after = predictions_around(run, movers)
    moved = movers.movement
    rise_T = np.diff(moved.mean_T) * (len(ids) - (0 if movers.known is None else len(movers.known.never)))
    rising, moved_all = _around(run, movers)
    texts = Texts(run)
    window = [int(steps[movers.first]), int(steps[movers.first + len(moved.mean_T) - 1])]
    shares = None if share_step is None else _shares(run, steps, share_step, movers.position)
    found = []
    for rank, (position, row) in enumerate(zip(movers.position.tolist(), movers.row.tolist(), strict=True)):
        change = float(moved.after[position]) - float(moved.before[position])
        whole = rise_T[row - movers.first - 1]
        found.append({
            "trajectory": run.path,
            "rank": rank + 1,
            "sample": int(ids[position]),
            **missing.name_of(names, position),
            "step": int(steps[row]),
            "previous_step": int(steps[previous[rank]]),
            "direction": "up" if change > 0 else "down",
            "loss_before": float(moved.before[position]),
            "loss_after": float(moved.after[position]),
            "change": change,
            "score": float(moved.score[position]),
            "score_name": movers.score_name,
            "label": None if labels is None else str(labels[position]),
            "prediction_before": before[rank],
            "prediction_after": after[rank],
            "share": of_net(change, float(whole), moved_all[row]),
            "movement": abs(change) / moved_all[row] if moved_all[row] else None,
            "rising": rising[row],
            **texts.field(position),
            "window": window,
        })  # fmt: skip
        if shares is not None:
            found[-1] |= {"share_step": share_step, "share_at_step": shares[rank][0]}
            found[-1]["movement_at_step"] = shares[rank][1]
    return found


def _shares(
    run: Trajectory, steps: np.ndarray, step: int, position: np.ndarray
) -> list[tuple[float | None, float | None]]:
    """The parts of the net change at a step, and of all samples' movement there, that each sample carries; None where
    nothing changes, of the net change also where it is close to zero beside the movement."""
    row = _row_of(run, steps, step)
    if row == 0:
        raise OpsigError(f"{run.path}: step {step} is the first with losses, so nothing changed before it")
    before, after = run.rows("losses/loss", row - 1, row + 1).astype(np.float64)
    whole, movement = float((after - before).sum()), float(np.abs(after - before).sum())
    return [
        (of_net(change, whole, movement), abs(change) / movement if movement else None)
        for change in (after - before)[position].tolist()
    ]


def _around(run: Trajectory, movers: Movers) -> tuple[dict[int, float], dict[int, float]]:
    """For every row that a mined sample is placed at, the share of all samples whose loss rose, and all samples'
    movement: the sizes of their changes, summed."""
    rising, movement, targets = {}, {}, targets_of(run)
    count, some = int(targets.sum()), not targets.all()
    at, after = -1, None
    for row in np.unique(movers.row).tolist():
        before = after if at == row - 1 and after is not None else run.rows("losses/loss", row - 1, row)[0]
        at, after = row, run.rows("losses/loss", row, row + 1)[0]
        changes = after - before
        if some:
            changes = changes[targets]
        rising[row] = np.count_nonzero(changes > 0) / count
        sizes = np.abs(changes, out=changes)
        total = float(sizes.sum(dtype=np.float64))
        movement[row] = total if np.isfinite(total) else float(np.nansum(sizes, dtype=np.float64))
    return rising, movement


def predictions_around(run: Trajectory, movers: Movers) -> tuple[list[Any], list[Any]]:
    """Every mined sample's predicted class before and after its change: a name, an integer, or None."""
    nothing: list[Any] = [None] * len(movers.row)
    if not run.has("losses/prediction"):
        return nothing, nothing
    names = run.read("class_name") if run.has("class_name") else None
    before, after = list(nothing), list(nothing)
    for row in np.unique(movers.row):
        pair = run.rows("losses/prediction", int(row) - 1, int(row) + 1)
        for rank in np.flatnonzero(movers.row == row):
            was, now = pair[:, movers.position[rank]]
            before[rank], after[rank] = class_name(names, was), class_name(names, now)
    return before, after


def class_name(names: np.ndarray | None, prediction: int) -> str | int | None:
    """A predicted class as a person reads it; None where nothing was predicted."""
    if prediction < 0:
        return None
    return str(names[prediction]) if names is not None and prediction < len(names) else int(prediction)


def positions_of(run: Trajectory, samples: Sequence[int]) -> np.ndarray:
    """Columns of samples given by index, (M,). Raises OpsigError for one that the file does not have."""
    ids = run.samples
    order = np.argsort(ids)
    wanted = np.array([min(sample, np.iinfo(np.int64).max) for sample in samples], np.int64)
    places = np.searchsorted(ids, wanted, sorter=order)
    places = order[np.minimum(places, len(ids) - 1)]
    missing = wanted[ids[places] != wanted]
    if len(missing):
        raise OpsigError(f"{run.path} has no sample {missing[0]}. It holds {len(ids):,}: {ids.min()} to {ids.max()}")
    return places


def _row_of(run: Trajectory, steps: np.ndarray, step: int) -> int:
    row = int(np.searchsorted(steps, step))
    if row == len(steps) or steps[row] != step:
        near = ", ".join(str(s) for s in steps[max(0, row - 1) : row + 1]) or "none"
        raise OpsigError(f"{run.path} has no losses at step {step}. Nearest: {near}")
    return row


def _why_not_oscillation(steps: np.ndarray, known: Coverage | None) -> str | None:
    if len(steps) < mining.WIDTH + 2:
        return f"{len(steps)} steps are too few to see an oscillation"
    if np.any(np.diff(steps) != 1):
        return "losses were not recorded at every step"
    if known is not None and known.sparse > SPARSE:
        return "losses of most samples were not measured at every step"
    return None


def _movers(
    run: Trajectory, first: int, stop: int, score: str, count: int, direction: str, known: Coverage | None
) -> Movers:
    movement = SCORES[score](_blocks(run, first, stop), direction)
    if score == "slope":
        steps = run.steps("losses")
        movement = replace(movement, score=slopes.steepness(run, int(steps[first]), int(steps[stop - 1])))
    chosen = mining.top(movement.score, count)
    if known is not None and len(known.never):
        share = len(run.samples) / max(1, len(run.samples) - len(known.never))  # of those the mean is of
        movement = replace(movement, mean_T=movement.mean_T * share)
        chosen = chosen[~np.isin(chosen, known.never)]
    if direction != "both":
        rises = movement.after[chosen] - movement.before[chosen]
        chosen = chosen[(rises > 0) if direction == "up" else (rises < 0)]
    return Movers(chosen, movement.place[chosen] + first, movement, first, score)


def _blocks(run: Trajectory, first: int, stop: int) -> Iterator[np.ndarray]:
    for _, rows in run.blocks("losses/loss", first, stop):
        yield rows
