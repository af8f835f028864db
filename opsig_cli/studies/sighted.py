"""Who made the loss of a batch jump, from sightings: what `mine` prints of a run that saw its samples batch by batch.

T steps that have sightings, S samples, B samples of a batch, M mined.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from opsig_cli.analysis.mining import sizes_of
from opsig_cli.analysis.sightings import Expectation, Trend, shares_of, trend
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies.mining import DIRECTIONS, class_name
from opsig_cli.trajectory import sightings
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.sightings import Sightings
from opsig_cli.trajectory.texts import Texts

SCORES = ("change", "variation", "surprise")
MOST = 0.9
"""Part of an excess whose carriers are counted."""
ROW = np.dtype([
    ("place", "i8"), ("score", "f8"), ("step", "i8"), ("expected", "f8"), ("loss", "f8"), ("excess", "f8"),
    ("share", "f8"), ("previous_step", "i8"), ("last", "f8"), ("prediction", "i8"), ("last_prediction", "i8"),
    ("rising", "f8"), ("batch", "i8"),
])  # fmt: skip
"""One sample as it was seen at one step: see `Sighted`. Integers are -1 where there is nothing."""


@dataclass(frozen=True)
class Sighted:
    """Mined sightings, `rows` (M,) of ROW, at most one a sample.

    `place`: column of the sample; `score`; `loss` then, `expected` from the trend of all and its own level, `excess`
    above that, its `share` of the summed excess of the batch of `batch` rows, of which the part `rising` lies above the
    expected; `previous_step` and `last`, when it was seen before, and its loss then. `steps_T`, `means_T`, `trend`: of
    all steps that have sightings, with the mean loss of the batch, NaN where it is not known. `window`: the steps that
    were looked at, both ends included. `broken`: records of samples that are not finite while their batch is.
    """

    rows: np.ndarray
    steps_T: np.ndarray
    means_T: np.ndarray
    trend: Trend
    window: tuple[int, int]
    score_name: str
    note: str
    broken: list[dict[str, Any]]


def chosen(run: Trajectory, step: int | None = None) -> bool:
    """Whether sightings are what to mine, and not rows with the losses of all samples: where there are more steps that
    have them; or, of a `step`, where there are some at it and no rows at it and at the step before."""
    if not sightings.count(run):
        return False
    rows = run.steps("losses")
    if step is not None:
        return (not np.isin([step - 1, step], rows).all() and len(sightings.at(run, step)) > 0) or not len(rows)
    return len(rows) < 2 or len(_course(run)[0]) > len(rows)


def find(
    run: Trajectory, count: int, score: str | None, step: int | None, window: tuple[int | None, int | None],
    direction: str,
) -> Sighted:  # fmt: skip
    """Mine `count` samples by what their losses exceed the expected by: at one step, the largest share of the batch's
    excess first; or over a window by `score`.

    Raises OpsigError for a step or a window without sightings, UsageError for a score that needs the losses of all.
    """
    if score == "oscillation":
        raise UsageError("--score oscillation needs the losses of all samples at every step, and these are sightings")
    if score not in (None, *SCORES):
        raise UsageError(f"no score is called '{score}'. Known of sightings: {', '.join(SCORES)}")
    if step is not None and score not in (None, "change"):
        raise UsageError(f"--step is about one batch; {score} is measured over a window. Use --window A:B")
    if direction not in DIRECTIONS:
        raise UsageError(f"--direction is one of {', '.join(DIRECTIONS)}, not '{direction}'")
    sightings.require(run)
    steps, means, counts = _course(run)
    low, high = (step, step) if step is not None else window
    first = 0 if low is None else int(np.searchsorted(steps, low))
    stop = len(steps) if high is None else int(np.searchsorted(steps, high, side="right"))
    if first >= stop:
        where = f"at step {step}" if step is not None else f"between steps {low} and {high}"
        near = ", ".join(str(s) for s in steps[max(0, first - 1) : first + 1])
        raise OpsigError(f"{run.path} has no sightings {where}. Nearest: {near}")
    known = bool((counts > 0).any())
    if not known:
        means, counts = _of_batches(run, steps)
    usual = trend(means, counts)
    inside = (int(steps[first]), int(steps[stop - 1]))
    scan = _Scan(run, usual, means - usual.before, score or "change", direction)
    if step is not None:
        rows = scan.batch(first, known)
        note = _said_of_batch(step, rows, means[first], usual.before[first], known)
    else:
        rows = scan.window(first, stop, known)
        note = _said_of_window(inside, steps, means, usual, first, stop)
    if direction != "both":
        rows = rows[rows["excess"] > 0] if direction == "up" else rows[rows["excess"] < 0]
    name = score or ("share" if step is not None else "change")
    if not known:
        name = "batches"
    return Sighted(rows[:count], steps, means, usual, inside, name, note, scan.broken)


def _course(run: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that have sightings (T,), the mean loss of each batch, NaN for none, and how many losses it is of."""
    steps, means, counts = [], [], []
    for step, batch in sightings.batches(run):
        good = batch.loss[np.isfinite(batch.loss)]
        steps.append(step)
        means.append(good.mean(dtype=np.float64) if len(good) else np.nan)
        counts.append(len(good))
    return np.array(steps, np.int64), np.array(means, np.float64), np.array(counts, np.int64)


def _of_batches(run: Trajectory, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same where only the order of the data is known: the loss that was logged of each batch."""
    means = np.full(len(steps), np.nan)
    if run.has("scalars/train_loss"):
        logged = run.steps("scalars")
        places = np.searchsorted(logged, steps)
        there = np.flatnonzero((places < len(logged)) & (logged[np.minimum(places, len(logged) - 1)] == steps))
        values = run.rows("scalars/train_loss", 0, len(logged))
        means[there] = values[places[there]]
    return means, np.isfinite(means).astype(np.int64)


class _Scan:
    """One pass over the batches of a run in order of step: memory is about 350 bytes a sample, and a block.

    `above_T`: how far the mean loss of each batch lies above the trend.
    """

    def __init__(self, run: Trajectory, usual: Trend, above_T: np.ndarray, score: str, direction: str):
        self._run, self._usual, self._score, self._direction = run, usual, score, direction
        self._above_T = above_T
        self._ids = run.samples
        self._order = np.argsort(self._ids)
        self._last = np.zeros(len(self._ids), ROW)
        self._last["previous_step"] = self._last["step"] = self._last["prediction"] = -1
        self._last["loss"] = np.nan
        self.broken: list[dict[str, Any]] = []
        self._known_broken: set[int] = set()

    def batch(self, at: int, losses_known: bool) -> np.ndarray:
        """The rows of the batch at this place in time, the largest share first (M,)."""
        if not losses_known:
            rows = self._by_order(at, at + 1)
            return rows[np.argsort(-np.nan_to_num(rows["score"], nan=-np.inf), kind="stable")]
        rows = next(rows for t, rows, _ in self._rows(at + 1) if t == at)
        return rows[np.argsort(-np.nan_to_num(rows["share"], nan=-np.inf), kind="stable")]

    def window(self, first: int, stop: int, losses_known: bool) -> np.ndarray:
        """Every sample's row with the largest score in a window of time, the largest first (M,): of samples that were
        seen before, as of others nothing of their own is known, unless the window has no other."""
        if not losses_known:
            best = self._by_order(first, stop)
        else:
            best = np.zeros(len(self._ids), ROW)
            best["score"] = best["previous_step"] = -1
            total = np.zeros(len(self._ids))
            for t, rows, usual in self._rows(stop):
                if t < first:
                    continue
                sizes = sizes_of(np.nan_to_num(rows["excess"]), self._direction)
                rows["score"] = np.nan_to_num(sizes / usual, posinf=0) if self._score == "surprise" else sizes
                np.add.at(total, rows["place"], sizes)
                rows = rows[np.argsort(rows["score"], kind="stable")]  # of one drawn twice the larger comes last
                held = best[rows["place"]]
                again, held_again = rows["previous_step"] >= 0, held["previous_step"] >= 0
                better = (again > held_again) | ((again == held_again) & (rows["score"] > held["score"]))
                best[rows["place"][better]] = rows[better]
            if self._score == "variation":
                best["score"] = np.where(best["score"] < 0, -1, total)
            best = best[np.isfinite(best["excess"]) & (best["score"] >= 0)]
            if (again := best["previous_step"] >= 0).any():
                best = best[again]
        return best[np.argsort(-best["score"], kind="stable")]

    def _rows(self, stop: int) -> Any:
        """Batches up to a place in time: the place, what was seen (B,) of ROW, and the usual size of an excess."""
        expectation = Expectation(len(self._ids), self._usual)
        for t, (step, batch) in enumerate(sightings.batches(self._run)):
            if t >= stop:
                return
            place = self._places(batch)
            found = expectation(t, place, batch.loss)
            rows = np.zeros(len(batch), ROW)
            rows["place"], rows["step"], rows["batch"] = place, step, len(batch)
            rows["expected"], rows["loss"], rows["excess"] = found.expected, batch.loss, found.excess
            rows["share"] = shares_of(found.excess)
            rows["prediction"] = batch.prediction
            last = self._last[place]
            rows["previous_step"], rows["last"] = last["step"], last["loss"]
            rows["last_prediction"] = last["prediction"]
            rows["rising"] = float(np.mean(found.excess > 0))
            self._note_broken(rows)
            self._last[place] = rows
            yield t, rows, found.usual

    def _by_order(self, first: int, stop: int) -> np.ndarray:
        """Of a run of which only the order of its data is known: of every sample that was in a batch of the window, by
        how much the logged losses of its batches, all of the run, lie above the trend in the mean."""
        total, times = np.zeros(len(self._ids)), np.zeros(len(self._ids))
        best = np.zeros(len(self._ids), ROW)
        best["batch"] = -1
        for t, (step, batch) in enumerate(sightings.batches(self._run)):
            place, above = self._places(batch), float(self._above_T[t])
            if np.isfinite(above):
                np.add.at(total, place, above)
                np.add.at(times, place, 1)
            if first <= t < stop:
                rows = np.zeros(len(batch), ROW)
                rows["place"], rows["step"], rows["batch"] = place, step, len(batch)
                best[place] = rows
        for name in ("expected", "loss", "excess", "share", "last", "rising"):
            best[name] = np.nan
        best["previous_step"] = best["prediction"] = best["last_prediction"] = -1
        best["score"] = np.where(times > 0, total / np.maximum(times, 1), np.nan)
        return best[best["batch"] >= 0]

    def _places(self, batch: Sightings) -> np.ndarray:
        return self._order[np.searchsorted(self._ids, batch.sample, sorter=self._order)]

    @cached_property
    def _labels(self) -> np.ndarray | None:
        return self._run.read("samples/label") if self._run.has("samples/label") else None

    def _note_broken(self, rows: np.ndarray) -> None:
        """Samples that are not finite while others of their batch are; a batch of none is one that is not known."""
        good = np.isfinite(rows["loss"])
        if good.all() or not good.any():
            return
        for row in rows[~good]:
            sample = int(self._ids[row["place"]])
            if sample not in self._known_broken:
                self._known_broken.add(sample)
                label = None if self._labels is None else str(self._labels[row["place"]])
                self.broken.append({"kind": "not_finite", "trajectory": self._run.path, "sample": sample,
                                    "step": int(row["step"]), "label": label})  # fmt: skip


def _said_of_batch(step: int, rows: np.ndarray, mean: float, before: float, losses_known: bool) -> str:
    if not losses_known:
        logged = "" if np.isnan(mean) else f", whose logged loss is {mean:.4g}"
        trend = f" where the steps before have {before:.4g}" if np.isfinite(before) else ""
        return (
            f"step {step} had {len(rows)} rows in its batch{logged}{trend}. Only the order of the data is known, so "
            "its rows are ranked by how far the batches of each lie above the trend in the mean"
        )
    if np.isnan(mean):
        return f"no loss of the {len(rows)} rows of step {step} is finite"
    if np.isnan(before):
        return f"step {step} is the first that has sightings, so nothing was to be expected of its {len(rows)} rows"
    shares = np.nan_to_num(rows["share"])
    excess = float(np.nanmean(rows["excess"]))
    new = int((rows["previous_step"] < 0).sum())
    first_time = f"; {new} of them were not seen before, and the trend is all that is expected of them" if new else ""
    carriers = int(np.searchsorted(np.cumsum(shares), MOST)) + 1
    side = "above" if excess > 0 else "below"
    return (
        f"the {len(rows)} rows of step {step} have a mean loss of {mean:.4g}; the steps before have {before:.4g}, and "
        f"of these rows {float(np.nanmean(rows['expected'])):.4g} was to be expected: it is {abs(excess):.4g} {side}. "
        f"{min(carriers, len(rows))} of them carry {MOST:.0%} of that. Shares are of the summed excess of all "
        f"{len(rows)} rows and add up to 1{first_time}"
    )


def _said_of_window(
    inside: tuple[int, int], steps: np.ndarray, means: np.ndarray, usual: Trend, first: int, stop: int
) -> str:
    above = (means - usual.before)[first:stop]
    words = "seen batch by batch (sightings): a sample is ranked by what exceeds the trend of all and its own level"
    said = [words]
    if np.isfinite(above).any() and above[at := int(np.nanargmax(above))] > 0:
        step = steps[first + at]
        spike = f"at step {step} the batch's mean loss was furthest above the steps before, by {above[at]:.4g}"
        said.insert(0, f"{spike}: see --step {step}")
    finite = np.flatnonzero(np.isfinite(means[:stop]))
    if len(finite) and finite[-1] < stop - 1:
        said.append(f"from step {steps[finite[-1] + 1]} on no loss is finite")
    return "; ".join(said)


def records(run: Trajectory, found: Sighted, share_step: int | None = None) -> list[dict[str, Any]]:
    """One record for each mined sighting, in order, under the names that `mine` has for rows of all samples.

    `loss_before` is what was to be expected, `loss_after` what was seen, `change` the excess. With `share_step` also
    the sample's share at that step, None where the batch had it not.
    """
    ids = run.samples
    labels, names = (run.read(n) if run.has(n) else None for n in ("samples/label", "samples/name"))
    classes = run.read("class_name") if run.has("class_name") else None
    texts = Texts(run)
    at_step = {}
    if share_step is not None:
        whole = find(run, len(ids), None, share_step, (None, None), "both").rows
        at_step = dict(zip(whole["place"].tolist(), whole["share"].tolist(), strict=True))
    written = []
    for rank, row in enumerate(found.rows, 1):
        place, excess = int(row["place"]), float(row["excess"])
        written.append({
            "trajectory": run.path,
            "rank": rank,
            "sample": int(ids[place]),
            **({} if names is None else {"name": str(names[place])}),
            "step": int(row["step"]),
            "previous_step": None if row["previous_step"] < 0 else int(row["previous_step"]),
            "direction": None if np.isnan(excess) else "up" if excess > 0 else "down",
            "loss_before": float(row["expected"]),
            "loss_after": float(row["loss"]),
            "change": excess,
            "score": float(row["score"] if found.score_name != "share" or np.isnan(row["share"]) else row["share"]),
            "score_name": found.score_name,
            "label": None if labels is None else str(labels[place]),
            "prediction_before": class_name(classes, int(row["last_prediction"])),
            "prediction_after": class_name(classes, int(row["prediction"])),
            "share": float(row["share"]),
            "rising": float(row["rising"]),
            "loss_last": float(row["last"]),
            "batch": int(row["batch"]),
            "seen": "sighting",
            **texts.field(place),
            "window": list(found.window),
        })  # fmt: skip
        if share_step is not None:
            written[-1] |= {"share_step": share_step, "share_at_step": at_step.get(place)}
    return written
